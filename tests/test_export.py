"""ONNX files give what PyTorch gives, say how to use themselves, and keep their name only if they do."""
import copy
import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed
from PIL import Image

import export.parity
from export import other_runtimes, runtime
from export.__main__ import main
from export.check import check_file
from export.images import add_image_options, load_images, name_set
from export.load import load
from export.metadata import describe_model, replace_with_sidecar
from export.onnx import OnnxOptions, create_onnx, export_onnx
from export.tensorrt import read_onnx
from timm_tmblock import Explainer, explain
from timm_tmblock.checkpoint import load_model, save_weights
from timm_tmblock.errors import InputError
from timm_tmblock.explanation import forward_class_activation
from timm_tmblock.files import writing
from train.analysis.regions import normalize

ROOT = Path(__file__).parent.parent
LABELS = ['ant', 'bee', 'cat', 'dog', 'eel', 'fox']
FEW = ['--calibration-images', '64', '--check-images', '80']


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
    main(['onnx', 'rn26_tm', '--checkpoint', str(weights), '--output', str(plain), *FEW])
    main(['onnx', str(weights), '--output', str(patches), '--patch-logits', *FEW])
    return model, weights, plain, patches


@pytest.fixture(scope='module')
def pretrained():
    return timm.create_model('rn26_tm', pretrained=True).eval()


def open_session(path):
    return onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])


@pytest.mark.parametrize('batch_size', [1, 2, 7, 13])
def test_outputs_equal_pytorch_at_any_batch_size(exported, batch_size):
    model, _, plain, patches = exported
    x = torch.randn(batch_size, 3, 32, 32)
    with torch.no_grad():
        logits, patch_logits = (y.numpy() for y in model.forward_patch_logits(x))
    got, got_patches = open_session(patches).run(['logits', 'patch_logits'], {'image': x.numpy()})
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max())
    np.testing.assert_allclose(got_patches, patch_logits, rtol=1e-4, atol=1e-4 * np.abs(patch_logits).max())
    np.testing.assert_allclose(open_session(plain).run(None, {'image': x.numpy()})[0], got, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('name, kwargs', [
    ('rn20_tm', {}), ('rn20_tm', dict(maximizer='softmax')), ('rn26', {}), ('rn38_tm', {}),
    ('wrn16_tm', dict(num_classes=3, num_templates=7)),
    ('dn100_tm_cat', {}), ('dn100_tm', dict(layers=(2, 2, 2, 2))), ('dn100', dict(layers=(2, 2, 2, 2))),
    ('rn26_tm.mini_imagenet', {}), ('rn26_tm', dict(in_chans=1, global_pool='max')),
    ('rn26_tm', dict(global_pool='avgmax')), ('wrn16', dict(global_pool='catavgmax')),
    ('rn26_tm', dict(patch_size=3)), ('rn26_tm', dict(num_templates=200)),
])
def test_every_network_exports(trained_like, tmp_path, images, name, kwargs):
    model = trained_like(name, **kwargs)
    options = OnnxOptions(patch_logits=model.has_template_matching)
    metadata = export_onnx(model, tmp_path / 'x.onnx', options, images(model, 64, 9))
    x = torch.randn(3, model.in_chans, *model.pretrained_cfg['input_size'][1:])
    with torch.no_grad():
        expected = model.forward_patch_logits(x) if model.has_template_matching else [model(x)]
    outputs = open_session(tmp_path / 'x.onnx').run(None, {'image': x.numpy()})
    assert len(outputs) == len(expected) == len(metadata['outputs'])
    for got, y, described in zip(outputs, expected, metadata['outputs']):
        np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-4 * y.abs().max().item())
        assert described['shape'] == ['batch', *y.shape[1:]]
    if model.has_template_matching:
        assert len(metadata['template_names']) == model.tm.num_templates
        # onnxruntime's CUDA provider leaves out what one side has more than the other
        half = model.patch_size // 2
        pools = [n for n in onnx.load(tmp_path / 'x.onnx').graph.node if n.op_type == 'AveragePool']
        assert [half] * 4 in [{a.name: list(a.ints) for a in pool.attribute}.get('pads') for pool in pools]


def test_patch_logits_leave_nothing_behind_when_left_out(exported):
    _, _, plain, patches = exported
    assert [o.name for o in open_session(plain).get_outputs()] == ['logits']
    assert [o.name for o in open_session(patches).get_outputs()] == ['logits', 'patch_logits']
    graph = onnx.load(plain).graph
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used
    # one matching convolution, with its norm folded in, against the same and the norm
    operators, more = ([n.op_type for n in onnx.load(p).graph.node] for p in (plain, patches))
    assert operators.count('BatchNormalization') == more.count('BatchNormalization') - 1
    assert b'patch' not in plain.read_bytes().replace(b'tm.patch_mean.', b'')  # the layer that all need


