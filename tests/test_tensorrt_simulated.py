"""Engines run, found and rebuilt against a stand-in for TensorRT and a GPU; what is said of GPUs here is simulated."""
import fnmatch
import gc
import json
import re
import shlex
import shutil
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import simulated_tensorrt
import timm

import export.check
import export.runtime as runtime
import export.tensorrt
from export.__main__ import main
from export.bench import open_file
from export.check import check_file
from export.onnx import OnnxOptions
from export.tensorrt import EngineOptions, build_engine, rebuild_engine
from timm_tmblock.errors import InputError
from train import evaluate

ROOT = Path(__file__).parent.parent
GPU = dict(name='NVIDIA L4', compute_capability='8.9', cuda_driver='13.0')


@pytest.fixture(scope='module')
def files(write_unchecked, tmp_path_factory):
    """ONNX files of the pretrained network."""
    folder = tmp_path_factory.mktemp('files')
    model = timm.create_model('rn26_tm', pretrained=True).eval()
    write_unchecked(model, folder / 'patches.onnx', OnnxOptions(patch_logits=True))
    write_unchecked(model, folder / 'pixels.onnx', OnnxOptions(softmax=True, preprocessing='NHWC'))
    gc.collect()
    gc.freeze()  # what the exporter has imported, or each test below would look at all of it again
    return folder


@pytest.fixture(params=['10.0', '10.16', '11.0', '11.4', 'RTX 1.7'])
def simulated(request, monkeypatch, tmp_path):
    """What the stand-in was told, on a machine that seems to have a GPU."""
    log = {}
    name = 'tensorrt_rtx' if 'RTX' in request.param else 'tensorrt'
    module = simulated_tensorrt.create_module(request.param, name, log=log)
    monkeypatch.setitem(sys.modules, 'tensorrt', None)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, 'cuda.bindings.runtime', simulated_tensorrt.Cuda)
    for place in (runtime, export.tensorrt):
        monkeypatch.setattr(place, 'query_gpu', lambda: dict(GPU))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    gc.collect()  # sessions of tests before
    simulated_tensorrt.Cuda.reset()
    return dict(log=log, module=module, version=request.param, backend=name)


# for what is ours, not TensorRT's
each_package = pytest.mark.parametrize('simulated', ['11.4', 'RTX 1.7'], indirect=True)
one_version = pytest.mark.parametrize('simulated', ['11.4'], indirect=True)


def test_simulated_build_tells_every_version_the_same(simulated, files, tmp_path):
    log = simulated['log']
    options = EngineOptions(batches=((1, 2, 4), (1, 8, 16)), workspace=64, optimization_level=5)
    metadata = build_engine(files / 'patches.onnx', tmp_path / 'x.engine', options, layers=tmp_path / 'layers.json')
    assert log['network_flags'] == (2 if simulated['version'].startswith('10') else 1)  # strongly typed
    assert log['flags'] == set() and log['workspace'] == 64 << 20 and len(log['profiles']) == 2
    assert log['settings'].builder_optimization_level == 5
    assert json.loads((tmp_path / 'layers.json').read_text()) == {'Layers': []}
    caches = list((tmp_path / 'cache').rglob('*.cache'))
    if simulated['backend'] == 'tensorrt':
        assert metadata['engine']['gpu'] == GPU
        assert [c.name for c in caches] == [f'timing-{simulated["module"].__version__}-NVIDIA-L4-8.9.cache']
        assert log['cache_before'] == b'' and caches[0].read_bytes() == b'+'
        build_engine(files / 'patches.onnx', tmp_path / 'x.engine', options)
        assert log['cache_before'] == b'+' and caches[0].read_bytes() == b'++'
        build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions(tf32=True, version_compatible=True))
        assert log['flags'] == {'TF32', 'VERSION_COMPATIBLE'}
        same = EngineOptions(hardware_compatibility='same-cc')
        if simulated['version'] == '10.0':
            with pytest.raises(InputError, match='has no --hardware-compatibility same-cc; use ampere'):
                build_engine(files / 'patches.onnx', tmp_path / 'x.engine', same)
        else:
            build_engine(files / 'patches.onnx', tmp_path / 'x.engine', same)
            assert log['settings'].hardware_compatibility_level == 'SAME_COMPUTE_CAPABILITY'
    else:
        assert metadata['engine']['gpu'] is None and caches == []


@each_package
def test_what_cannot_start_is_one_sentence(simulated, files, tmp_path, monkeypatch):
    def refuse(logger):
        logger.log(logger.WARNING, 'CUDA initialization failure with error: 35')
        raise TypeError('pybind11::init(): factory function returned nullptr')

    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions())
    for kind in ('Builder', 'Runtime'):
        monkeypatch.setattr(simulated['module'], kind, refuse, raising=False)
    for work in (lambda: runtime.load(tmp_path / 'x.engine'), lambda: build_engine(
            files / 'patches.onnx', tmp_path / 'y.engine', EngineOptions())):
        with pytest.raises(runtime.RuntimeInputError, match='cannot start .*with error: 35.*; update the driver'):
            work()
    assert not (tmp_path / 'y.engine').exists()


