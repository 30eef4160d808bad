"""Engines built by the real TensorRT-RTX, which needs no GPU; what needs one is in test_tensorrt_simulated.py."""
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import onnx
import pytest
import simulated_tensorrt
import timm
from conftest import can_build_rtx
from onnx import TensorProto, helper

import export.runtime as runtime
import export.tensorrt
import export.tensorrt_matrix as matrix
import export.tensorrt_names as names
from export.__main__ import main
from export.metadata import REQUIRED
from export.onnx import OnnxOptions
from export.tensorrt import EngineOptions, ParseError, ProfileError, build_engine, rebuild_engine
from timm_tmblock.errors import InputError

ROOT = Path(__file__).parent.parent
real = pytest.mark.skipif(
    not importlib.util.find_spec('tensorrt_rtx') or not can_build_rtx(),
    reason='pip install tensorrt-rtx, which takes no GPU before Ampere')


@pytest.fixture(scope='module')
def files(write_unchecked, tmp_path_factory):
    """ONNX files of the pretrained network."""
    folder = tmp_path_factory.mktemp('files')
    model = timm.create_model('rn26_tm', pretrained=True).eval()
    for name, options in dict(
            patches=OnnxOptions(patch_logits=True),
            pixels=OnnxOptions(softmax=True, preprocessing='NHWC'),
            dynamic=OnnxOptions(dynamic_size=True),
            cpu=OnnxOptions('int8'),
            quantized=OnnxOptions('int8', 'tensorrt', preprocessing='NCHW'),
    ).items():
        write_unchecked(model, folder / f'{name}.onnx', options)
    return folder


def build_real(source, path, **options):
    return build_engine(source, path, EngineOptions(backend='tensorrt_rtx', **options))


# The real builder

@real
@pytest.mark.parametrize('cell', matrix.cover(), ids=lambda c: f'{c.model}-{c.precision}-{c.size}-{c.patches}')
def test_builder_takes_every_network(cell, tmp_path, monkeypatch):
    is_dense = cell.model.startswith('dn100')
    if is_dense:  # of two layers a stage, which have all the operators of sixteen; the committed table is of sixteen
        monkeypatch.setattr(timm, 'create_model', partial(timm.create_model, layers=(2, 2, 2, 2)))
    result = matrix.build(cell, tmp_path, {})
    assert result['megabytes'] > (0.2 if is_dense else 1)


def test_covering_part_has_every_value_and_the_whole_is_committed():
    cells, everything = matrix.cover(), list(matrix.iterate_cells())
    assert len(everything) == len(set(everything)) == 17 * 2 * 4 * 2 and set(cells) <= set(everything)
    assert {(c.model, c.patches) for c in cells} == {(c.model, c.patches) for c in everything}
    for pair in (('precision', 'size'), ('precision', 'batch'), ('size', 'batch')):
        assert len({tuple(getattr(c, k) for k in pair) for c in cells}) == len(
            {tuple(getattr(c, k) for k in pair) for c in everything}), pair
    committed = json.loads((ROOT / 'export' / 'results' / 'tensorrt_matrix.json').read_text())
    keys = matrix.Cell.__dataclass_fields__
    assert {tuple(row[k] for k in keys) for row in committed['rows']} == {
        tuple(getattr(c, k) for k in keys) for c in everything}
    assert not [row for row in committed['rows'] if 'error' in row]


@pytest.mark.parametrize('options', [
    EngineOptions(),
    EngineOptions(
        backend='tensorrt', batches=((1, 2, 8), (8, 16, 32)), size=(16, 32, 64), tf32=True, optimization_level=5,
        workspace=700, timing_cache=False, version_compatible=True, hardware_compatibility='ampere+')])
def test_flags_of_the_command_are_the_options_of_the_engine(monkeypatch, options):
    asked = []

    def build(*arguments):
        asked.append(arguments)
        raise InputError('that is enough')

    monkeypatch.setattr(export.tensorrt, 'build_engine', build)
    with pytest.raises(InputError, match='that is enough'):
        main(['tensorrt', 'x.onnx', '--output', 'x.engine', *options.to_flags()])
    assert asked == [(Path('x.onnx'), Path('x.engine'), options, None)]