def test_file_alone_is_enough_to_classify(exported):
    """By onnxruntime, numpy and Pillow, from the properties in the file."""
    _, weights, _, patches = exported
    session = open_session(patches)
    metadata = session.get_modelmeta().custom_metadata_map
    preprocessing, described = json.loads(metadata['preprocessing']), json.loads(metadata['input'])
    assert (described['layout'], described['range'], described['dtype']) == ('NCHW', 'normalized', 'float32')
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)

    _, height, width = preprocessing['input_size']
    side = int(height / preprocessing['crop_pct'])
    image = Image.fromarray(pixels)
    image = image.resize((side, side * 50 // 40), Image.Resampling[preprocessing['interpolation'].upper()])
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    image = image.crop((left, top, left + width, top + height))
    x = (np.asarray(image) / 255. - preprocessing['mean']) / preprocessing['std']
    logits, patch_logits = session.run(None, {described['name']: x.transpose(2, 0, 1)[None].astype(np.float32)})

    expected = explain(weights, pixels)
    p = np.exp(logits[0] - logits[0].max())
    np.testing.assert_allclose(p / p.sum(), expected.probabilities, atol=1e-5)
    names = json.loads(metadata['class_names'])
    assert names == LABELS and names[p.argmax()] == expected.top(1)[0][0]
    outputs = json.loads(metadata['outputs'])
    assert [o['meaning'] for o in outputs] == ['class scores', 'patch scores'] and outputs[1]['stride'] == 4
    assert json.loads(metadata['template_names'])[patch_logits[0, :, 3, 5].argmax()] == LABELS[
        expected.patch_classes[3, 5]]


def test_sidecar_says_what_the_file_says(exported):
    _, weights, _, patches = exported
    sidecar = json.loads(patches.with_name('patches.onnx.json').read_text())
    assert sidecar.pop('file_sha256') == hashlib.sha256(patches.read_bytes()).hexdigest()
    assert sidecar.pop('file_bytes') == patches.stat().st_size
    properties = {p.key: p.value for p in onnx.load(patches).metadata_props}
    assert set(properties) == set(sidecar)
    for key, value in sidecar.items():
        assert properties[key] == (value if isinstance(value, str) else json.dumps(value)), key
    assert set(sidecar) == {
        'metadata_version', 'model', 'weights_sha256', 'versions', 'license', 'class_names', 'template_names', 'input',
        'preprocessing', 'outputs', 'opset', 'precision', 'quantization', 'parity'}
    tensors = {k: v.contiguous() for k, v in load_model(weights).state_dict().items()}
    assert sidecar['weights_sha256'] == hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()
    assert all(f'{key}:' in runtime.__doc__ for key in sidecar)
    assert onnx.load(patches).ir_version == 8  # the least of opset 18
    assert sidecar['parity']['outputs']['logits']['same_class'] == 1
    assert sidecar['parity']['batch_sizes'] == [1, 2, 7, 64] and 'top1' not in sidecar['parity']  # of other classes


def test_file_is_deterministic_and_tells_nothing_of_this_machine(exported, pretrained, tmp_path, write_unchecked):
    _, weights, plain, _ = exported
    again = [sys.executable, '-m', 'export', 'onnx', str(weights), '--output', str(tmp_path / 'again.onnx'), *FEW]
    subprocess.run(again, cwd=ROOT, env={**os.environ, 'PYTHONHASHSEED': '1'}, check=True)  # sets have another order
    assert (tmp_path / 'again.onnx').read_bytes() == plain.read_bytes()
    for name in 'ab':
        write_unchecked(pretrained, tmp_path / f'{name}.onnx', OnnxOptions('int8', patch_logits=True))
    assert (tmp_path / 'a.onnx').read_bytes() == (tmp_path / 'b.onnx').read_bytes()
    for path in (plain, tmp_path / 'a.onnx'):
        for trace in (b'site-packages', b'.py"', str(Path.cwd()).encode(), b'stack_trace', b'/tmp/'):
            assert trace not in path.read_bytes()


def test_graph_holds_folded_norms_and_no_training_operator(exported):
    proto = onnx.load(exported[3])
    operators = [n.op_type for n in proto.graph.node]
    assert set(operators) == {
        'Conv', 'Relu', 'Add', 'BatchNormalization', 'AveragePool', 'Slice', 'GlobalAveragePool', 'Gemm', 'Reshape'}
    assert operators.count('AveragePool') == operators.count('Slice') == 1
    assert proto.producer_name == 'timm-tmblock'  # of PyTorch's files OpenCV takes averages to count the padding
    assert not next(n for n in proto.graph.node if n.op_type == 'Reshape').attribute  # onnx2torch takes no allowzero
    # 8 residual blocks of 3 convolutions, 4 projections, stem, and matching, values and shortcut of the block
    assert operators.count('Conv') == 8 * 3 + 4 + 1 + 3
    # what follows an addition: the last norm, the first norms of all blocks but the very first, and the block's
    assert operators.count('BatchNormalization') == 7 + 1 + 1


def test_report_on_other_runtimes_is_written_where_it_is_asked_for_alone(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(other_runtimes, 'RUNTIMES', {})
    committed = ROOT / 'export' / 'results' / 'other_runtimes.md'
    before = committed.read_bytes()
    for flags in ([], ['--output', str(tmp_path / 'x')]):
        monkeypatch.setattr(sys, 'argv', ['other_runtimes.py', str(exported[3]), *flags])
        other_runtimes.main()
        assert '| file | runtime |' in capsys.readouterr().out and committed.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {'x.json', 'x.md'}


def test_target_is_of_int8_alone(tmp_path):
    with pytest.raises(InputError, match='--target applies to int8 files only; add --precision int8'):
        main(['onnx', 'rn26_tm', '--output', str(tmp_path / 'x.onnx'), '--precision', 'fp16', '--target', 'tensorrt'])


def test_other_runtimes_are_compared_with_onnxruntime(exported, monkeypatch):
    by_runtime = {row['runtime'].partition(' ')[0]: row for row in other_runtimes.compare(exported[3])}
    for output in ('logits', 'patch_logits'):
        assert by_runtime['onnx.reference'][output]['max_relative_difference'] < 1e-5
        assert by_runtime['onnx.reference'][output]['same_class'] == 1

    def open_twice(path, names):
        session = onnxruntime.InferenceSession(path)
        return lambda x: [(2 if len(x) == 1 else 1) * y for y in session.run(names, {'image': x})]  # one by one

    monkeypatch.setattr(other_runtimes, 'RUNTIMES', dict(
        twice=('onnx', open_twice), broken=('onnx', lambda path, names: {}['x']), missing=('no_such_module', None)))
    twice, broken = other_runtimes.compare(exported[3])
    assert twice['logits']['max_relative_difference'] == pytest.approx(1, abs=1e-5)
    assert broken['error'] == "'x'" and "| refused: 'x' | | | |" in other_runtimes.render([twice, broken], 'x')


@pytest.mark.parametrize('layout', ['NHWC', 'NCHW'])
def test_preprocessing_and_softmax_inside_the_graph(exported, tmp_path, images, layout):
    _, weights, _, _ = exported
    model = load_model(weights)
    options = OnnxOptions(patch_logits=True, softmax=True, preprocessing=layout)
    metadata = export_onnx(model, tmp_path / 'x.onnx', options, images(model))
    assert (metadata['input']['dtype'], metadata['input']['range']) == ('uint8', 'pixels')
    shape = ['batch', 3, 32, 32] if layout == 'NCHW' else ['batch', 32, 32, 3]
    assert metadata['input']['shape'] == shape and metadata['input']['layout'] == layout
    pixels = np.random.default_rng(0).integers(0, 256, (7, *shape[1:]), dtype=np.uint8)
    p, patch_p = open_session(tmp_path / 'x.onnx').run(['probabilities', 'patch_probabilities'], {'image': pixels})
    x = torch.from_numpy(pixels if layout == 'NCHW' else pixels.transpose(0, 3, 1, 2)).double() / 255
    x = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        logits, patch_logits = model.double().forward_patch_logits(x)
    np.testing.assert_allclose(p, logits.softmax(1), atol=1e-5)
    np.testing.assert_allclose(patch_p, patch_logits.softmax(1), atol=1e-5)


def test_dynamic_height_and_width(trained_like, tmp_path, images):
    model = trained_like('rn26_tm')
    options = OnnxOptions(patch_logits=True, dynamic_size=True)
    export_onnx(model, tmp_path / 'x.onnx', options, images(model, 64, 9))
    session = open_session(tmp_path / 'x.onnx')
    for shape in ((1, 3, 32, 32), (3, 3, 64, 64), (2, 3, 33, 47)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = model.forward_patch_logits(x)
        for got, y in zip(session.run(None, {'image': x.numpy()}), expected, strict=True):
            np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-4 * y.abs().max().item())


def test_file_that_is_right_at_one_size_alone_is_found_by_the_check(trained_like, tmp_path, images, write_unchecked):
    model = trained_like('rn26_tm')
    path = tmp_path / 'x.onnx'
    write_unchecked(model, path, OnnxOptions(dynamic_size=True))
    assert check_file(path, model, images(model, 64, 9))[1] is None
    proto = onnx.load(path)
    fixed = onnx.load(path)
    make_dim_param_fixed(fixed.graph, 'batch', 3)
    onnx.save(fixed, tmp_path / 'fixed.onnx')
    report, failure = check_file(tmp_path / 'fixed.onnx', model, images(model, 64, 9))
    assert failure is None and report['batch_sizes'] == [3]
    last = next(node for node in proto.graph.node if 'logits' in node.output)
    last.output[0] = 'right'
    make = onnx.helper.make_node
    proto.graph.node.extend([  # times height / 32
        make('Shape', ['image'], ['shape'], start=2, end=3), make('Cast', ['shape'], ['height'], to=1),
        make('Div', ['height', 'nominal'], ['ratio']), make('Mul', ['right', 'ratio'], ['logits'])])
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([32]), 'nominal'))
    onnx.save(proto, path)
    assert 'logits differs from PyTorch' in str(check_file(path, model, images(model, 64, 9))[1])


@pytest.mark.parametrize('precision, target, opset, bytes_per_weight', [
    ('fp16', 'cpu', 18, 2), ('bf16', 'cpu', 22, 2), ('int8', 'cpu', 18, 1), ('int8', 'tensorrt', 18, 1)])
def test_precisions_keep_their_limits_and_size(
        pretrained, tmp_path, images, precision, target, opset, bytes_per_weight):
    path = tmp_path / 'x.onnx'
    options = OnnxOptions(precision, target, patch_logits=True)
    metadata = export_onnx(pretrained, path, options, images(pretrained, 128, 200))
    parameters = sum(p.numel() for p in pretrained.parameters())
    assert parameters * bytes_per_weight < path.stat().st_size < parameters * bytes_per_weight * 1.2
    proto = onnx.load(path)
    assert [o.version for o in proto.opset_import if not o.domain] == [opset]
    assert metadata['precision'] == precision and metadata['opset'] == opset
    parity = metadata['parity']
    assert parity['images'] == 200 and parity['outputs']['logits']['same_class'] >= 0.98  # 4 of 200
    assert parity['top1']['exported'] >= parity['top1']['pytorch'] - 1
    if precision == 'int8':
        assert metadata['quantization']['target'] == target and metadata['quantization']['images'] == 128
        assert metadata['quantization']['images_of'] == 'sample train' and parity['images_of'] == 'sample test'
        zero_points = [
            onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.endswith('zero_point')]
        kinds = {str(z.dtype) for z in zero_points}
        made = {name: node.op_type for node in proto.graph.node for name in node.output}
        assert made['patch_logits'] in ('AveragePool', 'Slice')  # not of 8 bits, of which two regions may have the same
        if target == 'tensorrt':  # which takes neither another zero point nor a bias in int32
            assert kinds == {'int8'} and not any(z.any() for z in zero_points)
            assert len(metadata['quantization']['float_nodes']) == 3  # the first convolution, and two that read it
            rounded = [made.get(n.input[0]) for n in proto.graph.node if n.op_type == 'QuantizeLinear']
            assert 'Conv' not in rounded and rounded.count('Relu') >= 20  # fused with its convolution
        else:
            assert {'uint8', 'int8'} <= kinds
            scores = next(n for n in proto.graph.node if 'logits' in n.output)
            assert scores.op_type == 'Gemm'  # not of 8 bits, of which two classes may have the same
        assert sum(n.op_type == 'QuantizeLinear' for n in proto.graph.node) >= 25
    else:
        halves = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
        assert sum(t.data_type in halves for t in proto.graph.initializer) > 60
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert all(o.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for o in proto.graph.output)


def test_file_is_checked_again_by_command(exported, images, tmp_path, capsys, monkeypatch):
    _, weights, plain, patches = exported
    for path in (plain, patches):
        main(['check', str(path), str(weights), *FEW])
        assert 'logits: differs from PyTorch by at most' in capsys.readouterr().out
    with pytest.raises(InputError, match='was exported from rn26_tm with other weights; name those with --checkpoint'):
        main(['check', str(plain), 'rn26_tm', *FEW])
    other = load(str(weights))
    other.pretrained_cfg['label_names'] = other.pretrained_cfg['label_names'][::-1]
    with pytest.raises(InputError, match='was exported with other class names than the model has now; export it again'):
        check_file(plain, other, images(other))
    proto = onnx.load(plain)
    bias = next(t for t in proto.graph.initializer if t.name == 'model.fc.bias')
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(1), bias.name))
    onnx.save(proto, tmp_path / 'changed.onnx')
    with pytest.raises(export.parity.ParityError, match='logits differs from PyTorch'):
        main(['check', str(tmp_path / 'changed.onnx'), str(weights), *FEW])


