"""Weight files: what was saved, the same bytes each time."""
import json
import pickle
from argparse import Namespace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import save_for_hf

from timm_tmblock.checkpoint import copy_tensors, load_model, read_description, save_weights
from timm_tmblock.errors import InputError
from timm_tmblock.files import writing


@pytest.fixture
def weights():
    torch.manual_seed(0)
    half, transposed = torch.randn(7).half(), torch.randn(4, 2).t()
    return {'b.weight': torch.randn(3, 5), 'a': half, 'n': torch.tensor(3), 'c.t': transposed}


@pytest.mark.parametrize('description', [{}, dict(model='rn26_tm', label_names=['Bär', 'a "b"'], mean=[0.1])])
def test_file_gives_back_what_was_saved(weights, tmp_path, description):
    path = tmp_path / 'weights.safetensors'
    save_weights(path, weights, description)
    loaded = load_file(path)
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert read_description(path) == description
    with safe_open(path, framework='pt') as f:
        assert f.metadata() == {'format': 'pt', 'timm_tmblock': json.dumps(description)}


def test_tied_weights_are_saved_under_each_of_their_names(tmp_path):
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    state = torch.nn.Sequential(first, second).state_dict()
    save_weights(tmp_path / 'w.safetensors', state, {})
    loaded = load_file(tmp_path / 'w.safetensors')
    assert loaded.keys() == state.keys() and torch.equal(loaded['0.weight'], loaded['1.weight'])
    assert len({t.data_ptr() for t in copy_tensors(state).values()}) == 4


def test_same_weights_are_the_same_file(weights, tmp_path):
    """safetensors itself would write one of two orders, by chance."""
    files = []
    for i in range(16):
        save_weights(tmp_path / f'{i}.safetensors', weights, dict(model='rn26_tm'))
        files.append((tmp_path / f'{i}.safetensors').read_bytes())
    assert len(set(files)) == 1
    assert int.from_bytes(files[0][:8], 'little') % 8 == 0


@pytest.mark.parametrize('described, asked', [
    ('rn26_tm', None), ('rn26_tm', 'rn26_tm'), ('rn26_tm', 'rn26_tm.cifar10'), ('rn26_tm.cifar100', 'rn26_tm')])
def test_weights_load_under_each_name_of_their_network(tmp_path, described, asked):
    model = timm.create_model('rn26_tm', num_classes=3)
    path = tmp_path / 'weights.safetensors'
    save_weights(path, model.state_dict(), dict(model=described, num_classes=3, label_names=['a', 'b', 'c']))
    loaded = load_model(path, asked)
    assert torch.equal(loaded.fc.weight, model.fc.weight)
    assert loaded.pretrained_cfg['label_names'] == ['a', 'b', 'c']
    assert loaded.pretrained_cfg.get('license') is None  # whoever trained them chooses it
    assert timm.create_model('rn26_tm').pretrained_cfg['license'] == 'apache-2.0'


@pytest.mark.parametrize('description, asked, message', [
    (dict(model='rn26_tm'), 'rn26', 'holds weights of rn26_tm, not of rn26'),
    (dict(model='rn26_tm.cifar10'), 'rn38_tm', 'holds weights of rn26_tm.cifar10, not of rn38_tm'),
    (dict(model='rn26_tm', model_args=dict(img_size=2)), None, 'img_size must be at least 4'),
    (dict(model='rn26_tm'), 'rn26_tm.foo', "^rn26_tm has no tag 'foo'; it has cifar10, .*mini_imagenet"),
    ({}, 'rn26_tm.foo', "^rn26_tm has no tag 'foo'"),
    ({}, None, 'does not say which model')])