@each_package
def test_simulated_engine_is_timed(simulated, files, tmp_path):
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions(batches=((1, 2, 3),)))
    contestant = open_file(tmp_path / 'x.engine', 'cuda')
    assert re.fullmatch(r'tensorrt(_rtx)? [\d.]+, x.engine', contestant.name)
    assert [y.shape for y in contestant.call(contestant.make_input(2))] == [(2, 10), (2, 10, 8, 8)]
    for kwargs, message in ((dict(threads=2), 'leave it out for an engine'), (
            dict(allow_fallback=True), 'Engines run only on NVIDIA GPUs')):
        with pytest.raises(runtime.RuntimeInputError, match=message):
            runtime.load(tmp_path / 'x.engine', **kwargs)


@pytest.mark.parametrize('name', ['patches', 'pixels'])
def test_simulated_engine_predicts_as_the_onnx_file(simulated, files, tmp_path, name):
    build_engine(files / f'{name}.onnx', tmp_path / 'x.engine', EngineOptions(batches=((1, 2, 3), (1, 4, 16))))
    runner = runtime.load(tmp_path / 'x.engine')
    expected = runtime.load(files / f'{name}.onnx', 'cpu')
    paths = sorted((ROOT / 'train' / 'sample' / 'images').iterdir())
    for batch_size in (1, 3, 7, 3, 10, 3):  # small profile, large one, and again
        for a, b in zip(runner(paths, batch_size), expected(paths, batch_size), strict=True):
            np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-6)
            if name == 'patches':
                np.testing.assert_allclose(a.patch_probabilities, b.patch_probabilities, atol=1e-6)
    shapes = {1, 3, 8, 16}  # powers of two where the profile has them
    assert {shape[0] for shape in runner.session.bindings} == shapes
    assert simulated['log']['contexts'] == len(shapes)
    if simulated['backend'] == 'tensorrt':
        assert simulated_tensorrt.Cuda.launches > 10  # a graph for each shape, from its second batch on
    else:  # captures by itself
        assert simulated_tensorrt.Cuda.launches == 0 and simulated['log']['runtime_config'].cuda_graph_strategy == 1
    empty = runner.run(runner.to_input(np.zeros((0, 32, 32, 3), dtype=np.uint8)))
    assert [y.shape for y in empty] == [(0, 10), (0, 10, 8, 8)][:1 + (name == 'patches')]
    with pytest.raises(runtime.RuntimeInputError, match=r'takes inputs of \(1, .*\) or .* not \(17, '):
        runner.session.run(runner.to_input(np.zeros((17, 32, 32, 3), dtype=np.uint8)))


def test_simulated_session_is_shared_by_threads_and_frees_what_it_drops(simulated, files, tmp_path):
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions(batches=((1, 2, 16),)))
    session = runtime.TensorRTSession(tmp_path / 'x.engine', max_shapes=2)
    expected = runtime.load(files / 'patches.onnx', 'cpu').session
    wrong = []

    def work(i):
        x = np.random.default_rng(i).normal(size=(1 + i % 5, 3, 32, 32)).astype(np.float32)
        for _ in range(4):
            for a, b in zip(session.run(x), expected.run(x), strict=True):
                if not np.allclose(a, b, atol=1e-5):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(session.bindings) == 2
    cuda = simulated_tensorrt.Cuda
    for memory in ('host', 'device'):
        kept = {a for b in session.bindings.values() for a in getattr(b.memory, memory)}
        assert kept == set(getattr(cuda, memory)) and len(kept) == 2 * 3  # shapes, an input and two outputs
    session.close()
    assert not cuda.count_buffers()


@each_package
def test_simulated_session_captures_nothing_where_one_asks_for_no_graphs(simulated, files, tmp_path):
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions())
    session = runtime.load(tmp_path / 'x.engine', cuda_graphs=False).session
    expected = runtime.load(files / 'patches.onnx', 'cpu').session
    x = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    launched = simulated_tensorrt.Cuda.launches
    for _ in range(3):
        np.testing.assert_allclose(session.run(x)[0], expected.run(x)[0], atol=1e-5)
    assert simulated_tensorrt.Cuda.launches == launched
    settings = simulated['log'].get('runtime_config')
    assert (settings is None) == (simulated['backend'] == 'tensorrt')
    assert settings is None or not hasattr(settings, 'cuda_graph_strategy')


