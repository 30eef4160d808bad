"""The registered networks: parameters, timm's contract, patch logits and templates."""
import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file
from timm.models import resolve_model_input_args
from timm.models._hub import save_for_hf
from timm.optim import param_groups_layer_decay

import timm_tmblock
from timm_tmblock.checkpoint import save_weights

PARAMETERS = {  # constant + slope * classes, Table 1 of the paper
    'rn20': (583_120, 257),
    'rn20_tm': (583_120 + 128 * 128, 257 + 259),  # not in the paper: the block has (2 D + 3) K + D^2
    'rn26': (961_488, 257),
    'rn26_tm': (977_872, 516),
    'rn38': (1_423_824, 257),
    'rn38_tm': (1_440_208, 516),
    'wrn16': (1_281_232, 129),
    'wrn16_tm': (1_297_616, 388),
    'dn100': (1_196_196, 535),
    'dn100_tm': (1_313_160, 1222),
    'dn100_tm_cat': (1_350_180, 1264),
}
MODELS = sorted(PARAMETERS)
SHIPPED = timm.get_pretrained_cfg('rn26_tm').file


@pytest.mark.parametrize('num_classes', [1, 10, 37, 100])
@pytest.mark.parametrize('name', MODELS)
def test_parameter_count_is_the_papers(name, num_classes):
    model = timm.create_model(name, num_classes=num_classes, device='meta')
    constant, slope = PARAMETERS[name]
    assert sum(p.numel() for p in model.parameters()) == constant + slope * num_classes


SIZES = {  # of the image: extra halvings
    16: 0, 32: 0, 63: 0, 64: 1, 84: 1, 127: 1, 128: 2, 224: 2, 300: 2,
}