@real
@pytest.mark.parametrize('name, options', [
    ('patches', {}), ('pixels', dict(batches=((4, 4, 4),))), ('quantized', dict(tf32=True, optimization_level=0)),
    ('dynamic', dict(size=(32, 32, 96), batches=((1, 1, 1), (1, 8, 32)))),
])
def test_engine_and_sidecar(files, tmp_path, name, options):
    path = tmp_path / 'x.engine'
    metadata = build_real(files / f'{name}.onnx', path, **options)
    source = json.loads((files / f'{name}.onnx.json').read_text())
    sidecar = json.loads((tmp_path / 'x.engine.json').read_text())
    assert sidecar['file_sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    engine = sidecar.pop('engine')
    own = {key: source[key] for key in ('file_sha256', 'file_bytes')}
    assert sidecar['file_bytes'] == path.stat().st_size
    assert {**sidecar, **own} == source  # all that is known of the ONNX file
    assert engine['onnx_sha256'] == source['file_sha256'] and engine['backend'] == 'tensorrt_rtx'
    assert all(f'engine.{key}' in export.tensorrt.__doc__ for key in engine)
    batches = options.get('batches', EngineOptions.batches)
    assert [[shape[0] for shape in profile] for profile in engine['profiles']] == [list(b) for b in batches]
    if name == 'dynamic':
        assert engine['profiles'][1][2] == [32, 3, 96, 96]
    assert path.read_bytes()[:4] == b'vtrt'  # the plan alone, as TensorRT begins it
    assert metadata['model'] == 'rn26_tm'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['x.engine', 'x.engine.json']


@real
def test_command_in_the_sidecar_builds_the_same_engine(files, tmp_path):
    for name in ('dynamic.onnx', 'dynamic.onnx.json'):
        shutil.copy(files / name, tmp_path)
    flags = ['--size', '32', '48', '96', '--batch', '2', '--batch', '1', '8', '9', '--tf32', '--workspace', '512']
    main(['tensorrt', str(tmp_path / 'dynamic.onnx'), '--output', str(tmp_path / 'x.engine'), *flags])
    engine = json.loads((tmp_path / 'x.engine.json').read_text())['engine']
    size = (tmp_path / 'x.engine').stat().st_size
    (tmp_path / 'x.engine').unlink()
    command = [sys.executable, *engine['command'].split()[1:]]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)}, check=True, capture_output=True)
    assert abs((tmp_path / 'x.engine').stat().st_size - size) < 0.01 * size  # TensorRT numbers its nodes as they come
    again = json.loads((tmp_path / 'x.engine.json').read_text())['engine']
    assert {**again, 'build_seconds': 0} == {**engine, 'build_seconds': 0}
    assert engine['profiles'][1] == [[1, 3, 32, 32], [8, 3, 48, 48], [9, 3, 96, 96]] and engine['options']['tf32']


@real
def test_engine_in_another_folder_than_its_onnx_file_is_built_again(files, tmp_path):
    (tmp_path / 'onnx').mkdir()
    shutil.copy(files / 'patches.onnx', tmp_path / 'onnx' / 'a.onnx')
    path = tmp_path / 'engines' / 'x.engine'
    engine = build_real(tmp_path / 'onnx' / 'a.onnx', path)['engine']
    assert engine['onnx'] == '../onnx/a.onnx' and 'tensorrt ../onnx/a.onnx --output x.engine' in engine['command']
    path.unlink()
    rebuild_engine(path)
    assert path.is_file()


@real
def test_model_is_exported_and_built_at_once(tmp_path):
    few = ['--batch', '8', '--check-images', '20']
    main(['tensorrt', 'rn26_tm', '--output', str(tmp_path / 'x.plan'), '--patch-logits', *few])
    metadata = json.loads((tmp_path / 'x.plan.json').read_text())
    assert metadata['precision'] == 'fp16' and metadata['engine']['onnx'] == 'x.plan.onnx'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['x.plan', 'x.plan.json', 'x.plan.onnx', 'x.plan.onnx.json']


def test_what_a_file_settles_is_refused_beside_it(files, tmp_path):
    for flags in (['--precision', 'fp16'], ['--patch-logits'], ['--checkpoint', 'x.safetensors'], ['--softmax'],
                  ['--dataset', 'nowhere'], ['--check-images', '3']):
        with pytest.raises(InputError, match=f'^{flags[0]} is for a MODEL: .*patches.onnx was exported and checked'):
            main(['tensorrt', str(files / 'patches.onnx'), '--output', str(tmp_path / 'x.engine'), *flags])
    assert list(tmp_path.iterdir()) == []


@real
def test_interrupt_ends_the_build_and_leaves_nothing(files, tmp_path, monkeypatch):
    class Bar(export.tensorrt.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            signal.raise_signal(signal.SIGINT)  # Ctrl-C while TensorRT calls back

    monkeypatch.setattr(export.tensorrt, 'tqdm', Bar)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_real(files / 'patches.onnx', tmp_path / 'x.engine')
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGINT) is before