@pytest.mark.parametrize('fails', ['enqueue', 'instantiate'])
def test_simulated_capture_that_fails_leaves_a_session_that_runs(simulated, files, tmp_path, monkeypatch, fails):
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions())
    graphs = []
    monkeypatch.setattr(simulated_tensorrt.Cuda, 'cudaGraphDestroy', lambda graph: graphs.append(graph) or (0,))
    if fails == 'enqueue':
        simulated['log']['refuses_capture'] = True
    else:
        monkeypatch.setattr(simulated_tensorrt.Cuda, 'cudaGraphInstantiate', lambda graph, flags: (2, None))
    session = runtime.TensorRTSession(tmp_path / 'x.engine')
    expected = runtime.load(files / 'patches.onnx', 'cpu').session
    x = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    forgotten = simulated_tensorrt.Cuda.forgotten
    for _ in range(4):
        for a, b in zip(session.run(x), expected.run(x), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert simulated_tensorrt.Cuda.captured is None and simulated_tensorrt.Cuda.launches == 0
    assert simulated_tensorrt.Cuda.forgotten - forgotten == len(graphs)
    assert len(graphs) == (simulated['backend'] == 'tensorrt')  # what was captured, once
    with pytest.raises(runtime.RuntimeInputError, match='The engine takes float32, not float64'):
        session.run(x.astype(np.float64))
    simulated['log']['refuses_shape'] = True
    for _ in range(2):
        with pytest.raises(runtime.RuntimeInputError, match=r'not take inputs of \(4, 3, 32, 32\): .*API Usage Error'):
            session.run(np.zeros((4, 3, 32, 32), dtype=np.float32))
        simulated['log'].pop('refuses_shape', None)
        simulated['log']['refuses_profile'] = True


@each_package
def test_simulated_memory_that_is_short_goes_to_the_batch_that_runs(simulated, files, tmp_path):
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions())
    session = runtime.TensorRTSession(tmp_path / 'x.engine')
    expected = runtime.load(files / 'patches.onnx', 'cpu').session
    simulated['log']['room_for_contexts'] = 2
    for n in (1, 2, 3, 4, 1, 1):
        x = np.random.default_rng(n).normal(size=(n, 3, 32, 32)).astype(np.float32)
        np.testing.assert_allclose(session.run(x)[0], expected.run(x)[0], atol=1e-5)
        assert len(session.bindings) <= 2
    simulated['log']['room_for_contexts'] = 0
    with pytest.raises(runtime.RuntimeInputError, match=r'cannot run inputs of \(5, .*no memory left, use smaller b'):
        session.run(np.zeros((5, 3, 32, 32), dtype=np.float32))
    assert not simulated_tensorrt.Cuda.count_buffers()


@one_version
def test_simulated_engine_that_does_not_load_is_not_built_again_and_says_why(simulated, files, tmp_path, monkeypatch):
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions())
    monkeypatch.setattr(export.tensorrt, 'build_engine', None)
    simulated['log']['refuses_engine'] = True
    with pytest.raises(runtime.RuntimeInputError, match=r'cannot load .*: Cuda Runtime \(out of memory\); look at'):
        runtime.load(tmp_path / 'x.engine', rebuild=True)


def test_simulated_build_beside_a_session_says_its_own_reason(simulated, files, tmp_path):
    """TensorRT goes on with the logger of the session."""
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions())
    session = runtime.load(tmp_path / 'x.engine').session
    simulated['log']['refuses_build'] = True
    with pytest.raises(InputError, match='cannot build the engine: Could not find any implementation for node stem'):
        build_engine(files / 'patches.onnx', tmp_path / 'y.engine', EngineOptions())
    assert session.logger.last.startswith('Could not find')


@one_version
def test_simulated_engine_is_built_on_the_gpu_its_sidecar_names(simulated, files, tmp_path):
    simulated_tensorrt.Cuda.cudaSetDevice(1)
    try:
        build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions())
        assert simulated['log']['built_on'] == 0 and simulated_tensorrt.Cuda.cudaGetDevice()[1] == 1
    finally:
        simulated_tensorrt.Cuda.cudaSetDevice(0)


def test_names_of_the_cuda_runtime_are_there():
    cuda = pytest.importorskip('cuda.bindings.runtime')
    names = set(re.findall(r'(?:cudart|kinds)\.(cuda\w+)', (ROOT / 'export' / 'runtime.py').read_text()))
    assert len(names) > 15
    kinds = (cuda, cuda.cudaMemcpyKind, cuda.cudaStreamCaptureMode)
    assert not [name for name in names if not any(hasattr(kind, name) for kind in kinds)]


@one_version
@pytest.mark.parametrize('options, sizes', [
    (EngineOptions(batches=((8, 8, 8),)), [8]), (EngineOptions(batches=((2, 4, 16),), tf32=True), [2, 7, 16]),
    (EngineOptions(), [1, 2, 7, 64])])
def test_simulated_engine_is_checked_at_the_sizes_it_takes(simulated, files, tmp_path, images, options, sizes):
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', options)
    model = timm.create_model('rn26_tm', pretrained=True).eval()
    report, failure = check_file(tmp_path / 'x.engine', model, images(model, 1, 80))
    assert failure is None and report['batch_sizes'] == sizes and report['images'] >= 80 - sizes[0]
    assert report['outputs']['logits']['same_class'] == 1


@one_version
@pytest.mark.parametrize('tf32', [False, True])
def test_simulated_engine_may_differ_by_10_bits_of_mantissa_with_tf32_alone(
        simulated, files, tmp_path, images, monkeypatch, tf32):
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions(tf32=tf32))
    model = timm.create_model('rn26_tm', pretrained=True).eval()
    session = runtime.load(tmp_path / 'x.engine').session
    rounded = SimpleNamespace(run=lambda x: [y + 2 ** -11 * np.abs(y).max() for y in session.run(x)])
    monkeypatch.setattr(export.check, 'load', lambda *_: SimpleNamespace(session=rounded))
    failure = check_file(tmp_path / 'x.engine', model, images(model, 1, 80))[1]
    assert failure is None if tf32 else 'at most 0.0001 is allowed' in str(failure)


def test_simulated_timing_cache_never_loses_an_engine(simulated, files, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', '/proc/none')
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions())
    assert (tmp_path / 'x.engine').is_file()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    build_engine(files / 'patches.onnx', tmp_path / 'y.engine', EngineOptions(timing_cache=False))
    assert not list(tmp_path.rglob('*.cache'))
    build_engine(files / 'patches.onnx', tmp_path / 'y.engine', EngineOptions())
    if simulated['backend'] == 'tensorrt':
        cache = next(tmp_path.rglob('timing-*.cache'))
        cache.write_bytes(b'of another driver')
        simulated['log']['foreign_caches'].append(b'of another driver')
        build_engine(files / 'patches.onnx', tmp_path / 'z.engine', EngineOptions())
        assert (tmp_path / 'z.engine').is_file() and cache.read_bytes() == b'+'


