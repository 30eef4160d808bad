"""Measuring: the numbers are those of independent formulas, and the same for PyTorch and ONNX Runtime."""
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import save_for_hf

from export.__main__ import main as export
from export.onnx import OnnxOptions, export_onnx
from timm_tmblock.checkpoint import save_weights
from timm_tmblock.errors import InputError
from timm_tmblock.models._labels import CIFAR10_LABELS
from train.augment import DataConfig
from train.data import decode, open_dataset
from train.evaluate import draw, main, measure
from train.loader import InMemoryLoader
from train.metrics import count_confusions, measure_accuracy, measure_reliability, softmax
from train.runner import TorchRunner

ROOT = Path(__file__).parent.parent
FLAGS = ['--split', 'test[:37]', '--batch-size', '16', '--device', 'cpu']


@pytest.fixture(scope='module')
def model():
    return timm.create_model('rn26_tm', pretrained=True).eval()


@pytest.fixture(scope='module')
def onnx_folder(model, images, tmp_path_factory):
    """The network as logits, and as probabilities of pixels."""
    folder = tmp_path_factory.mktemp('onnx')
    for name, options in (
            ('logits', OnnxOptions(patch_logits=True)),
            ('pixels', OnnxOptions(patch_logits=True, softmax=True, preprocessing='NHWC')),
    ):
        export_onnx(model, folder / f'{name}.onnx', options, images(model))
    return folder


def test_metrics_agree_with_loops_in_float64():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(203, 7)).astype(np.float32) * 2, rng.integers(0, 7, 203)
    p = softmax(logits)
    np.testing.assert_allclose(p, torch.from_numpy(logits).double().softmax(1).numpy(), rtol=1e-12)
    values = measure_accuracy(logits, targets)
    ranks = [sorted(range(7), key=lambda k, row=row: -row[k]).index(t) for row, t in zip(logits, targets)]
    assert values['top1'] == pytest.approx(100 * np.mean([r < 1 for r in ranks]))
    assert values['top5'] == pytest.approx(100 * np.mean([r < 5 for r in ranks]))
    expected = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(targets)).item()
    assert values['loss'] == pytest.approx(expected)

    ece = 0.
    for i in range(10):  # the definition, bin by bin
        inside = [n for n in range(203) if i / 10 < p[n].max() <= (i + 1) / 10]
        if inside:
            accuracy = np.mean([p[n].argmax() == targets[n] for n in inside])
            ece += len(inside) / 203 * abs(accuracy - np.mean([p[n].max() for n in inside]))
    reliability = measure_reliability(p, targets, bins=10)
    assert reliability.ece == pytest.approx(ece) and reliability.counts.sum() == 203

    confusion = count_confusions(p.argmax(1), targets, 7)
    assert all(confusion[t, k] == sum((p.argmax(1) == k) & (targets == t)) for t in range(7) for k in range(7))


def test_confidence_on_an_edge_counts_to_the_bin_below():
    p = np.array([[0.5, 0.5], [0.75, 0.25], [0.8, 0.2]])
    assert measure_reliability(p, np.zeros(3, dtype=int), bins=4).counts.tolist() == [0, 1, 1, 1]


def test_perfect_confidence_is_perfectly_calibrated():
    p = np.eye(3)[[0, 1, 2, 0]]
    assert measure_reliability(p, np.array([0, 1, 2, 0])).ece == 0
    assert measure_reliability(p, np.array([1, 2, 0, 1])).ece == 1


def test_folder_of_a_saved_model_is_measured_and_told_by_its_weights(model, tmp_path):
    save_for_hf(model, tmp_path, safe_serialization=True)
    named, saved = main(['rn26_tm', *FLAGS]), main([f'local-dir:{tmp_path}', *FLAGS])
    assert saved['top1'] == named['top1']
    assert saved['weights_sha256'] == hashlib.sha256((tmp_path / 'model.safetensors').read_bytes()).hexdigest()


