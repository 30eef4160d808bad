"""ONNX files give what PyTorch gives, say how to use themselves, and exist only if they do."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch

import export.onnx
from export.__main__ import main
from timm_tmblock import Explainer, explain
from timm_tmblock.checkpoint import save_weights
from timm_tmblock.errors import InputError

LABELS = ['ant', 'bee', 'cat', 'dog', 'eel', 'fox']


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A trained-like network, its weight file, and its ONNX files without and with patch logits."""
    from conftest import make_trained_like
    folder = tmp_path_factory.mktemp('export')
    torch.manual_seed(0)
    model = make_trained_like(timm.create_model('rn26_tm', num_classes=6)).eval()
    weights = folder / 'weights.safetensors'
    save_weights(weights, model.state_dict(), dict(
        model='rn26_tm', num_classes=6, label_names=LABELS, input_size=(3, 32, 32), mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4), interpolation='bilinear', crop_pct=1.0))
    plain, patches = folder / 'plain.onnx', folder / 'patches.onnx'
    main(['onnx', 'rn26_tm', '--checkpoint', str(weights), '--output', str(plain)])
    main(['onnx', 'rn26_tm', '--checkpoint', str(weights), '--output', str(patches), '--patch-logits'])
    return model, weights, plain, patches


@pytest.mark.parametrize('batch_size', [1, 2, 7, 13])
def test_outputs_equal_pytorch_at_any_batch_size(exported, batch_size):
    model, _, plain, patches = exported
    x = torch.randn(batch_size, 3, 32, 32)
    with torch.no_grad():
        logits, patch_logits = (y.numpy() for y in model.forward_patch_logits(x))
    got, got_patches = onnxruntime.InferenceSession(patches).run(['logits', 'patch_logits'], {'image': x.numpy()})
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max())
    np.testing.assert_allclose(got_patches, patch_logits, rtol=1e-4, atol=1e-4 * np.abs(patch_logits).max())
    np.testing.assert_allclose(
        onnxruntime.InferenceSession(plain).run(None, {'image': x.numpy()})[0], got, rtol=1e-5, atol=1e-4)


def test_patch_logits_are_absent_by_default(exported):
    _, _, plain, patches = exported
    assert [o.name for o in onnxruntime.InferenceSession(plain).get_outputs()] == ['logits']
    assert [o.name for o in onnxruntime.InferenceSession(patches).get_outputs()] == ['logits', 'patch_logits']


def test_metadata_is_enough_to_prepare_an_image(exported):
    _, weights, _, patches = exported
    session = onnxruntime.InferenceSession(patches)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata['class_names']) == LABELS
    assert metadata['model'] == 'rn26_tm' and metadata['patch_stride'] == '4'
    config = json.loads(metadata['preprocessing'])
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    x = (image / 255. - config['mean']) / config['std']
    x = x.transpose(2, 0, 1)[None].astype(np.float32)
    logits = session.run(['logits'], {'image': x})[0][0]
    expected = explain(weights, image).probabilities
    np.testing.assert_allclose(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum(), expected, atol=1e-5)


def test_file_is_deterministic_and_tells_nothing_of_this_machine(exported, tmp_path):
    _, weights, plain, _ = exported
    main(['onnx', 'rn26_tm', '--checkpoint', str(weights), '--output', str(tmp_path / 'again.onnx')])
    assert (tmp_path / 'again.onnx').read_bytes() == plain.read_bytes()
    for trace in (b'site-packages', b'.py', str(Path.cwd()).encode()):
        assert trace not in plain.read_bytes()


def test_graph_holds_the_convolutions_and_no_training_operator(exported):
    operators = [n.op_type for n in onnx.load(exported[2]).graph.node]
    assert 'Dropout' not in operators and operators.count('Conv') == 1 + 4 * 7 + 3