@one_version
def test_simulated_close_waits_for_the_batch_that_runs(simulated, files, tmp_path, monkeypatch):
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions())
    session = runtime.load(tmp_path / 'x.engine').session
    cuda = simulated_tensorrt.Cuda
    running, go_on, alive = threading.Event(), threading.Event(), []

    def synchronize(stream):
        running.set()
        go_on.wait(30)
        alive.append(cuda.count_buffers())
        return (0,)

    monkeypatch.setattr(cuda, 'cudaStreamSynchronize', synchronize)
    threads = [threading.Thread(target=session.run, args=(np.zeros((1, 3, 32, 32), dtype=np.float32),))]
    threads[0].start()
    assert running.wait(30)
    threads.append(threading.Thread(target=session.close))
    threads[1].start()
    threads[1].join(0.2)
    go_on.set()
    for thread in threads:
        thread.join()
    assert alive == [2 * 3] and not cuda.count_buffers()


@each_package
def test_simulated_batch_runs_in_the_profile_made_for_it(simulated, files, tmp_path):
    options = EngineOptions(batches=((1, 8, 16), (1, 1, 2), (1, 4, 6)))
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', options)
    session = runtime.load(tmp_path / 'x.engine').session
    chosen = {}
    for n in (1, 2, 3, 4, 5, 7, 16):
        session.run(np.zeros((n, 3, 32, 32), dtype=np.float32))
        context = session.bindings[n, 3, 32, 32].context
        chosen[n] = object.__getattribute__(context, '_guard')[0].profile
    assert chosen == {1: 1, 2: 1, 3: 2, 4: 2, 5: 2, 7: 0, 16: 0}


@one_version
def test_simulated_workers_that_begin_at_once_build_an_engine_again_once(simulated, files, tmp_path, monkeypatch):
    path, sidecar = tmp_path / 'x.engine', tmp_path / 'x.engine.json'
    build_engine(files / 'patches.onnx', path, EngineOptions())
    metadata = json.loads(sidecar.read_text())
    metadata['engine']['version'] = '1.0'
    sidecar.write_text(json.dumps(metadata))
    built, labels = [], []
    build = export.tensorrt.build_engine
    monkeypatch.setattr(export.tensorrt, 'build_engine', lambda *args: built.append(args) or build(*args))

    def work():
        labels.append(runtime.load(path, rebuild=True)(ROOT / 'train' / 'sample' / 'images' / 'ship.png').label)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and labels == ['ship'] * 4


@one_version
def test_simulated_engine_of_another_gpu_of_the_same_capability_warns_and_of_another_system_is_refused(
        simulated, files, tmp_path):
    path, sidecar = tmp_path / 'x.engine', tmp_path / 'x.engine.json'
    build_engine(files / 'patches.onnx', path, EngineOptions())
    metadata = json.loads(sidecar.read_text())
    for change, warns in (
            (dict(gpu=RTX), True), (dict(gpu=RTX, hardware_compatibility='same-cc'), False), (dict(gpu=GPU), False)):
        sidecar.write_text(json.dumps(dict(metadata, engine=dict(metadata['engine'], **change))))
        with pytest.warns(match='built on .* and may be slow or fail on NVIDIA L4') if warns else nullcontext():
            runtime.load(path)
    sidecar.write_text(json.dumps(dict(metadata, engine=dict(metadata['engine'], platform='windows amd64'))))
    with pytest.raises(runtime.RuntimeInputError, match='was built on windows amd64, here is '):
        runtime.load(path)


@pytest.mark.parametrize('simulated', ['RTX 1.7'], indirect=True)
def test_simulated_tensorrt_rtx_is_refused_on_a_gpu_before_ampere(simulated, files, tmp_path, monkeypatch):
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions())
    for place in (runtime, export.tensorrt):
        monkeypatch.setattr(place, 'query_gpu', lambda: dict(T4))
    with pytest.raises(runtime.RuntimeInputError, match='was built for Ampere and later, this GPU, .*T4, has'):
        runtime.load(tmp_path / 'x.engine')
    with pytest.raises(InputError, match='TensorRT-RTX engines run on Ampere and later, .*use --backend tensorrt'):
        build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions())