def test_weights_that_cannot_be_loaded_are_one_sentence(tmp_path, description, asked, message):
    path = tmp_path / 'weights.safetensors'
    save_weights(path, timm.create_model('rn26_tm').state_dict(), description)
    with pytest.raises(InputError, match=message) as error:
        load_model(path, asked)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('error, raised', [
    (torch.OutOfMemoryError('CUDA out of memory'), torch.OutOfMemoryError),
    (RuntimeError('NCCL error: unhandled system error'), RuntimeError),
    (RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 8'), InputError),
    (OSError(28, 'No space left on device'), InputError),
])
def test_only_what_the_disk_refuses_is_told_as_such(tmp_path, error, raised):
    with pytest.raises((RuntimeError, InputError)) as caught, writing(tmp_path / 'file') as tmp:
        tmp.write_text('half')
        raise error
    assert type(caught.value) is raised and not list(tmp_path.iterdir())


@pytest.mark.parametrize('value', [
    dict(interpolation='nearest'), dict(crop_mode='squash'), dict(crop_pct=0.8), dict(mean=[.1, .2, .3]),
    dict(std=[.4, .5, .6]), dict(input_size=[3, 24, 40])])
def test_weights_come_with_the_preprocessing_they_were_trained_with(tmp_path, value):
    path = tmp_path / 'weights.safetensors'
    state = timm.create_model('rn20', num_classes=2).state_dict()
    save_weights(path, state, dict(model='rn20', num_classes=2, **value))
    (key, expected), = value.items()
    found = load_model(path).pretrained_cfg[key]
    assert found == (tuple(expected) if isinstance(expected, list) else expected)  # tuples, as timm's


def test_weights_from_elsewhere_have_the_classes_of_their_classifier(tmp_path):
    for num_classes in (3, 10):
        model = timm.create_model('rn26_tm', num_classes=num_classes)
        save_weights(tmp_path / 'w.safetensors', model.state_dict(), {})
        loaded = load_model(tmp_path / 'w.safetensors', 'rn26_tm')
        assert torch.equal(loaded.fc.weight, model.fc.weight)
        assert loaded.pretrained_cfg.get('label_names') is None  # of which classes, nobody knows


def test_checkpoint_of_timms_own_script_is_read_and_nothing_but_weights_unpickled(tmp_path):
    model = timm.create_model('rn26_tm', num_classes=3)
    old = {k: v * 0 for k, v in model.state_dict().items()}
    path = tmp_path / 'model_best.pth.tar'
    state = dict(epoch=3, arch='rn26_tm', args=Namespace(lr=0.1), state_dict=old, state_dict_ema=model.state_dict())
    torch.save(state, path)
    loaded = load_model(path, 'rn26_tm')
    assert torch.equal(loaded.fc.weight, model.fc.weight) and loaded.pretrained_cfg.get('label_names') is None
    with pytest.raises(InputError, match='does not say which model'):
        load_model(path)
    with pytest.raises(InputError, match='does not hold weights of rn26_tm: it has no fc.weight'):
        torch.save({'net': model.state_dict(), 'acc': 0.5}, tmp_path / 'other.pth')
        load_model(tmp_path / 'other.pth', 'rn26_tm')
    for content in (b'nothing', pickle.dumps(print)):
        (tmp_path / 'w.pt').write_bytes(content)
        with pytest.raises(InputError, match='w.pt cannot be read as weights') as error:
            load_model(tmp_path / 'w.pt', 'rn26_tm')
        assert '\n' not in str(error.value)
    with pytest.raises(InputError, match='There is no checkpoint .*gone.pth'):
        load_model(tmp_path / 'gone.pth', 'rn26_tm')


def test_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / 'best.safetensors'
    path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4000000\n')
    with pytest.raises(InputError, match='best.safetensors is a Git LFS pointer, not the file itself; install'):
        load_model(path)


def test_weights_of_a_folder_are_what_its_config_says(tmp_path):
    torch.manual_seed(0)
    names, overlay = ['ant', 'bee', 'cat'], dict(mean=(0.1, 0.2, 0.3), crop_pct=0.9)
    model = timm.create_model('rn26_tm', num_classes=3, img_size=64, pretrained_cfg_overlay=overlay).eval()
    save_for_hf(model, tmp_path, model_config=dict(label_names=names), safe_serialization=True)
    path = tmp_path / 'model.safetensors'
    loaded = load_model(path)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    cfg = loaded.pretrained_cfg
    assert loaded.img_size == (64, 64) and cfg['mean'] == (0.1, 0.2, 0.3) and cfg['crop_pct'] == 0.9
    assert list(cfg['label_names']) == names
    for content in ('{"architecture": ', '[]', '{"pretrained_cfg": 1}', '{"model_args": null}', '{"model_type": "v"}'):
        (tmp_path / 'config.json').write_text(content)
        assert read_description(path) == {}
    (tmp_path / 'config.json').unlink()
    assert read_description(path) == {}