DESCRIBED = dict(
    metadata_version=2, class_names=list('abcd'), input=dict(
        name='x', dtype='float32', layout='NCHW', shape=['n', 4], range='normalized'),
    outputs=[dict(name='y', dtype='float32', shape=['n', 4], meaning='class scores')],
    preprocessing=dict(
        input_size=[3, 32, 32], color='RGB', interpolation='bicubic', crop_pct=1., mean=[0.5] * 3, std=[0.2] * 3))


def write_onnx(path, nodes, opset=18, domain='', properties=None):
    source = dict.fromkeys(REQUIRED, 'null') | {key: json.dumps(value) for key, value in DESCRIBED.items()}
    graph = helper.make_graph(
        nodes, 'g', [helper.make_tensor_value_info('x', TensorProto.FLOAT, ['n', 4])],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, ['n', 4])])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid('', opset), helper.make_opsetid('own', 1)])
    helper.set_model_props(proto, source if properties is None else properties)
    onnx.save(proto, path)
    return path


@real
def test_foreign_operator_is_named_with_its_node(tmp_path):
    node = helper.make_node('FancyOp', ['x'], ['y'], name='the_node', domain='own')
    with pytest.raises(ParseError, match="does not take node 'the_node', operator FancyOp: .+; export") as error:
        build_real(write_onnx(tmp_path / 'x.onnx', [node]), tmp_path / 'x.engine')
    assert '\n' not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ['x.onnx']


@real
def test_int8_for_a_cpu_is_refused_before_and_by_the_parser(files, tmp_path):
    with pytest.raises(InputError, match='int8 for a CPU.*--precision int8 --target tensorrt'):
        build_real(files / 'cpu.onnx', tmp_path / 'x.engine')
    proto = onnx.load(files / 'cpu.onnx')  # somebody else's, which does not say so
    for p in proto.metadata_props:
        p.value = 'null' if p.key == 'quantization' else p.value
    onnx.save(proto, tmp_path / 'x.onnx')
    with pytest.raises(ParseError, match='operator (De)?[qQ]uantizeLinear'):
        build_real(tmp_path / 'x.onnx', tmp_path / 'x.engine')


@real
@pytest.mark.parametrize('name, options, message', [
    ('patches', dict(batches=((4, 2, 8),)), '--batch 4 2 8 must rise'),
    ('patches', dict(batches=((0, 1, 1),)), 'from 1 on'),
    ('patches', dict(batches=((1, 2, 2 ** 31),)), 'below 2.31'),
    ('patches', dict(size=(32, 32, 32)), 'Height and width of the file are fixed; leave out --size'),
    ('dynamic', {}, 'name their range with --size MIN OPT MAX'),
    ('dynamic', dict(size=(64, 32, 96)), '--size 64 32 96 must rise'),
    ('dynamic', dict(size=(48, 64, 96)), 'This network takes images of 32×32, which --size 48 ... 96 leaves out'),
    ('patches', dict(version_compatible=True), 'leave out --version-compatible'),
    ('patches', dict(workspace=-1), '--workspace must be at least 1 MB'),
    ('patches', dict(hardware_compatibility='ampere+'), 'leave out .*--hardware-compatibility'),
    ('missing', {}, 'There is no file .*missing.onnx'),
    ('truncated', {}, 'is cut short or not an ONNX file'),
    ('future', {}, 'has opset 99, this TensorRT reads 9 to 24'),
    ('foreign', {}, 'does not say its classes and preprocessing'),
])
def test_what_cannot_be_built_is_one_sentence(files, tmp_path, name, options, message):
    source = tmp_path / f'{name}.onnx'
    if (files / f'{name}.onnx').exists():
        shutil.copy(files / f'{name}.onnx', source)
    elif name == 'truncated':
        source.write_bytes((files / 'patches.onnx').read_bytes()[:100_000])
    elif name != 'missing':
        node = helper.make_node('Relu', ['x'], ['y'])
        write_onnx(source, [node], 99 if name == 'future' else 18, properties={} if name == 'foreign' else None)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as error:
        build_real(source, tmp_path / 'x.engine', **options)
    assert '\n' not in str(error.value) and sorted(tmp_path.iterdir()) == before


@real
def test_too_little_memory_is_one_sentence(files, tmp_path):
    with pytest.raises(InputError, match='cannot build the engine: .*(OutOfMemory|workspace limit)') as error:
        build_real(files / 'patches.onnx', tmp_path / 'x.engine', workspace=1)
    assert '\n' not in str(error.value) and list(tmp_path.iterdir()) == []