def test_soft_maximizers_export(trained_like, tmp_path):
    model = trained_like('rn20_tm', maximizer='softmax')
    export.onnx.export_onnx(model, tmp_path / 'soft.onnx', patch_logits=True)
    session = onnxruntime.InferenceSession(tmp_path / 'soft.onnx')
    for batch_size in (1, 2, 7):
        x = torch.randn(batch_size, 3, 32, 32)
        with torch.no_grad():
            outputs = model.forward_patch_logits(x)
        for got, expected in zip(session.run(None, {'image': x.numpy()}), outputs):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_perturbed_maximizers_do_not_export_and_say_why(trained_like, tmp_path):
    model = trained_like('rn20_tm', maximizer='perturbed')
    with pytest.raises(InputError, match='600 random samples in each forward pass, so no ONNX file can repeat'):
        export.onnx.export_onnx(model, tmp_path / 'perturbed.onnx')
    assert list(tmp_path.iterdir()) == []


def test_difference_from_pytorch_leaves_no_file(exported, tmp_path, monkeypatch):
    _, weights, _, _ = exported
    monkeypatch.setattr(export.onnx, 'TOLERANCE', 1e-12)
    with pytest.raises(InputError, match='differ from PyTorch'):
        main(['onnx', 'rn26_tm', '--checkpoint', str(weights), '--output', str(tmp_path / 'x.onnx')])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('arguments, message', [
    (['nothing', '--output', 'x.onnx'], 'nothing'),
    (['rn26', '--output', 'x.onnx'], 'No pretrained weights'),
    (['rn26_tm', '--output', 'x.onnx', '--checkpoint', 'missing.safetensors'], 'There is no checkpoint'),
    (['rn26', '--output', 'x.onnx', '--checkpoint', 'WEIGHTS'], 'weights of rn26_tm, not of rn26'),
    (['rn26_tm', '--output', 'x.onnx', '--checkpoint', 'OTHER'], 'does not hold weights of rn26_tm'),
    (['rn26_tm', '--output', 'x.onnx', '--checkpoint', 'TRUNCATED'], 'not a whole safetensors file'),
    (['rn26', '--output', 'x.onnx', '--checkpoint', 'BASELINE', '--patch-logits'], 'no template matching block'),
    (['rn26_tm', '--output', 'x.onnx', '--checkpoint', 'WEIGHTS', '--opset', '13'], 'opset 13'),
    (['rn26_tm', '--output', '.', '--checkpoint', 'WEIGHTS'], 'is a folder'),
    (['rn26_tm', '--output', '/proc/none/x.onnx', '--checkpoint', 'WEIGHTS'], 'Cannot write'),
])
def test_bad_input_is_one_sentence_and_leaves_no_file(exported, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    _, weights, _, _ = exported
    truncated, other, baseline = (tmp_path / f'{n}.safetensors' for n in ('truncated', 'other', 'baseline'))
    truncated.write_bytes(weights.read_bytes()[:100_000])
    save_weights(other, timm.create_model('test_resnet').state_dict(), {})
    save_weights(baseline, timm.create_model('rn26').state_dict(), {})
    files = dict(WEIGHTS=weights, TRUNCATED=truncated, OTHER=other, BASELINE=baseline)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as error:
        main(['onnx', *(str(files.get(a, a)) for a in arguments)])
    assert '\n' not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_command_exits_with_2_and_one_line():
    run = subprocess.run(
        [sys.executable, '-m', 'export', 'onnx', 'nothing', '--output', 'x.onnx'], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith('error: ') and run.stderr.count('\n') == 1


def test_explanations_from_onnx_and_from_pytorch_agree(exported):
    _, weights, _, patches = exported
    image = np.random.default_rng(1).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    a, b = Explainer(weights)(image), Explainer(patches)(image)
    np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-5)
    np.testing.assert_allclose(a.patch_probabilities, b.patch_probabilities, atol=1e-5)
    assert a.template_names == b.template_names == LABELS


def test_onnx_file_without_patch_logits_cannot_explain(exported):
    with pytest.raises(InputError, match='--patch-logits'):
        Explainer(exported[2])