@pytest.mark.parametrize('name', ['rn20_tm', 'rn26_tm', 'wrn16_tm', 'dn100_tm', 'dn100_tm_cat'])
@pytest.mark.parametrize('size', SIZES)
def test_image_size_lays_out_map_and_patch_and_keeps_the_parameters(name, size):
    model = timm.create_model(name, img_size=size, device='meta').eval()
    halvings = (1 if name == 'rn20_tm' else 2) + SIZES[size]
    pools = min(halvings, 3) if name.startswith('dn') else 0
    maps = []
    model.tm.register_forward_pre_hook(lambda module, args: maps.append(args[0].shape[2:]))
    model(torch.empty(1, 3, size, size, device='meta'))
    side = size
    for _ in range(halvings - pools):
        side = -(-side // 2)  # strided convolutions round up
    side //= 2 ** pools
    assert tuple(maps[0]) == (side, side)
    assert model.patch_reduction == 2 ** halvings
    assert model.patch_size == model.tm.patch_mean.patch_size == side // 2
    constant, slope = PARAMETERS[name]
    assert sum(p.numel() for p in model.parameters()) == constant + slope * 10
    assert timm.data.resolve_model_data_config(model)['input_size'] == (3, size, size)
    assert f'img_size=({size}, {size}), patch_size={side // 2}' in repr(model)


@pytest.mark.parametrize('name', MODELS)
def test_mini_imagenet_tag_is_the_papers_network(name):
    model = timm.create_model(f'{name}.mini_imagenet', device='meta')
    constant, slope = PARAMETERS[name]
    assert sum(p.numel() for p in model.parameters()) == constant + slope * 100
    assert model.img_size == (84, 84)
    assert model.patch_size == (10 if name.startswith('rn20') else 5)
    side = 10 if name.startswith('dn') else 11
    assert model.forward_features(torch.empty(2, 3, 84, 84, device='meta')).shape[2:] == (side, side)
    reductions = timm.create_model(f'{name}.mini_imagenet', features_only=True).feature_info.reduction()
    assert reductions == ([1, 2, 4, 8] if name.startswith('dn') else [2, 4, 8])


def test_oblong_images_get_patches_of_their_shorter_side():
    model = timm.create_model('rn26_tm', img_size=(48, 160))
    assert (model.img_size, model.patch_reduction, model.patch_size) == ((48, 160), 4, 6)


@pytest.mark.parametrize('name', ['rn20_tm', 'rn26_tm', 'wrn16', 'dn100_tm'])
@pytest.mark.parametrize('img_size', [24, 32, 50, 84, 130, (48, 160)])
@pytest.mark.parametrize('by', ['img_size', 'overlay'])
def test_pooled_map_of_the_config_is_that_of_the_image_size(name, img_size, by):
    size = img_size if isinstance(img_size, tuple) else (img_size, img_size)
    kwargs = dict(img_size=img_size) if by == 'img_size' else dict(pretrained_cfg_overlay=dict(input_size=(3, *size)))
    model = timm.create_model(name, device='meta', **kwargs)
    assert model.img_size == model.pretrained_cfg['input_size'][1:] == size
    side = model.forward_features(torch.empty(2, 3, *size, device='meta')).shape[2:]
    assert model.pretrained_cfg['pool_size'] == side


def test_mini_imagenet_has_the_pixels_of_imagenet():
    cfg = timm.create_model('rn26_tm.mini_imagenet').pretrained_cfg
    assert (cfg['mean'], cfg['std']) == (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)


def test_other_image_size_is_announced(caplog):
    with caplog.at_level('INFO', logger='timm_tmblock'):
        timm.create_model('rn26_tm', img_size=84)
    assert 'rn26_tm is configured for 84x84 images: reduced by 8, patches of 5x5' in caplog.text
    caplog.clear()
    with caplog.at_level('INFO', logger='timm_tmblock'):
        timm.create_model('rn26_tm')
    assert not caplog.text


def test_image_size_round_trips_and_takes_weights_of_another(tmp_path, checkpoint):
    source, overlay = checkpoint
    model = timm.create_model('rn26_tm', pretrained=True, pretrained_cfg_overlay=overlay, img_size=84).eval()
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    save_for_hf(model, tmp_path / 'hub', safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True).eval()
    x = torch.randn(3, 3, 84, 84)
    assert loaded.img_size == (84, 84) and loaded.patch_size == 5
    assert torch.equal(loaded(x), model(x))
    assert timm.data.resolve_model_data_config(loaded)['input_size'] == (3, 84, 84)


@pytest.mark.parametrize('batch_size', [1, 2, 5])
def test_patch_logits_accompany_the_same_logits(trained_like, batch_size):
    model = trained_like('rn26_tm')
    x = torch.randn(batch_size, 3, 32, 32)
    logits, patch_logits = model.forward_patch_logits(x)
    assert torch.equal(logits, model(x))
    assert patch_logits.shape == (batch_size, 10, 8, 8)
    trunk = model.layer3(model.layer2(model.layer1(model.conv1(x))))
    expected = model.tm.match(model.tm.patch_mean(trunk))
    torch.testing.assert_close(patch_logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('fuse', [False, True])
def test_hooks_on_the_block_see_it_with_patch_logits_too(trained_like, fuse):
    model = trained_like('rn26_tm')
    if fuse:
        model.fuse()
    seen = []
    model.tm.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model(x)
        _, patch_logits = model.forward_patch_logits(x)
    torch.testing.assert_close(seen[1], (seen[0], patch_logits), rtol=0, atol=0)


def test_forward_returns_patch_logits_only_in_training_and_only_when_switched_on():
    model = timm.create_model('rn26_tm').train()
    x = torch.randn(2, 3, 32, 32)
    assert torch.is_tensor(model(x))
    model.set_patch_supervision()
    logits, patch_logits = model(x)
    assert logits.shape == (2, 10) and patch_logits.shape == (2, 10, 8, 8)
    assert torch.is_tensor(model.eval()(x))
    model.train().set_patch_supervision(False)
    assert torch.is_tensor(model(x))


def test_supervised_model_scripts_to_plain_logits(trained_like):
    model = trained_like('rn26_tm')
    model.set_patch_supervision()
    x = torch.randn(2, 3, 32, 32)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
    assert torch.is_tensor(scripted.train()(x))


def test_baseline_says_it_has_no_patch_logits():
    model = timm.create_model('rn26')
    for call in (model.set_patch_supervision, lambda: model.reset_templates(3),
                 lambda: model.forward_patch_logits(torch.randn(1, 3, 32, 32))):
        with pytest.raises(ValueError, match='no template matching block'):
            call()
    model.set_patch_supervision(False)  # switching off what is not there is fine


@pytest.mark.parametrize('name', ['rn20', 'rn26_tm', 'wrn16', 'dn100_tm'])
def test_checkpointed_gradients_are_the_same(trained_like, name):
    model = trained_like(name).train()
    x = torch.randn(3, 3, 32, 32)
    stages = [m for m in model.modules() if hasattr(m, 'grad_checkpointing')]
    gradients, calls = [], []
    for stage in stages:
        stage.blocks[0].register_forward_pre_hook(lambda *args: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        calls.clear()
        model(x).square().sum().backward()
        assert len(calls) == len(stages) * (1 + enable)  # once more in the backward
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', MODELS)
def test_meta_device_model_initializes_every_tensor(name):
    model = timm.create_model(name, device='meta').to_empty(device='cpu')
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(float('nan'))
    model.init_weights()
    assert not [k for k, v in model.state_dict().items() if v.isnan().any()]
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()
    weight = model.layer4.blocks[1].conv2.weight
    fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)  # Kaiming


@pytest.mark.parametrize('name', MODELS)
def test_modules_stand_in_the_order_they_run(trained_like, name):
    model, x = trained_like(name), torch.randn(3, 3, 32, 32)
    *rest, last = model.children()
    assert last is model.get_classifier()
    torch.testing.assert_close(torch.nn.Sequential(*rest)(x), model.forward_head(model.forward_features(x), True))


@pytest.mark.parametrize('name', MODELS)
def test_features_are_one_tap_a_reduction(name):
    model = timm.create_model(name, features_only=True)
    assert model.feature_info.reduction() == [1, 2, 4]  # what segmentation decoders accept
    assert [tuple(f.shape[1:]) for f in model(torch.randn(1, 3, 32, 32))] == [
        (channels, size, size) for channels, size in zip(model.feature_info.channels(), (32, 16, 8))]


@pytest.mark.parametrize('name, last', [('rn20_tm', 1), ('rn26_tm', 2), ('dn100_tm', 2)])
def test_features_are_those_after_the_block(trained_like, name, last):
    model, x = trained_like(name), torch.randn(2, 3, 32, 32)
    outputs = []
    model.tm.register_forward_hook(lambda module, args, output: outputs.append(output))
    features = model.forward_intermediates(x, intermediates_only=True)
    expected = outputs[0] if last == 1 else model._forward_last(outputs[0])  # of two stages the block is the last
    assert len(outputs) == 1 and torch.equal(features[last], expected)
    logits, patch_logits = model.forward_patch_logits(x)
    model.prune_intermediate_layers([last])
    assert model.has_template_matching and model.num_features == features[last].shape[1]
    assert torch.equal(model.forward_patch_logits(x)[1], patch_logits)
    model.prune_intermediate_layers([0])
    assert not model.has_template_matching


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (84, 84), (7, 5)])
def test_other_input_sizes_run(trained_like, size):
    logits, patch_logits = trained_like('rn26_tm').forward_patch_logits(torch.randn(1, 3, *size))
    assert logits.shape == (1, 10)
    assert patch_logits.shape[2:] == tuple(-(-s // 4) for s in size)


def test_layer_decay_scales_the_block_between_stages_3_and_4():
    model = timm.create_model('rn26_tm')
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {names[id(p)]: g['lr_scale'] for g in groups for p in g['params']}
    order = ['conv1.weight', 'layer1.blocks.0.conv1.weight', 'layer3.blocks.1.conv1.weight', 'tm.match.weight',
             'layer4.blocks.0.conv1.weight', 'fc.weight']
    scales = [scale[n] for n in order]
    assert scales == sorted(set(scales)) and scale['norm.weight'] == scale['layer4.blocks.1.conv1.weight']


def test_reset_classifier_keeps_templates():
    model = timm.create_model('rn26_tm')
    before = model.tm.match.weight.clone()
    model.reset_classifier(4)
    assert torch.equal(model.tm.match.weight, before)
    logits, patch_logits = model.forward_patch_logits(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 4) and patch_logits.shape == (2, 10, 8, 8)
    model.reset_classifier(4, 'catavgmax')
    features = model.forward_head(model.forward_features(torch.randn(2, 3, 32, 32)), pre_logits=True)
    assert model.head_hidden_size == features.shape[1] == 512


@pytest.mark.parametrize('name', ['rn26_tm', 'dn100', 'resnet18'])
def test_saved_image_size_is_no_request(tmp_path, name):
    """Its own config, and an overlay, say of which size the images are, as of timm's own networks."""
    def load(**kwargs):
        model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **kwargs)
        return getattr(model, 'img_size', None), timm.data.resolve_model_data_config(model)['input_size']

    ours = name != 'resnet18'
    model = timm.create_model(name, pretrained_cfg_overlay=dict(input_size=(3, 32, 32)))
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert load() == ((32, 32) if ours else None, (3, 32, 32))
    assert load(pretrained_cfg_overlay=dict(input_size=(3, 84, 84))) == ((84, 84) if ours else None, (3, 84, 84))
    if ours:
        assert load(img_size=48) == ((48, 48), (3, 48, 48))
    save_for_hf(model, tmp_path, data_config=dict(input_size=(3, 64, 64)), safe_serialization=True)
    assert load() == ((32, 32) if ours else None, (3, 64, 64))


@pytest.mark.parametrize('kwargs', [
    dict(num_classes=0), dict(pretrained_cfg_overlay=dict(num_classes=0)),
    dict(pretrained_cfg=dict(num_classes=0, input_size=(3, 32, 32)))])
def test_model_without_classifier_keeps_the_default_templates(kwargs):
    model = timm.create_model('rn26_tm', **kwargs)
    assert model.num_classes == 0 and model.tm.num_templates == 10
    assert timm.create_model('rn26_tm', num_templates=6, **kwargs).tm.num_templates == 6


@pytest.mark.parametrize('name, kwargs, message', [
    ('rn26', dict(num_templates=10), 'no templates'),
    ('rn26_tm', dict(num_templates=0), 'num_templates must be at least 1, got 0'),
    ('rn26_tm', dict(num_classes=-1), 'num_templates must be given when num_classes is -1'),
    ('rn26_tm', dict(img_size=3), 'at least 4 pixels'),
    ('rn26', dict(layers=(1, 1)), 'must be of 3 or of 4 stages, got 2, 4 and 4'),
    ('rn26_tm', dict(layers=(2,) * 5, mid_channels=(16,) * 5, channels=(64,) * 5), 'must be of 3 or of 4 stages'),
    ('rn26', dict(channels=(16, 16, 16)), 'must be of 3 or of 4 stages, got 4, 4 and 3'),
    ('rn26', dict(patch_size=0), 'patch_size must be a whole number of at least 1, got 0'),
    ('dn100', dict(layers=(2, 2, 2)), 'must be of 4 stages, got 3'),
    ('dn100', dict(concat=True), 'concat requires template_matching=True'),
])
def test_impossible_arguments_are_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **kwargs)