@pytest.mark.parametrize('batch_size', [1, 3])
def test_batch_that_another_tool_fixed_is_the_files(exported, tmp_path, capsys, batch_size):
    _, weights, plain, _ = exported
    proto = onnx.load(plain)
    make_dim_param_fixed(proto.graph, 'batch', batch_size)
    path = tmp_path / 'fixed.onnx'
    onnx.save(proto, path)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    found, expected = (runtime.load(file, 'cpu')(pixels) for file in (path, plain))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.probabilities, b.probabilities, rtol=1e-4, atol=1e-4)
    main(['check', str(path), str(weights), *FEW])
    assert 'logits: differs from PyTorch by at most' in capsys.readouterr().out
    with pytest.raises(InputError, match='fixed.onnx takes only one batch size; export it with a dynamic batch'):
        main(['triton', str(path), '--output', str(tmp_path / 'repository')])


@pytest.mark.parametrize('name', ['N', ''])
def test_batch_that_another_tool_called_otherwise_is_dynamic(exported, tmp_path, name):
    _, _, plain, _ = exported
    proto = onnx.load(plain)
    for tensor in (*proto.graph.input, *proto.graph.output):
        dim = tensor.type.tensor_type.shape.dim[0]
        dim.Clear()
        if name:
            dim.dim_param = name
    onnx.save(proto, tmp_path / 'other.onnx')
    main(['triton', str(tmp_path / 'other.onnx'), '--output', str(tmp_path / 'repository')])
    expected = tmp_path / 'expected'
    main(['triton', str(plain), '--output', str(expected), '--name', 'other'])
    config = Path('other') / 'config.pbtxt'
    assert (tmp_path / 'repository' / config).read_text() == (expected / config).read_text()