def test_evaluation_equals_a_plain_loop(model, tmp_path):
    result = main(['rn26_tm', *FLAGS, '--tta', 'flip', '--output', str(tmp_path / 'out')])
    cfg = model.pretrained_cfg
    config = DataConfig((3, 32, 32), cfg['mean'], cfg['std'])
    dataset = decode(open_dataset('sample', 'test[:37]'), config, progress=False)
    mean, std = (torch.tensor(cfg[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
    x = (dataset.images / 255 - mean) / std
    with torch.no_grad():
        logits, patch_logits = model.forward_patch_logits(x)
        mirrored = model(x.flip(3))
    right = (patch_logits.argmax(1) == dataset.targets[:, None, None]).double().mean().item()
    assert result['patch_accuracy'] == pytest.approx(100 * right)
    for prefix, output in (('', logits), ('flip_', (logits + mirrored) / 2)):
        expected = measure_accuracy(output.numpy(), dataset.targets.numpy())
        assert {k: result[prefix + k] for k in expected} == pytest.approx(expected, rel=1e-4)
    assert result['images'] == 37 and result['images_per_second'] > 0
    shipped = (ROOT / 'timm_tmblock' / 'weights' / 'rn26_tm.cifar10.safetensors').read_bytes()
    assert result['weights_sha256'] == hashlib.sha256(shipped).hexdigest()

    written = json.loads((tmp_path / 'out.json').read_text())
    hits = (logits.argmax(1) == dataset.targets).numpy()
    assert {k: written[k] for k in result if k != 'versions'} == {k: v for k, v in result.items() if k != 'versions'}
    recalls = [hits[dataset.targets == k].mean() for k in dataset.targets.unique()]
    assert result['balanced_accuracy'] == pytest.approx(100 * np.mean(recalls))
    assert np.trace(written['confusion']) / 37 * 100 == pytest.approx(result['top1'])
    assert np.sum(written['confusion'], axis=1).tolist() == np.bincount(dataset.targets, minlength=10).tolist()
    assert written['right'] == np.packbits(hits).tobytes().hex()
    labels = b''.join(struct.pack('<q', label) for label in dataset.targets.tolist())
    assert written['targets_sha256'] == hashlib.sha256(labels).hexdigest()
    assert written['class_names'][3] == 'cat'
    with Image.open(tmp_path / 'out.png') as picture:
        assert picture.width > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out.json', 'out.png']


def test_result_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setattr('train.evaluate.measure', lambda *args: pytest.fail('the work'))
    with pytest.raises(InputError, match='Cannot write .*result.json'):
        main(['rn26_tm', *FLAGS, '--output', str(tmp_path / 'file' / 'result')])


def test_class_activation_maps_have_no_patch_accuracy(tmp_path):
    path = tmp_path / 'cam.onnx'
    export(['onnx', 'rn26', '--output', str(path), '--patch-logits', '--method', 'cam', '--check-images', '8'])
    assert main([str(path), *FLAGS]).keys() == main(['rn26', *FLAGS]).keys()


@pytest.mark.parametrize('name', ['logits', 'pixels'])
def test_onnx_file_measures_as_the_network_does(onnx_folder, name):
    a, b = main(['rn26_tm', *FLAGS]), main([str(onnx_folder / f'{name}.onnx'), *FLAGS])
    assert (a['runtime'], b['runtime']) == ('PyTorch', 'ONNX Runtime')
    for key in ('top1', 'top5', 'patch_accuracy', 'images'):
        assert a[key] == b[key]
    assert b['loss'] == pytest.approx(a['loss'], rel=1e-4) and b['ece'] == pytest.approx(a['ece'], rel=1e-3)
    assert len(b['weights_sha256']) == 64


def test_streamed_set_measures_the_same():
    a, b = main(['rn26_tm', *FLAGS]), main(['rn26_tm', *FLAGS, '--memory-limit', '0', '--workers', '1'])
    assert (a['top1'], a['images']) == (b['top1'], b['images'])
    assert b['loss'] == pytest.approx(a['loss'], rel=1e-4)


@pytest.mark.parametrize('folders, said', [
    (('',), 'has no folder test; images are taken from all of it'), (('train', 'test'), '')])
def test_folder_without_the_split_is_said_to_be_measured_whole(tmp_path, capsys, folders, said):
    for folder in folders:
        for name in ('ant', 'bee'):
            (tmp_path / 'images' / folder / name).mkdir(parents=True)
            Image.new('RGB', (32, 32)).save(tmp_path / 'images' / folder / name / '0.png')
    save_weights(tmp_path / 'w.safetensors', timm.create_model('rn20', num_classes=2).state_dict(), dict(
        model='rn20', num_classes=2, label_names=['ant', 'bee']))
    flags = ['--dataset', str(tmp_path / 'images'), '--device', 'cpu']
    assert main([str(tmp_path / 'w.safetensors'), *flags])['images'] == 2
    told = capsys.readouterr().err
    assert said in told and (said or 'no folder' not in told)


def test_baseline_has_no_patch_accuracy(tmp_path):
    baseline = timm.create_model('rn26')
    save_weights(tmp_path / 'w.safetensors', baseline.state_dict(), dict(model='rn26', num_classes=10))
    result = main([str(tmp_path / 'w.safetensors'), *FLAGS, '--precision', 'bfloat16'])
    assert 'patch_accuracy' not in result and result['precision'] == 'bfloat16'
    assert main([str(tmp_path / 'w.safetensors'), *FLAGS])['loss'] != result['loss']


@pytest.mark.parametrize('flags, message', [
    (['rn27_tm'], "rn27_tm is not a model with pretrained weights"),
    (['wrn16'], 'or a weight file that training wrote'),
    (['ONNX', '--checkpoint', 'x.safetensors'], 'logits.onnx has weights of its own; leave out --checkpoint'),
    (['ONNX', '--precision', 'bfloat16'], 'precision it was exported with'),
    (['missing.onnx'], 'no file missing.onnx'),
    (['missing.safetensors'], 'no file missing.safetensors'),
    (['rn26_tm', '--split', 'nothing'], 'nothing'),
    (['rn26_tm', '--device', 'cuda'], 'no cuda device'),
    (['rn26_tm', '--precision', 'int3'], 'invalid choice'),
    (['rn26_tm', '--output', f'{ROOT}/README.md/x'], 'Cannot write'),
    (['engine'], 'There is no .*x.engine.json, which holds the input format and classes of x.engine'),
])
def test_what_cannot_be_measured_is_one_sentence(flags, message, tmp_path, onnx_folder):
    flags = [str(onnx_folder / 'logits.onnx') if flag == 'ONNX' else flag for flag in flags]
    if flags == ['engine']:
        (tmp_path / 'x.engine').write_bytes(b'plan')
        flags = [str(tmp_path / 'x.engine')]
    if '--device' in flags and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    with pytest.raises(InputError, match=message) as error:
        main([*flags[:1], *FLAGS, *flags[1:]])
    assert '\n' not in str(error.value)


def test_rows_of_the_picture_are_shares_of_a_class(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr('train.evaluate.save_figure', lambda figure, path: drawn.append(figure))
    confusion = [[3, 1], [0, 2]]
    result = dict(model='x', dataset='y', split='z', top1=0., ece=0., images=6)
    draw(dict(result, class_names=['a', 'b'], confusion=confusion),
         measure_reliability(np.eye(2), np.arange(2)), tmp_path / 'x.png')
    np.testing.assert_allclose(drawn[0].axes[0].images[0].get_array(), [[0.75, 0.25], [0, 1]])
    written = {text.get_position(): text.get_text() for text in drawn[0].axes[0].texts}  # by (x, y)
    assert written == {(0, 0): '3', (1, 0): '1', (1, 1): '2'}


@pytest.mark.parametrize('change, message', [
    (lambda model: torch.nn.init.constant_(model.fc.bias, float('nan')), 'gives logits that are not finite'),
    (lambda model: model.reset_classifier(5), 'has 5 outputs and the set has a label [5-9]'),
])
def test_outputs_that_mean_nothing_are_refused(change, message):
    model = timm.create_model('rn20')
    change(model)
    runner = TorchRunner(model, torch.device('cpu'), torch.float32)
    config = DataConfig((3, 32, 32), (0.5,) * 3, (0.2,) * 3)
    dataset = decode(open_dataset('sample', 'test[:40]'), config)
    with pytest.raises(InputError, match=message):
        measure(runner, InMemoryLoader(dataset, config, 8, torch.device('cpu')), False, 15)


def test_set_of_other_classes_is_refused(tmp_path):
    for name in ('ant', 'bee'):
        (tmp_path / 'test' / name).mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(tmp_path / 'test' / name / '0.png')
    with pytest.raises(InputError, match='has 10 classes and .* has 2'):
        main(['rn26_tm', '--dataset', str(tmp_path), '--split', 'test', '--device', 'cpu'])


def test_set_of_the_same_classes_in_another_order_is_refused(tmp_path):
    for name in CIFAR10_LABELS:
        (tmp_path / 'test' / name).mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(tmp_path / 'test' / name / '0.png')
    model = timm.create_model('rn20')
    names = [*CIFAR10_LABELS[1:], CIFAR10_LABELS[0]]
    save_weights(tmp_path / 'w.safetensors', model.state_dict(), dict(model='rn20', num_classes=10, label_names=names))
    flags = ['--dataset', str(tmp_path), '--split', 'test', '--device', 'cpu']
    with pytest.raises(InputError, match="in another order .class 0 is 'automobile' in the one and 'airplane'"):
        main([str(tmp_path / 'w.safetensors'), *flags])
    assert main(['rn26_tm', *flags])['images'] == 10


def test_command_prints_json_and_exits_with_2(forks):
    script = ROOT / 'train' / 'evaluate.py'
    assert json.loads(forks.run(script, 'rn26_tm', *FLAGS).stdout)['images'] == 37
    run = forks.run(script, 'nothing')
    assert run.returncode == 2 and run.stderr.splitlines()[-1].startswith('error: nothing is not a model')