def test_whole_patch_size_of_any_type_runs():
    model = timm.create_model('rn26_tm', patch_size=4.0).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize('name', ['rn26', 'wrn16'])
def test_stages_may_keep_their_channels(name):
    model = timm.create_model(name, channels=(32,) * 4, mid_channels=(32,) * 4).eval()
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 32, 8, 8)


@pytest.fixture
def checkpoint(tmp_path, trained_like):
    """Weights of an rn26_tm with 6 classes, and their path."""
    model = trained_like('rn26_tm', num_classes=6)
    save_weights(tmp_path / 'six.safetensors', model.state_dict(), {})
    return model, dict(file=str(tmp_path / 'six.safetensors'), num_classes=6)


@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=4), dict(num_classes=0), dict(num_classes=4, in_chans=1)])
def test_fine_tuning_keeps_the_templates_of_the_checkpoint(checkpoint, kwargs):
    source, overlay = checkpoint
    model = timm.create_model('rn26_tm', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    assert model.num_classes == kwargs.get('num_classes', 6)
    for name, tensor in source.tm.state_dict().items():
        assert torch.equal(model.tm.state_dict()[name], tensor)
    model.eval()(torch.randn(1, kwargs.get('in_chans', 3), 32, 32))


def test_fine_tuning_rebuilds_templates_on_request(checkpoint):
    source, overlay = checkpoint
    model = timm.create_model(
        'rn26_tm', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, num_templates=4)
    assert model.tm.match.weight.shape[0] == model.tm.value.weight.shape[1] == 4
    assert torch.equal(model.tm.shortcut.weight, source.tm.shortcut.weight)
    assert torch.equal(model.layer4.blocks[0].conv1.weight, source.layer4.blocks[0].conv1.weight)


def test_kept_templates_round_trip_through_a_local_dir(checkpoint, tmp_path):
    _, overlay = checkpoint
    model = timm.create_model('rn26_tm', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4).eval()
    save_for_hf(model, tmp_path / 'hub', safe_serialization=True)
    assert str(tmp_path) not in (tmp_path / 'hub' / 'config.json').read_text()
    loaded = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True).eval()
    x = torch.randn(3, 3, 32, 32)
    assert loaded.tm.num_templates == 6
    assert torch.equal(loaded(x), model(x))
    untrained = timm.create_model(f'local-dir:{tmp_path / "hub"}')  # as transformers builds it before loading weights
    assert untrained.tm.num_templates == 6