def test_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / 'x.onnx').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3955164\n')
    for call in (lambda: runtime.load(tmp_path / 'x.onnx', 'cpu'), lambda: read_onnx(tmp_path / 'x.onnx', 25),
                 lambda: main(['check', str(tmp_path / 'x.onnx'), 'rn26_tm', *FEW])):
        with pytest.raises(runtime.RuntimeInputError, match='x.onnx is a Git LFS pointer, not the file itself'):
            call()


@pytest.mark.parametrize('layout', ['NCHW', 'NHWC'])
def test_pixels_are_normalised_in_floating_point_before_8_bits(pretrained, images, layout):
    options = OnnxOptions('int8', preprocessing=layout)
    graph = create_onnx(pretrained, options, images(pretrained, 64, 64))[0].graph
    readers = {name: [node for node in graph.node if name in node.input] for node in graph.node for name in node.input}
    tensors, seen = [graph.input[0].name], set()
    while tensors:
        for node in readers[tensors.pop()]:
            seen.add(node.op_type)
            if node.op_type != 'Conv':
                tensors += node.output
    assert 'Conv' in seen and not {'QuantizeLinear', 'DequantizeLinear'} & seen


def test_probabilities_of_int8_are_not_in_steps_of_8_bits(pretrained, tmp_path, images):
    path = tmp_path / 'x.onnx'
    export_onnx(pretrained, path, OnnxOptions('int8', softmax=True, patch_logits=True), images(pretrained, 64, 64))
    batch = np.random.default_rng(0).normal(size=(7, 3, 32, 32)).astype(np.float32)
    for p in onnxruntime.InferenceSession(path).run(None, {'image': batch}):
        np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-5)
        assert np.abs(p * 255 - (p * 255).round()).max() > 0.1