@each_package
@pytest.mark.parametrize('change, message', [
    (dict(version='1.0'), r'was built by tensorrt.* 1.0, here is'),
    (dict(gpu=dict(GPU, compute_capability='7.5', name='T4'), hardware_compatibility='same-cc'), 'for compute'),
    (dict(gpu=dict(GPU, compute_capability='7.5', name='T4')), r'for compute capability 7.5 \(T4\), this GPU, NV'),
])
def test_simulated_mismatch_says_the_reason_and_how_to_build_it(simulated, files, tmp_path, change, message):
    for name in ('patches.onnx', 'patches.onnx.json'):
        shutil.copy(files / name, tmp_path)
    path, sidecar = tmp_path / 'x.engine', tmp_path / 'x.engine.json'
    build_engine(tmp_path / 'patches.onnx', path, EngineOptions(batches=((1, 2, 3),)))
    metadata = json.loads(sidecar.read_text())
    metadata['engine'].update(change)
    sidecar.write_text(json.dumps(metadata))
    command = f'python -m export tensorrt {tmp_path}/patches.onnx --output {path} .*--batch 1 2 3'
    with pytest.raises(runtime.RuntimeInputError, match=f'{message}.*build it again with "{command}'):
        runtime.load(path)
    metadata['engine'].update(version_compatible=True, hardware_compatibility='ampere+')
    sidecar.write_text(json.dumps(metadata))
    runtime.load(path)
    metadata['engine'].update(version_compatible=False, hardware_compatibility='none')
    sidecar.write_text(json.dumps(metadata))
    runner = runtime.load(path, rebuild=True)
    assert runner.metadata['engine']['version'] == simulated['module'].__version__
    assert runner.metadata['engine']['profiles'] == [[[n, 3, 32, 32] for n in (1, 2, 3)]]
    sidecar.write_text(json.dumps(metadata))
    (tmp_path / 'patches.onnx').unlink()
    with pytest.raises(runtime.RuntimeInputError, match='was built from .*patches.onnx, which is gone'):
        runtime.load(path, rebuild=True)


@one_version
def test_simulated_engine_is_measured_as_its_file_is(simulated, files, tmp_path):
    path = tmp_path / 'x.engine'
    metadata = build_engine(files / 'patches.onnx', path, EngineOptions(batches=((1, 8, 16),)))
    assert 'parity' not in metadata and 'parity' not in json.loads(Path(f'{path}.json').read_text())
    flags = ['--split', 'test[:37]', '--batch-size', '16']
    engine, file = evaluate.main([str(path), *flags]), evaluate.main([str(files / 'patches.onnx'), *flags])
    assert (engine['runtime'], engine['hardware']) == ('TensorRT', f'1 x {GPU["name"]}')
    for key in ('images', 'top1', 'top5', 'patch_accuracy', 'ece', 'loss'):
        assert engine[key] == pytest.approx(file[key], rel=1e-5), key


@one_version
def test_commands_of_a_card_build_an_engine_and_run_it(simulated, files, tmp_path, monkeypatch, capsys):
    card = (ROOT / 'hub_cards' / 'rendered' / 'rn26_tm.cifar10.md').read_text()
    download, *commands = re.search(r'With TensorRT, .*?```\n(.*?)```', card, re.DOTALL)[1].splitlines()
    assert download.startswith('hf download ') and download.endswith(' --local-dir net')
    (tmp_path / 'net' / 'onnx').mkdir(parents=True)
    for suffix in ('.onnx', '.onnx.json'):
        shutil.copy(files / f'patches{suffix}', tmp_path / 'net' / 'onnx' / f'model_fp16{suffix}')
    shutil.copy(ROOT / 'train' / 'sample' / 'images' / 'ship.png', tmp_path / 'photo.jpg')
    monkeypatch.chdir(tmp_path)
    for command in commands:
        python, _, module, *arguments = shlex.split(command)
        assert (python, module) == ('python', 'export')
        main(arguments)
    assert 'photo.jpg: ship ' in capsys.readouterr().out


@pytest.fixture
def engines(simulated, files, tmp_path):
    """Makes an engine of a folder that looks like a repository, with changes to its sidecar."""
    (tmp_path / 'onnx').mkdir()
    for name in ('patches.onnx', 'patches.onnx.json'):
        shutil.copy(files / name, tmp_path / 'onnx')

    def make(folder, precision='fp16', **change):
        path = tmp_path / 'engines' / folder / 'x.engine'
        path.parent.mkdir(parents=True)
        build_engine(tmp_path / 'onnx' / 'patches.onnx', path, EngineOptions(batches=((1, 2, 3),)))
        metadata = json.loads(Path(f'{path}.json').read_text())
        metadata['engine'].update(change)
        Path(f'{path}.json').write_text(json.dumps(dict(metadata, precision=precision)))
        return path

    return make


T4, H100, RTX = (
    dict(GPU, compute_capability=cc, name=name) for cc, name in (('7.5', 'T4'), ('9.0', 'H100'), ('8.9', 'RTX 4090')))