@real
def test_profile_that_a_fixed_batch_does_not_have(files, tmp_path):
    proto = onnx.load(files / 'patches.onnx')
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / 'x.onnx')
    with pytest.raises(ProfileError, match='takes only batches of 4; use --batch 4'):
        build_real(tmp_path / 'x.onnx', tmp_path / 'x.engine')
    assert build_real(tmp_path / 'x.onnx', tmp_path / 'x.engine', batches=((4, 4, 4),))['engine']['profiles'] == [
        [[4, 3, 32, 32]] * 3]


@real
def test_unwritable_or_missing_place_is_one_sentence(files, tmp_path):
    with pytest.raises(InputError, match='is a folder; name the file'):
        build_real(files / 'patches.onnx', tmp_path)
    shutil.copy(files / 'patches.onnx', tmp_path / 'x.onnx')
    with pytest.raises(InputError, match='x.onnx must end in .engine or .plan'):
        build_real(tmp_path / 'x.onnx', tmp_path / 'x.onnx')
    with pytest.raises(InputError, match='--batch 4 2 8 must rise'):  # before anything is exported
        main(['tensorrt', 'rn26_tm', '--output', str(tmp_path / 'x.engine'), '--batch', '4', '2', '8'])
    for flags, message in (
            (['--dynamic-size'], 'needs a range of sizes: --size MIN OPT MAX'),
            (['--size', '32', '32', '64'], '--size is for dynamic height and width; add --dynamic-size'),
            ([] if runtime.query_gpu() else ['--layers', 'x.json'], 'describes layers on a GPU')):
        if flags:
            with pytest.raises(InputError, match=message):
                main(['tensorrt', 'rn26_tm', '--output', str(tmp_path / 'x.engine'), *flags])
    assert [p.name for p in tmp_path.iterdir()] == ['x.onnx']
    with pytest.raises(InputError, match='Cannot write /proc/none/x.engine'):
        build_real(files / 'patches.onnx', Path('/proc/none/x.engine'))


@real
def test_engine_without_a_gpu_is_one_sentence(files, tmp_path):
    if runtime.query_gpu():
        pytest.skip('there is a GPU')
    build_real(files / 'patches.onnx', tmp_path / 'x.engine')
    for rebuild in (False, True):
        with pytest.raises(runtime.RuntimeInputError, match='run on NVIDIA GPUs and there is none here; use the ONNX'):
            runtime.load(tmp_path / 'x.engine', rebuild=rebuild)
    with pytest.raises(InputError, match='describes layers on a GPU'):
        build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions(), layers=tmp_path / 'layers.json')
    run = subprocess.run(
        [sys.executable, ROOT / 'export' / 'runtime.py', 'run', tmp_path / 'x.engine', ROOT / 'train/sample/images'],
        capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith('error: TensorRT engines run on NVIDIA GPUs')


def test_missing_and_old_tensorrt_are_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorrt', None)
    with pytest.raises(runtime.RuntimeInputError, match='tensorrt is not installed'):
        runtime.import_tensorrt('tensorrt')
    for version in ('8.6.1', '9.3.0'):
        old = simulated_tensorrt.create_module('10.0', full_version=version)
        monkeypatch.setitem(sys.modules, 'tensorrt', old)
        with pytest.raises(runtime.RuntimeInputError, match=f'TensorRT {version} is too old: it misreads'):
            runtime.import_tensorrt()


# Names

def test_table_has_every_name_the_sources_use():
    table = json.loads((ROOT / 'export' / 'results' / 'tensorrt_names.json').read_text())
    assert list(table['names']) == names.find_names(), 'run python export/tensorrt_names.py'
    assert set(table['versions']) == set(names.BINDINGS) and len(table['names']) > 50
    assert not [n for n, has in table['names'].items() if n not in names.GUARDED and not all(has.values())]
    assert names.RESULT.with_suffix('.md').read_text() == names.to_markdown(table)


@real
def test_installed_module_is_as_in_the_table():
    import tensorrt_rtx
    if not tensorrt_rtx.__version__.startswith('1.7'):
        pytest.skip('the table is of 1.7')
    table = json.loads((ROOT / 'export' / 'results' / 'tensorrt_names.json').read_text())
    assert {n: names.has_name(tensorrt_rtx, n) for n in table['names']} == {
        n: has['RTX 1.7'] for n, has in table['names'].items()}