def test_writers_of_one_file_leave_a_file_and_its_own_sidecar(tmp_path):
    path, errors = tmp_path / 'x.onnx', []

    def work(n):
        try:
            for i in range(20):
                with writing(path, unique=True) as tmp:
                    tmp.write_bytes(bytes([n, i]) * 5000)
                    replace_with_sidecar(tmp, path, dict(writer=n))
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=[n]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sidecar = json.loads((tmp_path / 'x.onnx.json').read_text())
    assert not errors and sidecar['file_sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sidecar['writer'] == path.read_bytes()[0] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('key', ['precision', 'weights_sha256', 'class_names'])
def test_metadata_that_are_not_whole_are_one_sentence(exported, tmp_path, key):
    proto = onnx.load(exported[3])
    kept = [p for p in proto.metadata_props if p.key != key]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    onnx.save(proto, tmp_path / 'x.onnx')
    for command in (['triton', str(tmp_path / 'x.onnx'), '--output', str(tmp_path / 'r')],
                    ['check', str(tmp_path / 'x.onnx'), 'rn26_tm', *FEW]):
        with pytest.raises(InputError, match=f'x.onnx lacks a part of its metadata, {key}; export it'):
            main(command)


def test_full_disk_is_one_sentence_and_leaves_nothing(pretrained, tmp_path, images, monkeypatch):
    def write_bytes(self, data):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', write_bytes)
    with pytest.raises(InputError, match='Cannot write .*x.onnx: the disk is full, free some space'):
        export_onnx(pretrained, tmp_path / 'x.onnx', OnnxOptions(), images(pretrained, 64, 9))
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_at_the_sidecar_leaves_the_pair_of_before(pretrained, tmp_path, images, monkeypatch):
    export_onnx(pretrained, tmp_path / 'x.onnx', OnnxOptions(), images(pretrained, 64, 9))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real = Path.write_text

    def write_text(self, *args, **kwargs):
        if '.onnx.json' in self.name:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, 'write_text', write_text)
    with pytest.raises(InputError, match='Cannot write .*x.onnx.json: the disk is full, .* already there are intact'):
        export_onnx(pretrained, tmp_path / 'x.onnx', OnnxOptions(patch_logits=True), images(pretrained, 64, 9))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before and len(before) == 2


def test_perturbed_maximizers_do_not_export_and_say_why(trained_like, tmp_path, images):
    model = trained_like('rn20_tm', maximizer='perturbed')
    with pytest.raises(InputError, match='600 random samples in each forward pass, so no ONNX file can repeat'):
        export_onnx(model, tmp_path / 'perturbed.onnx', OnnxOptions(), images(model))
    assert list(tmp_path.iterdir()) == []


def test_network_that_squashes_images_is_exported_so(images, tmp_path):
    model = timm.create_model('rn20_tm', pretrained_cfg_overlay=dict(crop_mode='squash')).eval()
    export_onnx(model, tmp_path / 'x.onnx', OnnxOptions(patch_logits=True), images(model))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    got, expected = runtime.load(tmp_path / 'x.onnx', 'cpu')(picture), explain(model, picture)
    np.testing.assert_allclose(got.probabilities, expected.probabilities, atol=1e-5)
    np.testing.assert_allclose(explain(tmp_path / 'x.onnx', picture).probabilities, expected.probabilities, atol=1e-5)