@each_package
def test_simulated_folder_gives_the_best_engine_for_the_machine(simulated, engines, tmp_path, monkeypatch, capsys):
    with pytest.raises(runtime.RuntimeInputError, match='holds no engine; build one'):
        runtime.load(tmp_path, engine=True)
    # worst first: what cannot run, then what can, each better than the one before
    engines('a', version='1.0')
    engines('b', gpu=T4)
    engines('z', version='99.0', version_compatible=True)
    with pytest.raises(runtime.RuntimeInputError, match='x.engine was built .*; to build it again, use --rebuild'):
        runtime.load(tmp_path, engine=True)
    for i, (precision, change) in enumerate((
            ('fp16', dict(gpu=H100, hardware_compatibility='ampere+', version='1.0', version_compatible=True)),
            ('fp16', dict(gpu=H100, hardware_compatibility='ampere+')),
            ('fp16', dict(gpu=GPU, version='1.0', version_compatible=True)),
            ('fp32', dict(gpu=GPU)),
            ('fp16', dict(gpu=GPU)))):
        path = engines(f'y{9 - i}', precision, **change)
        assert runtime._find(tmp_path, 'auto', None, engine=True) == path, change
    ship = ROOT / 'train' / 'sample' / 'images' / 'ship.png'
    assert runtime.load(tmp_path, engine=True)(ship).label == 'ship'
    capsys.readouterr()
    main(['run', str(tmp_path), str(ship), '--engine'])
    assert f'{ship}: ship ' in capsys.readouterr().out
    with pytest.raises(runtime.RuntimeInputError, match='revision'):
        main(['run', str(tmp_path), str(ship), '--revision', 'v1'])
    assert runtime.load(tmp_path, 'cpu').session.provider == 'CPUExecutionProvider'  # unless asked, an ONNX file
    with pytest.raises(runtime.RuntimeInputError, match='is not an engine; name one'):
        runtime.load(tmp_path / 'onnx' / 'patches.onnx', engine=True)
    with pytest.raises(runtime.RuntimeInputError, match='patches.onnx is not an engine, and only engines are built'):
        runtime.load(tmp_path, 'cpu', rebuild=True)
    (path.parent / 'x.engine').unlink()  # its sidecar alone is no engine
    assert runtime._find(tmp_path, 'auto', None, engine=True).parent.name == 'y6'
    monkeypatch.setattr(runtime, 'query_gpu', lambda: dict(T4))
    assert runtime._find(tmp_path, 'auto', None, engine=True).parent.name == 'b'  # not those for Ampere and later


@one_version
def test_engine_of_a_tensorrt_that_is_not_here_hides_none_that_can_be_built_again(
        simulated, engines, tmp_path, monkeypatch):
    engines('a', backend='tensorrt_rtx')
    find_library = runtime.import_library
    monkeypatch.setattr(
        runtime, 'import_library', lambda name: None if name == 'tensorrt_rtx' else find_library(name))
    for rebuild in (False, True):
        with pytest.raises(runtime.RuntimeInputError, match='is not installed; pip install tensorrt-rtx[.]$'):
            runtime._find(tmp_path, 'auto', None, engine=True, rebuild=rebuild)
    old = engines('b', version='1.0')
    assert runtime._find(tmp_path, 'auto', None, engine=True, rebuild=True) == old
    with pytest.raises(runtime.RuntimeInputError, match='was built by tensorrt 1.0, .*; to build it again, use'):
        runtime._find(tmp_path, 'auto', None, engine=True)


@one_version
def test_folder_of_engines_of_several_networks_is_refused(simulated, engines, tmp_path):
    engines('a')
    sidecar = Path(f'{engines("b")}.json')
    sidecar.write_text(json.dumps(dict(json.loads(sidecar.read_text()), weights_sha256='0')))
    with pytest.raises(runtime.RuntimeInputError, match='holds files of several networks; name one: x.engine'):
        runtime.load(tmp_path, engine=True)


@pytest.mark.parametrize('name, advice', [
    ('cudaErrorMemoryAllocation', '; see what else uses the GPU'), ('cudaErrorInsufficientDriver', '; update the driv'),
    ('cudaErrorIllegalAddress', '[.]$')])
def test_advice_is_of_the_error_of_cuda(name, advice):
    class Error(int):
        pass

    error = Error(1)
    error.name = name
    with pytest.raises(runtime.RuntimeInputError, match=f'CUDA failed with {name}{advice}'):
        runtime._check_cuda((error,))


@each_package
def test_simulated_engine_of_the_same_capability_yields_to_one_of_the_gpu(simulated, engines, tmp_path):
    other = engines('a', gpu=RTX)
    assert runtime._find(tmp_path, 'auto', None, engine=True) == other
    own = engines('b', 'fp32', gpu=GPU)
    assert runtime._find(tmp_path, 'auto', None, engine=True) == own


@each_package
@pytest.mark.parametrize('text', [
    '{"engine": {"name": "resnet"}}', '{"engine": "yes"}', '[]', '{', '{"metadata_version": 1}'])
def test_simulated_foreign_sidecar_hides_no_engine(simulated, engines, tmp_path, text):
    (tmp_path / 'a.engine').write_bytes(b'plan')
    (tmp_path / 'a.engine.json').write_text(text)
    with pytest.raises(runtime.RuntimeInputError, match='holds no engine for this machine: '):
        runtime.load(tmp_path, engine=True)
    own = engines('b')
    assert runtime._find(tmp_path, 'auto', None, engine=True) == own


@each_package
def test_simulated_advice_is_a_command_of_the_project_alone(simulated, engines, tmp_path):
    path = engines('a', version='1.0', command='python -c "import os" tensorrt a --output b')
    with pytest.raises(runtime.RuntimeInputError, match='build it again with python -m export tensorrt') as error:
        runtime.load(path)
    assert 'import os' not in str(error.value)


@each_package
def test_simulated_folder_is_built_again_where_nothing_fits(simulated, engines, tmp_path):
    engines('a', version='1.0')
    runner = runtime.load(tmp_path, engine=True, rebuild=True)
    assert runner.metadata['engine']['version'] == simulated['module'].__version__