@pytest.mark.parametrize('num_classes', [0, 5])
def test_templates_outlive_another_classifier_and_a_rebuild_without_weights(num_classes, tmp_path):
    model = timm.create_model('rn26_tm.cifar100').eval()
    model.reset_classifier(num_classes)
    save_for_hf(model, tmp_path, safe_serialization=True)
    rebuilt = timm.create_model(f'local-dir:{tmp_path}').eval()  # as transformers builds it before loading weights
    rebuilt.load_state_dict(model.state_dict())
    assert rebuilt.tm.num_templates == 100
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(rebuilt(x), model(x))


@pytest.mark.parametrize('name, kwargs, named', [
    ('rn26_tm', dict(num_classes=10), False),
    ('rn26', dict(num_classes=10), False),
    ('rn26_tm', dict(num_classes=10, pretrained=True), True),
    ('rn26_tm.cifar10', dict(num_classes=10), True),
    ('rn26_tm', dict(num_classes=5, pretrained=True), False),
    ('rn26_tm.cifar10', dict(num_classes=5), False),
    ('rn26_tm', dict(resolve_model_input_args(
        'rn26_tm', num_classes=10, pretrained_cfg_overlay=dict(file=SHIPPED, num_classes=-1)), pretrained=True), False),
    ('rn26_tm', dict(num_classes=10, pretrained_cfg_overlay=dict(label_names=['a'] * 10)), True),
    ('rn26_tm', dict(pretrained=True, pretrained_cfg_overlay=dict(file=SHIPPED)), False),  # any file of 10 classes
    ('rn26_tm', dict(pretrained=True, pretrained_cfg_overlay=dict(file=SHIPPED, label_names=['a'] * 10)), True),
    *((name, resolve_model_input_args(name, **kwargs), named) for name, kwargs, named in (  # as timm's scripts do
        ('rn26_tm', dict(num_classes=10), False), ('rn26_tm', {}, True))),
    ('rn26_tm', dict(resolve_model_input_args('rn26_tm', num_classes=10), pretrained=True), True),
    ('rn26_tm', dict(pretrained_cfg=timm.get_pretrained_cfg('rn26_tm'), num_classes=10), False),
    ('rn26_tm', dict(pretrained_cfg=timm.get_pretrained_cfg('rn26_tm')), True),
])
def test_new_classifiers_have_no_names_of_the_pretrained_classes(name, kwargs, named):
    model = timm.create_model(**dict(kwargs, model_name=name))
    assert (model.pretrained_cfg.get('label_names') is not None) == named