def test_network_whose_images_have_borders_is_refused(images, tmp_path):
    model = timm.create_model('rn20', pretrained_cfg_overlay=dict(crop_mode='border')).eval()
    with pytest.raises(InputError, match="takes images by crop_mode 'border', and an exported file adds no borders"):
        export_onnx(model, tmp_path / 'x.onnx', OnnxOptions(), images(model))
    assert list(tmp_path.iterdir()) == []


def test_network_of_other_channels_than_images_have_is_refused(images, tmp_path):
    model = timm.create_model('rn20', in_chans=4).eval()
    with pytest.raises(InputError, match='The network takes 4 channels; images have 1 or 3'):
        images(model)
    with pytest.raises(InputError, match='The network takes 4 channels; images have 1 or 3'):
        describe_model(model, dict(timm.data.resolve_model_data_config(model), input_size=(4, 32, 32)))


def test_names_of_the_classes_before_are_not_those_of_a_new_classifier(images, tmp_path, write_unchecked):
    model = timm.create_model('rn26_tm', pretrained=True, num_classes=5).eval()
    write_unchecked(model, tmp_path / 'x.onnx', OnnxOptions(patch_logits=True))
    about = json.loads((tmp_path / 'x.onnx.json').read_text())
    assert about['class_names'] == [f'class {i}' for i in range(5)] and len(about['template_names']) == 10
    ship = ROOT / 'train' / 'sample' / 'images' / 'ship.png'
    prediction, explanation = runtime.load(tmp_path / 'x.onnx', 'cpu')(ship), explain(tmp_path / 'x.onnx', ship)
    assert prediction.label == explanation.top(1)[0][0] and prediction.label.startswith('class ')


def test_classes_in_another_order_are_noticed(pretrained, tmp_path):
    parser = ArgumentParser()
    add_image_options(parser)
    model = timm.create_model('rn26_tm', pretrained=True).eval()
    model.pretrained_cfg = dict(model.pretrained_cfg, label_names=model.pretrained_cfg['label_names'][::-1])
    with pytest.raises(InputError, match='The network and sample have classes in another order'):
        load_images(parser.parse_args(['--check-images', '8']), model, calibrate=False)


def test_file_that_fails_is_kept_under_another_name(exported, tmp_path, monkeypatch):
    _, weights, _, _ = exported
    limits = dict(export.parity.LIMITS, fp32=export.parity.Limits(1e-12, 1., 1., 0., 1., 1.))
    monkeypatch.setattr(export.parity, 'LIMITS', limits)
    (tmp_path / 'x.onnx').write_bytes(b'of before')
    message = r'logits differs .*, worst for image \d+ of sample test.* is kept as .*x\.failed\.onnx\.'
    with pytest.raises(InputError, match=message):
        main(['onnx', str(weights), '--output', str(tmp_path / 'x.onnx'), *FEW])
    assert sorted(p.name for p in tmp_path.iterdir()) == ['x.failed.onnx', 'x.failed.onnx.json', 'x.onnx']
    assert (tmp_path / 'x.onnx').read_bytes() == b'of before'
    parity = json.loads((tmp_path / 'x.failed.onnx.json').read_text())['parity']
    assert parity['outputs']['logits'] and 'at most' in parity['failed']
    (tmp_path / 'x.failed.onnx').rename(tmp_path / 'renamed.onnx')
    for command in ('triton', 'tensorrt'):
        if command == 'triton' or runtime.import_library('tensorrt_rtx'):
            with pytest.raises(InputError, match=r'renamed.onnx failed its comparison with PyTorch \('):
                main([command, str(tmp_path / 'renamed.onnx'), '--output', str(tmp_path / 'y.engine')])


def test_model_is_left_as_it_was(pretrained, images):
    before = {k: v.clone() for k, v in pretrained.state_dict().items()}
    create_onnx(pretrained, OnnxOptions('fp16'), images(pretrained))
    after = pretrained.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.dtype == torch.float32 for p in pretrained.parameters())


def test_folder_loads_and_weights_that_are_missing_or_damaged_are_one_sentence(pretrained, tmp_path):
    timm.models.save_for_hf(pretrained, tmp_path, model_config=dict(num_classes=10), safe_serialization=True)
    model = load(f'local-dir:{tmp_path}')
    assert all(torch.equal(a, b) for a, b in zip(pretrained.state_dict().values(), model.state_dict().values()))
    weights = tmp_path / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match='local-dir:.* is not a model with pretrained weights'):
        load(f'local-dir:{tmp_path}')
    with pytest.raises(InputError, match='hf-hub:nobody/nothing is not a model with pretrained weights') as error:
        load('hf-hub:nobody/nothing')
    assert '\n' not in str(error.value)