@each_package
def test_simulated_repository_gives_one_file_of_one_commit(simulated, engines, tmp_path, monkeypatch):
    engines('a', gpu=T4, hardware_compatibility='none')
    own = engines('b')
    asked = []

    def download(repo, revision, allow_patterns):
        asked.append((repo, revision))
        commit = tmp_path / 'snapshots' / '0123abc'
        for folder in ('engines', 'onnx'):
            for path in (tmp_path / folder).rglob('*'):
                relative = path.relative_to(tmp_path)
                if path.is_file() and any(fnmatch.fnmatch(relative.as_posix(), p) for p in allow_patterns):
                    (commit / relative).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, commit / relative)
        return str(commit)

    def list_fetched():
        files = [p for p in (tmp_path / 'snapshots').rglob('*') if p.is_file() and p.suffix != '.json']
        return [p.relative_to(tmp_path / 'snapshots' / '0123abc').as_posix() for p in files]

    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    runtime.load('me/net', revision='v1', engine=True)
    assert asked == [('me/net', 'v1'), ('me/net', '0123abc')] and list_fetched() == ['engines/b/x.engine']
    shutil.rmtree(tmp_path / 'snapshots')
    runtime.load('me/net', 'cpu')
    assert list_fetched() == ['onnx/patches.onnx']
    shutil.rmtree(tmp_path / 'snapshots')
    own.unlink()
    with pytest.raises(runtime.RuntimeInputError, match='cannot be fetched from the Hub: it has no engines/b/x.engine'):
        runtime.load('me/net', engine=True)
    shutil.rmtree(own.parent)
    shutil.rmtree(tmp_path / 'snapshots')
    with pytest.raises(runtime.RuntimeInputError, match='T4.*"hf download me/net --local-dir FOLDER", then'):
        runtime.load('me/net', engine=True)


def test_simulated_engine_stays_on_the_first_gpu_and_leaves_the_thread_its_own(simulated, files, tmp_path):
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions(batches=((1, 2, 3),)))
    cuda = simulated_tensorrt.Cuda
    runner = runtime.load(tmp_path / 'x.engine')
    cuda.used.clear()
    cuda.cudaSetDevice(1)
    try:
        runner(ROOT / 'train' / 'sample' / 'images' / 'ship.png')
        assert set(cuda.used) == {0} and cuda.cudaGetDevice() == (0, 1)
    finally:
        cuda.cudaSetDevice(0)
    runner.session.close()
    with pytest.raises(runtime.RuntimeInputError, match='x.engine was closed; load it again'):
        runner(ROOT / 'train' / 'sample' / 'images' / 'ship.png')
    assert not cuda.count_buffers() and runner.session.engine is None and runner.session.runtime is None


@each_package
@pytest.mark.parametrize('batches', [((1, 8, 32),), ((8, 8, 8),), ((1, 1, 1), (4, 8, 8))])
def test_simulated_engine_takes_any_number_of_images(simulated, files, tmp_path, batches):
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions(batches=batches))
    runner, expected = runtime.load(tmp_path / 'x.engine'), runtime.load(files / 'patches.onnx', 'cpu')
    x = np.random.default_rng(0).standard_normal((43, 3, 32, 32)).astype(np.float32)
    for n in (1, 2, 10, 43):
        for got, wanted in zip(runner.run(x[:n]), expected.run(x[:n]), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)


@each_package
def test_simulated_file_that_is_not_the_one_built_never_reaches_tensorrt(simulated, files, tmp_path):
    path = tmp_path / 'x.engine'
    build_engine(files / 'patches.onnx', path, EngineOptions())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(runtime.RuntimeInputError, match='does not match its sidecar: another file, .*build'):
        runtime.load(path)
    (tmp_path / 'x.engine.json').write_text((files / 'patches.onnx.json').read_text())
    with pytest.raises(runtime.RuntimeInputError, match='is not of an engine'):
        runtime.load(path)
    (tmp_path / 'x.engine.json').write_text('{')
    with pytest.raises(runtime.RuntimeInputError, match='is not JSON'):
        runtime.load(path)


@one_version
def test_what_building_again_needs_is_named(simulated, files, tmp_path, monkeypatch):
    build_engine(files / 'patches.onnx', tmp_path / 'x.engine', EngineOptions())
    sidecar = tmp_path / 'x.engine.json'
    metadata = json.loads(sidecar.read_text())
    metadata['engine']['version'] = '9.9'
    sidecar.write_text(json.dumps(metadata))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'filelock', None)
        with pytest.raises(runtime.RuntimeInputError, match=r'Building an engine needs filelock; pip install -e "'):
            runtime.load(tmp_path / 'x.engine', rebuild=True)
    monkeypatch.setattr(runtime, '__file__', str(tmp_path / 'runtime.py'))
    with pytest.raises(runtime.RuntimeInputError, match='Building needs a checkout of timm-tmblock'):
        runtime.load(tmp_path / 'x.engine', rebuild=True)


@each_package
def test_rebuilding_from_another_file_is_refused(simulated, files, tmp_path):
    shutil.copy(files / 'patches.onnx', tmp_path / 'a.onnx')
    build_engine(tmp_path / 'a.onnx', tmp_path / 'x.engine', EngineOptions())
    shutil.copy(files / 'pixels.onnx', tmp_path / 'a.onnx')
    with pytest.raises(InputError, match='was built from .*a.onnx, which is gone or another file by now'):
        rebuild_engine(tmp_path / 'x.engine')


@one_version
@pytest.mark.parametrize('options, message', [
    (dict(backend='evil.module'), "--backend must be one of auto, tensorrt, tensorrt_rtx, not 'evil.module'"),
    (dict(hardware_compatibility='all'), "--hardware-compatibility must be one of none, ampere., same-cc, not 'all'"),
    (dict(workspace=2 ** 50), 'no more than there are bytes'), (dict(workspace='1'), 'does not say how to build'),
    (dict(batches=3), 'does not say how to build'), (None, 'does not say how to build')])