@pytest.mark.parametrize('num_classes', [5, 10])
def test_classifier_that_was_reset_has_no_names_of_the_pretrained_classes_here_or_saved(num_classes, tmp_path):
    model = timm.create_model('rn26_tm', pretrained=True)
    model.reset_classifier(num_classes)
    assert not model.pretrained_cfg['label_names'] and not model.default_cfg['label_names']
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert not timm.create_model(f'local-dir:{tmp_path}', pretrained=True).pretrained_cfg.get('label_names')
    assert timm.create_model('rn26_tm').pretrained_cfg['label_names']  # the registry keeps its own


@pytest.mark.parametrize('source', [dict(hf_hub_id='nobody/nothing'), dict(url='https://localhost:1/weights.safetensors')])
def test_weights_of_the_package_do_not_stand_in_for_others(source, monkeypatch):
    wanted = []

    def load(**kwargs):
        wanted.append(kwargs)
        raise RuntimeError('offline')

    monkeypatch.setattr('timm.models._builder.load_state_dict_from_hf', lambda *args, **kwargs: load(args=args))
    monkeypatch.setattr('timm.models._builder.load_state_dict_from_url', lambda *args, **kwargs: load(args=args))
    with pytest.raises(RuntimeError, match='offline'):
        timm.create_model('rn26_tm', pretrained=True, pretrained_cfg_overlay=source)
    assert wanted[0]['args'][0] in source.values()
    kwargs = resolve_model_input_args('rn26_tm', pretrained_cfg_overlay=source)  # as timm's scripts do
    with pytest.raises(RuntimeError, match='offline'):
        timm.create_model(pretrained=True, **kwargs)
    assert wanted[1]['args'][0] in source.values()
    assert not timm.create_model(**kwargs).pretrained_cfg.get('label_names')