@pytest.fixture(scope='module')
def bad_files(exported, tmp_path_factory):
    """Weights, some of which are no good for what they are named for, and a set of other classes."""
    folder, (_, weights, _, _) = tmp_path_factory.mktemp('bad'), exported
    truncated, other, baseline = (folder / f'{n}.safetensors' for n in ('truncated', 'other', 'baseline'))
    truncated.write_bytes(weights.read_bytes()[:100_000])
    save_weights(other, timm.create_model('test_resnet').state_dict(), {})
    save_weights(baseline, timm.create_model('rn26').state_dict(), {})
    for name in ('ant', 'bee'):
        (folder / 'set' / 'test' / name).mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(folder / 'set' / 'test' / name / '0.png')
    return dict(WEIGHTS=weights, TRUNCATED=truncated, OTHER=other, BASELINE=baseline, FOLDER=folder / 'set')


@pytest.mark.parametrize('arguments, message', [
    (['nothing', '--output', 'x.onnx'], 'nothing'),
    (['rn20', '--output', 'x.onnx'], 'No pretrained weights'),
    (['test_resnet.r160_in1k', '--output', 'x.onnx'], 'test_resnet'),
    (['rn26_tm', '--output', 'x.onnx', '--checkpoint', 'missing.safetensors'], 'There is no checkpoint'),
    (['rn26', '--output', 'x.onnx', '--checkpoint', 'WEIGHTS'], 'weights of rn26_tm, not of rn26'),
    (['rn26_tm', '--output', 'x.onnx', '--checkpoint', 'OTHER'], 'does not hold weights of rn26_tm'),
    (['rn26_tm', '--output', 'x.onnx', '--checkpoint', 'TRUNCATED'], 'not a whole safetensors file'),
    (['rn26', '--output', 'x.onnx', '--checkpoint', 'BASELINE', '--patch-logits'], 'no template matching block'),
    (['rn26_tm', '--output', 'x.onnx', '--method', 'cam'], '--method only applies with --patch-logits'),
    (['rn26_tm', '--output', 'x.onnx', '--checkpoint', 'WEIGHTS', '--opset', '13'], 'must be 18 to 25'),
    (['rn26_tm', '--output', 'x.onnx', '--opset', '18', '--precision', 'bf16'], 'from opset 22'),
    (['rn26_tm', '--output', 'x.onnx', '--opset', '0'], 'must be 18 to 25'),
    (['test_resnet', '--output', 'x.onnx', '--checkpoint', 'OTHER'], 'not a network of this project'),
    (['rn26_tm', '--output', 'x.onnx', '--opset', '22', '--precision', 'int8'], 'opsets up to 20'),
    (['rn26_tm', '--output', '.', '--checkpoint', 'WEIGHTS'], 'is a folder'),
    (['rn26_tm', '--output', 'x.pb', '--checkpoint', 'WEIGHTS'], 'must end in .onnx'),
    (['rn26_tm', '--output', '/proc/none/x.onnx', '--checkpoint', 'WEIGHTS'], 'Cannot write'),
    (['rn26_tm', '--output', 'x.onnx', '--precision', 'int8', '--calibration-split', 'test[:9]'], 'in common; name'),
    (['rn26_tm', '--output', 'x.onnx', '--precision', 'int8', '--calibration-split', 'no'], "split 'no'"),
    (['rn26_tm', '--output', 'x.onnx', '--check-images', '0'], 'must be at least 1'),
    (['rn26_tm', '--output', 'x.onnx', '--dataset', 'FOLDER'], 'has 2 classes and the network 10'),
])
def test_bad_input_is_one_sentence_and_leaves_no_file(bad_files, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        main(['onnx', *(str(bad_files.get(a, a)) for a in arguments)])
    assert '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_images_of_another_set_are_named_without_their_place(pretrained, images, tmp_path):
    for split, color in (('train', 'red'), ('test', 'blue')):
        for k in range(10):
            (tmp_path / 'birds' / split / f'bird{k}').mkdir(parents=True)
            Image.new('RGB', (40, 50), color).save(tmp_path / 'birds' / split / f'bird{k}' / '0.png')
    assert name_set('hfds/uoft-cs/cifar10') == 'uoft-cs/cifar10' and name_set('torch/cifar10') == 'cifar10'
    assert name_set(f'hfids/{tmp_path}/away') == name_set(f'wds/{tmp_path}/away') == 'away'
    given = images(pretrained, 9, 5, '--dataset', str(tmp_path / 'birds'))
    assert (given.source, given.calibration_source) == ('birds test', 'birds train') and given.targets is None
    assert given.calibration.shape == (9, 3, 32, 32) and given.held_out.shape == (5, 3, 32, 32)
    assert (given.calibration[:, 0] == 255).all() and (given.held_out[:, 2] == 255).all()
    assert given.name(3) == 'image 6 of birds test'  # of 10, each second one


def test_unreadable_image_is_named_by_its_number_in_the_split(pretrained, images, tmp_path):
    for split, color in (('train', 'red'), ('test', 'blue')):
        for k in range(10):
            (tmp_path / 'birds' / split / f'bird{k}').mkdir(parents=True)
            Image.new('RGB', (32, 32), color).save(tmp_path / 'birds' / split / f'bird{k}' / '0.png')
    (tmp_path / 'birds' / 'test' / 'bird6' / '0.png').write_bytes(b'none')
    with pytest.raises(InputError, match='Image 6 of the dataset cannot be read'):
        images(pretrained, 1, 5, '--dataset', str(tmp_path / 'birds'))


def test_network_of_timm_that_has_a_fuse_of_its_own_is_refused(tmp_path):
    path = tmp_path / 'weights.safetensors'
    network = timm.create_model('iformer_t')
    assert hasattr(network, 'fuse')
    save_weights(path, network.state_dict(), dict(model='iformer_t', num_classes=1000))
    with pytest.raises(InputError, match='is not a network of this project'):
        load(str(path))


@pytest.mark.parametrize('name, precision, softmax', [
    ('rn26', 'fp32', True), ('rn26_tm', 'fp16', False), ('rn26_tm', 'int8', False), ('dn100_tm', 'fp32', False)])
def test_class_activation_maps_take_the_place_of_patch_logits(
        trained_like, images, tmp_path, name, precision, softmax):
    pretrained = name.startswith('rn26')
    model = timm.create_model(name, pretrained=True).eval() if pretrained else trained_like(
        name, num_templates=3, layers=(2, 2, 2, 2))
    path = tmp_path / 'x.onnx'
    options = OnnxOptions(precision, patch_logits=True, method='cam', softmax=softmax)
    seen = images(model, 64, 80)
    metadata = export_onnx(model, path, options, seen)
    described = metadata['outputs'][1]
    assert (described['method'], described['stride'], described['shape'][1:]) == ('cam', 4, [10, 8, 8])
    assert metadata['template_names'] == metadata['class_names']
    session = open_session(path)
    tolerance = {'fp32': 1e-4, 'fp16': 1e-2, 'int8': 0.2}[precision]
    for n in (1, 2, 7):
        x = normalize(model, torch.from_numpy(seen.held_out[:n]))
        with torch.no_grad():
            expected = forward_class_activation(copy.deepcopy(model).double(), x.double())
        for got, y in zip(session.run(None, {'image': x.numpy()}), expected, strict=True):
            y = y.softmax(1).numpy() if softmax else y.numpy()
            np.testing.assert_allclose(got, y, rtol=0, atol=tolerance * np.abs(y).max())
            assert precision == 'fp16' or len(np.unique(got)) > 0.9 * got.size  # more than 8 bits have
    assert check_file(path, model, seen)[1] is None
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    prediction = runtime.load(path, 'cpu')(image)
    x = normalize(model, torch.from_numpy(image).permute(2, 0, 1)[None])
    maps = torch.from_numpy(session.run(None, {'image': x.numpy()})[1][0])
    expected = maps if softmax else maps.clip(min=0) / maps.max()
    np.testing.assert_allclose([prediction.evidence(i) for i in range(10)], expected, atol=1e-3)
    if not softmax:
        image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        by_file, by_network = explain(path, image), explain(model, image, 'cam')
        assert by_file.method == 'cam' and list(by_file.template_names) == list(by_network.template_names)
        if precision != 'int8':
            name = by_file.class_names[3]
            np.testing.assert_allclose(by_file.heat_map(name), by_network.heat_map(name), atol=2 * tolerance)
            np.testing.assert_allclose(by_file.patch_probabilities, by_network.patch_probabilities, atol=2 * tolerance)
        with pytest.raises(InputError, match="with --method cam; export it again with --method match"):
            explain(path, image, 'match')


def test_int8_of_other_classes_is_not_calibrated_on_the_sample(tmp_path):
    weights = tmp_path / 'best.safetensors'
    model = timm.create_model('rn26_tm', num_classes=2)
    save_weights(weights, model.state_dict(), dict(model='rn26_tm', num_classes=2, label_names=['ant', 'bee']))
    for network in ('rn26_tm.cifar100', str(weights)):
        with pytest.raises(InputError, match='the sample is of CIFAR-10; name yours with --dataset, or leave int8 out'):
            main(['onnx', network, '--output', str(tmp_path / 'x.onnx'), '--precision', 'int8'])
    assert not list(tmp_path.glob('x.*'))


def test_int8_without_calibration_images_is_refused(pretrained, images):
    none = images(pretrained)
    create_onnx(pretrained, OnnxOptions('int8'), replace(none, held_out=none.held_out[:0]))  # which is for the check
    none.calibration = none.calibration[:0]
    with pytest.raises(InputError, match='int8 needs calibration images; name a set with --dataset'):
        create_onnx(pretrained, OnnxOptions('int8'), none)


def test_command_exits_with_2_and_one_line(forks):
    run = forks.run('-m', 'export', 'onnx', 'nothing', '--output', 'x.onnx')
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


def test_flags_of_the_command_are_options_of_the_file(tmp_path):
    flags = ['--patch-logits', '--softmax', '--preprocessing', 'NHWC', '--dynamic-size', '--opset', '19']
    main(['onnx', 'rn26_tm', '--output', str(tmp_path / 'x.onnx'), *flags, *FEW])
    about = json.loads((tmp_path / 'x.onnx.json').read_text())
    assert [o['name'] for o in about['outputs']] == ['probabilities', 'patch_probabilities'] and about['opset'] == 19
    assert (about['input']['layout'], about['input']['range']) == ('NHWC', 'pixels')
    assert [type(n) for n in about['input']['shape']] == [str, str, str, int]