def test_sidecar_of_a_stranger_imports_nothing(simulated, files, tmp_path, monkeypatch, options, message):
    (tmp_path / 'evil').mkdir()
    (tmp_path / 'evil' / 'module.py').write_text('raise SystemExit("imported")')
    monkeypatch.syspath_prepend(tmp_path)
    path, sidecar = tmp_path / 'x.engine', tmp_path / 'x.engine.json'
    build_engine(files / 'patches.onnx', path, EngineOptions())
    metadata = json.loads(sidecar.read_text())
    metadata['engine']['options'] = options and dict(metadata['engine']['options'], **options)
    metadata['engine']['version'] = '1.0'
    sidecar.write_text(json.dumps(metadata))
    with pytest.raises(runtime.RuntimeInputError, match=message):
        runtime.load(path, rebuild=True)


@one_version
@pytest.mark.parametrize('command', ['python "', 'python -m export tensorrt x.onnx --output', 7])
def test_advice_needs_no_whole_command(simulated, files, tmp_path, command):
    path, sidecar = tmp_path / 'x.engine', tmp_path / 'x.engine.json'
    build_engine(files / 'patches.onnx', path, EngineOptions())
    metadata = json.loads(sidecar.read_text())
    metadata['engine'].update(command=command, version='1.0')
    sidecar.write_text(json.dumps(metadata))
    with pytest.raises(runtime.EngineMismatchError, match='; build it again with python -m export tensorrt'):
        runtime.load(path)


@one_version
def test_engine_in_a_folder_that_is_a_link_is_built_again(simulated, files, tmp_path):
    (tmp_path / 'onnx').mkdir()
    (tmp_path / 'disk' / 'deep').mkdir(parents=True)
    (tmp_path / 'engines').symlink_to(tmp_path / 'disk' / 'deep')
    shutil.copy(files / 'patches.onnx', tmp_path / 'onnx' / 'a.onnx')
    path = tmp_path / 'engines' / 'x.engine'
    build_engine(tmp_path / 'onnx' / 'a.onnx', path, EngineOptions())
    rebuild_engine(path)
    assert json.loads(Path(f'{path}.json').read_text())['engine']['onnx'] == '../../onnx/a.onnx'


@one_version
def test_engine_of_a_file_that_is_a_link_keeps_its_name(simulated, files, tmp_path):
    (tmp_path / 'blobs').mkdir()
    shutil.copy(files / 'patches.onnx', tmp_path / 'blobs' / '3fa9')  # as in the Hub's cache
    (tmp_path / 'a.onnx').symlink_to(tmp_path / 'blobs' / '3fa9')
    engine = build_engine(tmp_path / 'a.onnx', tmp_path / 'x.engine', EngineOptions())['engine']
    assert engine['onnx'] == 'a.onnx' and ' tensorrt a.onnx ' in engine['command']
    rebuild_engine(tmp_path / 'x.engine')


@one_version
def test_advice_for_an_engine_in_the_cache_of_the_hub_can_be_followed(simulated, files, tmp_path):
    shutil.copy(files / 'patches.onnx', tmp_path / 'a.onnx')
    (tmp_path / 'snapshot' / 'engines').mkdir(parents=True)
    (tmp_path / 'snapshot' / 'onnx').mkdir()
    (tmp_path / 'snapshot' / 'onnx' / 'a.onnx').symlink_to(tmp_path / 'a.onnx')
    metadata = build_engine(
        tmp_path / 'snapshot' / 'onnx' / 'a.onnx', tmp_path / 'snapshot' / 'engines' / 'x.engine', EngineOptions())
    path = tmp_path / 'snapshot' / 'engines' / 'x.engine'
    path.rename(tmp_path / '3fa9')
    path.symlink_to(tmp_path / '3fa9')
    onnx = tmp_path / 'snapshot' / 'onnx' / 'a.onnx'
    assert f'tensorrt {onnx} --output {path}' in runtime._rebuild(metadata, path)
    onnx.unlink()  # which loading an engine does not download
    assert runtime._rebuild(metadata, path).startswith('put a.onnx back (of the Hub: by hf download), and in')


@pytest.mark.parametrize('version, name, last', [
    ('10.0.1', 'tensorrt', 20), ('10.13.0', 'tensorrt', 24), ('11.4.0', 'tensorrt', 24), ('11.5.0', 'tensorrt', 25),
    ('1.7.0', 'tensorrt_rtx', 24)])
def test_last_opset_is_that_of_the_version(version, name, last):
    assert export.tensorrt.find_last_opset(SimpleNamespace(__name__=name, __version__=version)) == last


@pytest.mark.parametrize('simulated, refused', [('10.0', True), ('10.16', False)], indirect=['simulated'])
def test_operators_newer_than_a_version_reads_are_refused(simulated, write_unchecked, tmp_path, refused):
    write_unchecked(timm.create_model('rn20').eval(), tmp_path / 'a.onnx', OnnxOptions(opset=22))
    if refused:
        with pytest.raises(InputError, match='has opset 22, this TensorRT reads 9 to 20; export it with --opset 18'):
            build_engine(tmp_path / 'a.onnx', tmp_path / 'x.engine', EngineOptions())
    else:
        build_engine(tmp_path / 'a.onnx', tmp_path / 'x.engine', EngineOptions())