@pytest.mark.parametrize('num_classes', [10, 5])
def test_classifier_of_as_many_classes_warns_of_the_templates_before(num_classes, caplog):
    timm.create_model('rn26_tm', pretrained=True).reset_classifier(num_classes)
    assert ('The classifier is new, the 10 templates are not' in caplog.text) == (num_classes == 10)


def test_weights_of_other_templates_are_refused_with_the_remedy(tmp_path):
    model = timm.create_model('rn26_tm', pretrained=True, num_classes=5)  # keeps its 10 templates
    torch.save(model.state_dict(), tmp_path / 'tuned.pth')
    with pytest.raises(RuntimeError, match='have 10 templates and the model has 5; create it with num_templates=10'):
        timm.create_model('rn26_tm', num_classes=5, checkpoint_path=tmp_path / 'tuned.pth')
    loaded = timm.create_model('rn26_tm', num_classes=5, num_templates=10, checkpoint_path=tmp_path / 'tuned.pth')
    assert torch.equal(loaded.tm.match.weight, model.tm.match.weight)


def test_saved_number_of_templates_is_no_request(tmp_path):
    save_for_hf(timm.create_model('rn26_tm', pretrained=True), tmp_path, safe_serialization=True)
    folder, file = f'local-dir:{tmp_path}', timm.get_pretrained_cfg('rn26_tm.cifar100').file
    overlay = dict(source=None, file=file, num_classes=100)
    model = timm.create_model(folder, pretrained=True, num_classes=100, pretrained_cfg_overlay=overlay)
    assert model.tm.num_templates == 100
    assert torch.equal(model.tm.match.weight, load_file(file)['tm.match.weight'])
    model = timm.create_model(
        folder, pretrained=True, num_classes=100, num_templates=7, pretrained_cfg_overlay=overlay)
    assert model.tm.num_templates == 7


def test_classes_of_a_file_may_be_unknown():
    overlay = dict(file=SHIPPED, num_classes=-1)  # as timm's scripts have it for --pretrained-path
    model = timm.create_model('rn26_tm', pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    assert model.tm.num_templates == 10


def test_new_templates_are_initialized_as_the_first_ones():
    for model in (timm.create_model('rn26_tm', num_classes=200), timm.create_model('rn26_tm')):
        model.reset_templates(200)
        assert model.tm.value.weight.std().item() == pytest.approx((2 / model.tm.value.out_channels) ** 0.5, rel=0.05)
        assert model.tm.match.weight.abs().max() <= model.tm.dim ** -0.5  # PyTorch's own
    assert timm.create_model('rn26_tm').tm.match.weight.abs().max() <= model.tm.dim ** -0.5


def test_modules_have_names_of_their_own_in_timms_registry():
    assert timm.list_models(module='tm_resnet') == [name for name in MODELS if not name.startswith('dn')]
    assert timm.list_models(module='tm_densenet') == [name for name in MODELS if name.startswith('dn')]
    assert not set(MODELS) & {n for module in ('resnet', 'densenet') for n in timm.list_models(module=module)}


def test_entry_points_are_where_timm_has_its_own():
    assert all(callable(getattr(timm_tmblock.models, name)) for name in ('rn26_tm', 'wrn16', 'dn100_tm_cat'))


@pytest.mark.parametrize('name', ['rn26_tm', 'dn100_tm_cat'])
def test_options_reach_the_layers(name):
    model = timm.create_model(name, act_layer='silu', norm_layer='groupnorm1', drop_rate=0.3, global_pool='max')
    kinds = {type(m) for m in model.modules()}
    assert nn.SiLU in kinds and not kinds & {nn.ReLU, timm.layers.BatchNormAct2d}
    f = torch.randn(3, model.num_features, 4, 4)
    for _ in range(2):
        torch.testing.assert_close(model.eval().forward_head(f, pre_logits=True), f.amax((2, 3)))
        dropped = model.train().forward_head(torch.ones_like(f), pre_logits=True)
        assert 0.2 < (dropped == 0).double().mean() < 0.4
        model.reset_classifier(4)  # keeps the pooling


@pytest.mark.parametrize('name', ['rn26_tm', 'wrn16'])
def test_stochastic_depth_skips_residual_branches_more_often_the_deeper_they_are(name):
    torch.manual_seed(0)
    model, plain = timm.create_model(name, drop_path_rate=0.5), timm.create_model(name)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=0, atol=0)
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage.blocks]
    for i, block in enumerate(blocks):
        rate = 0.5 * i / (len(blocks) - 1)
        x = torch.randn(200, block.conv1.in_channels, 4, 4)
        with torch.no_grad():
            y = block.train()(x)
            block.drop_path = nn.Identity()
            whole = block(x)
            block.drop_path = timm.layers.DropPath(1.)
            shortcut = block(x)
        skipped = (y == shortcut).flatten(1).all(1)
        assert abs(skipped.double().mean() - rate) <= 4 * (rate * (1 - rate) / 200) ** 0.5
        expected = shortcut + (whole - shortcut) / (1 - rate)
        torch.testing.assert_close(y[~skipped], expected[~skipped], rtol=1e-4, atol=1e-5)
