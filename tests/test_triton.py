"""Model repositories: judged by the real server, which refuses what is wrong, and served by it."""
import errno
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
from PIL import Image

import export.runtime as runtime
from export.__main__ import main
from export.onnx import OnnxOptions
from export.runtime import RuntimeInputError
from export.triton import _tensor
from timm_tmblock.errors import InputError

ROOT = Path(__file__).parent.parent
# unpacked from the wheel nvidia-pytriton by `make test`; it needs none of what the wheel asks for
SERVER = ROOT / '.venv' / 'triton' / 'pytriton' / 'tritonserver'
needs_server = pytest.mark.skipif(
    not (SERVER / 'bin' / 'tritonserver').is_file(), reason='no Triton server; make .venv/triton')
STUB = SERVER / 'python_backend_stubs' / f'{sys.version_info.major}.{sys.version_info.minor}'
needs_stub = pytest.mark.skipif(
    not STUB.is_dir() or 'not found' in subprocess.run(
        ['ldd', STUB / 'triton_python_backend_stub'], capture_output=True, text=True).stdout,
    reason='no Python library for the server')


@pytest.fixture(scope='module')
def files(write_unchecked, tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    model = timm.create_model('rn26_tm', pretrained=True).eval()
    for name, options in dict(
            scores=OnnxOptions(patch_logits=True),
            pixels=OnnxOptions(softmax=True, preprocessing='NHWC'),
            dynamic=OnnxOptions(dynamic_size=True),
    ).items():
        write_unchecked(model, folder / f'{name}.onnx', options)
    # an engine as far as the repository goes
    metadata = json.loads((folder / 'scores.onnx.json').read_text())
    shapes = [[n, 3, 32, 32] for n in (1, 16, 32)]
    metadata['engine'] = dict(
        backend='tensorrt', version='11.4.0', gpu=None, platform=None, profiles=[shapes], version_compatible=False,
        hardware_compatibility='none', onnx='scores.onnx', onnx_sha256='', options={}, command='')
    metadata['file_sha256'] = hashlib.sha256(b'plan').hexdigest()
    (folder / 'fast.engine').write_bytes(b'plan')
    (folder / 'fast.engine.json').write_text(json.dumps(metadata))
    return folder


@contextmanager
def serving(repository, backends, log):
    """The server on a repository; yields a function that asks it."""
    for _ in range(3):  # it may find its port taken meanwhile, or get stuck as it starts
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        process = start_server(repository, backends, log, port)
        try:
            if answers(port, process):
                yield partial(ask, port)
                return
        finally:
            stop_server(process, port)
    pytest.fail(f'The server does not answer: {log.read_text()[-2000:]}')


def start_server(repository, backends, log, port):
    command = [
        SERVER / 'bin' / 'tritonserver', f'--model-repository={repository}', f'--backend-directory={backends}',
        '--disable-auto-complete-config', '--exit-on-error=false', '--strict-readiness=false',
        '--http-address=127.0.0.1', f'--http-port={port}', '--allow-grpc=false', '--allow-metrics=false',
        '--pinned-memory-pool-byte-size=0', '--exit-timeout-secs=10',
        f'--backend-config=python,shm-region-prefix-name=timm_tmblock_{port}_']
    environment = dict(os.environ, PATH=f'{Path(sys.executable).parent}:/usr/bin:/bin')
    with open(log, 'w') as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)


def stop_server(process, port):
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for left in Path('/dev/shm').glob(f'timm_tmblock_{port}_*'):
        left.unlink()


def answers(port, process):
    """Whether the server is up within a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if ask(port, 'GET', '/v2/health/live', timeout=10)[0] == 200:
                return True
        except (OSError, http.client.HTTPException, ValueError):  # not yet, or another program's port
            pass
        time.sleep(0.1)
    return False


def ask(port, method, path, body=None, timeout=60):
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=timeout)
    connection.request(method, path, None if body is None else json.dumps(body))
    response = connection.getresponse()
    text = response.read()
    return response.status, json.loads(text) if text else None


def judge(repository, tmp_path):
    """What the server says of each model, without a backend to run it: the reason, None if the settings are refused."""
    with serving(repository, SERVER / 'backends', tmp_path / 'log') as ask:
        index = ask('POST', '/v2/repository/index')[1]
    return {model['name']: model.get('reason') for model in index}


def accepted(backend):
    return (
        f"Invalid argument: unable to find backend library for backend '{backend}', try specifying runtime on the "
        f'model configuration.')


@needs_server
def test_server_accepts_every_kind_of_model(files, tmp_path):
    repository = tmp_path / 'repository'
    paths = [str(files / name) for name in ('scores.onnx', 'pixels.onnx', 'dynamic.onnx', 'fast.engine')]
    main(['triton', *paths, '--output', str(repository), '--instances', '2', '--max-batch', '8'])
    assert judge(repository, tmp_path) == dict(
        scores=accepted('onnxruntime'), pixels=accepted('onnxruntime'), dynamic=accepted('onnxruntime'),
        fast=accepted('tensorrt'))
    assert (repository / 'fast' / '1' / 'model.plan').read_bytes() == b'plan'
    config = (repository / 'fast' / 'config.pbtxt').read_text()
    assert 'max_batch_size: 32' in config and 'preferred_batch_size: [ 16, 32 ]' in config and 'KIND_GPU' in config
    assert 'gpu_execution_accelerator' not in config and 'count: 2 ' in config
    scores = (repository / 'scores' / 'config.pbtxt').read_text()
    assert 'max_batch_size: 8\n' in scores and 'count: 2 ' in scores
    assert 'dims: [ 3, -1, -1 ]' in (repository / 'dynamic' / 'config.pbtxt').read_text()


@needs_server
def test_server_refuses_what_is_wrong(files, tmp_path):
    repository = tmp_path / 'repository'
    wrong = (
        ('max_batch_size', 'max_batch'), ('TYPE_FP32', 'FP32'), ('dims: [ 10 ]', 'dims: [ -2 ]'),
        ('name: "m3"', 'name: "other"'), ('dynamic_batching {', 'dynamic_batching { preferred_batch_size: [ 128 ]'))
    for i, (old, new) in enumerate(wrong):
        main(['triton', str(files / 'scores.onnx'), '--output', str(repository), '--name', f'm{i}'])
        config = repository / f'm{i}' / 'config.pbtxt'
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, new, 1))
    assert judge(repository, tmp_path) == dict.fromkeys(f'm{i}' for i in range(len(wrong)))


@pytest.fixture(scope='module')
def served(files, tmp_path_factory):
    """The server with a backend that runs the files, on two models, one in two versions."""
    folder = tmp_path_factory.mktemp('served')
    for path in ('scores.onnx', 'pixels.onnx', 'scores.onnx'):
        main(['triton', str(files / path), '--output', str(folder / 'repository'), '--max-delay', '20000'])
    backends = folder / 'backends'
    (backends / 'onnxruntime').mkdir(parents=True)
    shutil.copy(ROOT / 'tests' / 'triton_backend.py', backends / 'onnxruntime' / 'model.py')
    stub = SERVER / 'backends' / 'python' / 'triton_python_backend_stub'
    if not stub.exists():
        stub.symlink_to(STUB / 'triton_python_backend_stub')
    (backends / 'python').symlink_to(SERVER / 'backends' / 'python')
    with serving(folder / 'repository', backends, folder / 'log') as ask:
        index = ask('POST', '/v2/repository/index')[1]
        assert {(m['name'], m['version'], m['state']) for m in index} == {
            ('scores', '2', 'READY'), ('pixels', '1', 'READY')}, index
        yield ask


def infer(ask, model, name, array, outputs):
    kind = {'float32': 'FP32', 'uint8': 'UINT8'}[str(array.dtype)]
    status, answer = ask('POST', f'/v2/models/{model}/infer', dict(
        inputs=[dict(name=name, datatype=kind, shape=list(array.shape), data=array.ravel().tolist())], outputs=outputs))
    assert status == 200, answer
    return {o['name']: np.array(o['data']).reshape(o['shape']) for o in answer['outputs']}


@needs_server
@needs_stub
@pytest.mark.parametrize('batch_size', [1, 2, 7])
def test_served_model_answers_as_the_runtime_with_labels_and_patch_scores(served, files, batch_size):
    runner = runtime.load(files / 'scores.onnx', 'cpu')
    paths = sorted((ROOT / 'train' / 'sample' / 'images').iterdir())[:batch_size]
    batch = runner.to_input(np.stack([runner.prepare(path)[1] for path in paths]))
    got = infer(served, 'scores', 'image', batch, [dict(name='logits'), dict(name='patch_logits')])
    for name, expected in zip(('logits', 'patch_logits'), runner.session.run(batch)):
        np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-4)
    labels = infer(served, 'scores', 'image', batch, [dict(name='logits', parameters=dict(classification=3))])['logits']
    assert [[text.split(':')[2] for text in row] for row in labels] == [
        [name for name, _ in prediction.top(3)] for prediction in runner(paths)]


@needs_server
@needs_stub
def test_pixels_go_in_as_they_are(served, files):
    with Image.open(ROOT / 'train' / 'sample' / 'images' / 'ship.png') as image:
        pixels = np.array(image)[None]
    output = dict(name='probabilities', parameters=dict(classification=1))
    value, index, label = infer(served, 'pixels', 'image', pixels, [output])['probabilities'][0, 0].split(':')
    assert label == 'ship' and index == '8' and float(value) > 0.9


@needs_server
@needs_stub
def test_server_runs_the_latest_version_and_checks_requests(served):
    status, answer = served('POST', '/v2/models/scores/infer', dict(
        inputs=[dict(name='image', datatype='FP32', shape=[1, 3, 31, 32], data=[0] * 2976)]))
    assert status == 400 and 'unexpected shape' in answer['error']
    statistics = served('GET', '/v2/models/scores/stats')[1]['model_stats'][0]
    assert statistics['version'] == '2'


@needs_server
@needs_stub
def test_server_tells_cuda_what_the_runtime_tells_it(served):
    config = served('GET', '/v2/models/scores/config')[1]
    accelerators = config['optimization']['execution_accelerators']['gpu_execution_accelerator']
    assert [(a['name'], a['parameters']) for a in accelerators] == [('cuda', {'use_tf32': '0'})]
    assert config['parameters']['cudnn_conv_algo_search'] == {'string_value': '1'}  # the backend's heuristic
    warmups = [(w['batch_size'], [int(n) for n in w['inputs']['image']['dims']]) for w in config['model_warmup']]
    assert warmups == [(1, [3, 32, 32]), (config['max_batch_size'], [3, 32, 32])]


def test_files_of_one_name_are_versions_of_one_model_with_the_same_settings(files, tmp_path, capsys):
    flags = ['--output', str(tmp_path), '--name', 'net']
    main(['triton', str(files / 'scores.onnx'), str(files / 'scores.onnx'), *flags])
    assert sorted(p.name for p in (tmp_path / 'net').iterdir()) == ['1', '2', 'config.pbtxt', 'labels.txt']
    assert (tmp_path / 'net' / 'labels.txt').read_text().splitlines()[8] == 'ship'
    assert json.loads((tmp_path / 'net' / '2' / 'model.onnx.json').read_text())['model'] == 'rn26_tm'
    said = capsys.readouterr().out
    assert 'wrote' in said and 'TensorRT' not in said
    before = sorted(tmp_path.rglob('*'))
    for arguments in ([str(files / 'pixels.onnx')], [str(files / 'scores.onnx'), '--max-batch', '8']):
        with pytest.raises(InputError, match='would be a version of .*net, which has other settings or classes'):
            main(['triton', *arguments, *flags])
    assert sorted(tmp_path.rglob('*')) == before


def test_settings_of_models_on_cpus(files, tmp_path):
    main(['triton', str(files / 'scores.onnx'), '--output', str(tmp_path), '--kind', 'cpu'])
    assert 'cuda' not in (tmp_path / 'scores' / 'config.pbtxt').read_text()
    main(['triton', str(files / 'pixels.onnx'), '--output', str(tmp_path), '--kind', 'cpu', '--threads', '3'])
    assert 'key: "intra_op_thread_count" value: { string_value: "3" }' in (
        tmp_path / 'pixels' / 'config.pbtxt').read_text()


def test_files_of_the_hub_are_named_by_their_network(files, tmp_path):
    for stem in ('model', 'model_fp16', 'model_int8_tensorrt', 'model_of_mine'):  # the last is none of these
        shutil.copy(files / 'scores.onnx', tmp_path / f'{stem}.onnx')
        main(['triton', str(tmp_path / f'{stem}.onnx'), '--output', str(tmp_path)])
        name = stem if stem == 'model_of_mine' else stem.replace('model', 'rn26_tm')
        assert f'name: "{name}"' in (tmp_path / name / 'config.pbtxt').read_text()


def test_server_that_starts_meanwhile_finds_whole_models_alone(files, tmp_path, monkeypatch):
    repository, seen = tmp_path / 'repository', []
    copy = shutil.copyfile

    def copyfile(source, target):
        seen.append(sorted(p.name for p in repository.iterdir()))
        return copy(source, target)

    monkeypatch.setattr('export.triton.shutil.copyfile', copyfile)
    main(['triton', str(files / 'scores.onnx'), str(files / 'pixels.onnx'), '--output', str(repository)])
    assert seen == [[], [], ['scores'], ['scores']]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['repository']


def test_repositories_beside_each_other_have_models_of_their_own(files, tmp_path, monkeypatch):
    seen, copy = [], shutil.copyfile

    def copyfile(source, target):
        seen.append(target.parents[1])
        return copy(source, target)

    monkeypatch.setattr('export.triton.shutil.copyfile', copyfile)
    for name in 'ab':
        main(['triton', str(files / 'scores.onnx'), '--output', str(tmp_path / name)])
    assert len(set(seen)) == 2 and {path.parent for path in seen} == {tmp_path}


def test_repository_that_is_a_mount_gets_its_model_too(files, tmp_path, monkeypatch):
    replace = os.replace

    def across(source, target):
        if Path(source).parent == tmp_path and Path(target).parent != tmp_path:
            raise OSError(errno.EXDEV, 'Invalid cross-device link')
        return replace(source, target)

    monkeypatch.setattr('export.triton.os.replace', across)
    main(['triton', str(files / 'scores.onnx'), '--output', str(tmp_path / 'repository')])
    assert sorted(p.name for p in tmp_path.iterdir()) == ['repository']
    assert sorted(p.name for p in (tmp_path / 'repository').rglob('*')) == [
        '1', 'config.pbtxt', 'labels.txt', 'model.onnx', 'model.onnx.json', 'scores']


def test_model_without_versions_gets_its_first_again(files, tmp_path):
    flags = ['triton', str(files / 'scores.onnx'), '--output', str(tmp_path)]
    main(flags)
    shutil.rmtree(tmp_path / 'scores' / '1')
    main(flags)
    assert sorted(p.name for p in (tmp_path / 'scores').iterdir()) == ['1', 'config.pbtxt', 'labels.txt']


def write_engine(folder, name, batches, **changes):
    metadata = json.loads((folder / 'fast.engine.json').read_text())
    metadata['engine']['profiles'] = [[[n, 3, 32, 32] for n in batch] for batch in batches]
    path = folder / f'{name}.engine'
    path.write_bytes(b'plan')
    path.with_name(f'{path.name}.json').write_text(json.dumps({**metadata, **changes}))
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])
    return path


@needs_server
def test_all_profiles_of_an_engine_serve(files, tmp_path):
    path = write_engine(files, 'profiles', [(1, 1, 1), (2, 16, 64)])
    main(['triton', str(path), '--output', str(tmp_path / 'repository')])
    config = (tmp_path / 'repository' / 'profiles' / 'config.pbtxt').read_text()
    assert 'max_batch_size: 64' in config and 'preferred_batch_size: [ 16, 64 ]' in config  # 1 would never wait
    assert 'profile: [ "0", "1" ]' in config
    assert judge(tmp_path / 'repository', tmp_path) == dict(profiles=accepted('tensorrt'))


def test_engine_that_takes_no_single_request_is_refused(files, tmp_path):
    with pytest.raises(InputError, match='takes no batch below 8.*build it with --batch 1 8 8'):
        main(['triton', str(write_engine(files, 'eight', [(8, 8, 8)])), '--output', str(tmp_path)])


def test_engine_with_a_gap_between_its_profiles_is_refused(files, tmp_path):
    path = write_engine(files, 'gap', [(8, 16, 64), (1, 1, 4)])
    with pytest.raises(InputError, match='takes no batch between 4 and 8, .* profiles that meet'):
        main(['triton', str(path), '--output', str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_int8_for_a_cpu_is_served_on_it(files, tmp_path):
    proto = onnx.load(files / 'scores.onnx')
    for p in proto.metadata_props:
        p.value = '{"target": "cpu"}' if p.key == 'quantization' else p.value
    onnx.save(proto, tmp_path / 'small.onnx')
    main(['triton', str(tmp_path / 'small.onnx'), '--output', str(tmp_path / 'repository')])
    config = (tmp_path / 'repository' / 'small' / 'config.pbtxt').read_text()
    assert 'kind: KIND_CPU' in config and 'cuda' not in config


def test_files_of_one_name_are_refused_before_anything_is_written(files, tmp_path):
    other = write_engine(files, 'scores', [(1, 2, 3)])
    relabelled = write_engine(files, 'relabelled', [(1, 2, 3)], class_names=list('abcdefghij'))
    for paths in ([files / 'scores.onnx', other], [other, relabelled]):
        name = ['--name', 'net'] if relabelled in paths else []
        with pytest.raises(InputError, match='which has other settings or classes; use the flags it was made'):
            main(['triton', *map(str, paths), '--output', str(tmp_path), *name])
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('make, flags, message', [
    (lambda f, t: f / 'missing.onnx', [], 'There is no file'),
    (lambda f, t: f / 'scores.onnx.json', [], 'neither an .onnx file nor an .engine'),
    (lambda f, t: f / 'scores.onnx', ['--max-batch', '0'], 'must be from 1'),
    (lambda f, t: f / 'scores.onnx', ['--max-delay', '-1'], 'must be from 0'),
    (lambda f, t: f / 'scores.onnx', ['--max-batch', str(2 ** 31)], 'must be from 1 to 2147483647'),
    (lambda f, t: f / 'scores.onnx', ['--threads', '0', '--kind', 'cpu'], 'must be from 1'),
    (lambda f, t: f / 'scores.onnx', ['--threads', '2'], '--threads is for instances on a CPU, .* add --kind cpu'),
    (lambda f, t: (t / 'x.onnx').write_bytes(b'\xff' * 99) and t / 'x.onnx', [], 'is cut short or not an ONNX file'),
    (lambda f, t: (t / 'x.engine').write_bytes(b'plan') and t / 'x.engine', [], 'does not say its classes'),
    (lambda f, t: cut(write_engine(f, 'cut', [(1, 2, 3)])), [], 'does not match its sidecar: another file'),
    (lambda f, t: write_engine(f, 'cpu', [(1, 2, 3)]), ['--kind', 'cpu'], 'is an engine, which runs only on GPUs'),
])
def test_what_cannot_be_served_is_one_sentence(files, tmp_path, make, flags, message):
    (tmp_path / 'made').mkdir()
    with pytest.raises(InputError, match=message) as error:
        main(['triton', str(make(files, tmp_path / 'made')), '--output', str(tmp_path / 'repository'), *flags])
    assert '\n' not in str(error.value) and not (tmp_path / 'repository').exists()


@pytest.mark.parametrize('compatible', [False, True])
def test_flags_and_version_of_tensorrt_that_engines_need_are_told(files, tmp_path, capsys, compatible):
    metadata = json.loads((files / 'fast.engine.json').read_text())
    metadata['engine'].update(version_compatible=compatible)
    (tmp_path / 'x.engine').write_bytes(b'plan')
    (tmp_path / 'x.engine.json').write_text(json.dumps(metadata))
    main(['triton', str(tmp_path / 'x.engine'), '--output', str(tmp_path / 'repository')])
    said = capsys.readouterr().out
    assert f'\nthe TensorRT of the server must be 11.4.0{" or later" if compatible else ""}\n' in said
    assert ('--backend-config=tensorrt,version-compatible=true' in said) == compatible


def test_names_are_those_of_the_file(files, tmp_path):
    text = _tensor(dict(name='a "b" {', dtype='float32', shape=['batch', 3]))
    assert text.startswith(r'{ name: "a \"b\" {" data_type: TYPE_FP32 dims: [ 3 ]')
    shutil.copy(files / 'scores.onnx', tmp_path / 'lines.onnx')
    proto = onnx.load(tmp_path / 'lines.onnx')
    entry = next(entry for entry in proto.metadata_props if entry.key == 'class_names')
    names = json.loads(entry.value)
    entry.value = json.dumps([f'{name}\n' for name in names])  # as of readlines()
    onnx.save(proto, tmp_path / 'lines.onnx')
    main(['triton', str(tmp_path / 'lines.onnx'), '--output', str(tmp_path / 'repository')])
    assert (tmp_path / 'repository' / 'lines' / 'labels.txt').read_text().splitlines() == names


def test_engines_of_tensorrt_rtx_and_bf16_files_are_refused(files, tmp_path):
    engine = json.loads((files / 'fast.engine.json').read_text())['engine']
    for name, change, message in (
            ('fast.engine', dict(engine=None), 'fast.engine.json is not of an engine; build it'),
            ('fast.engine', dict(engine=dict(engine, backend='tensorrt_rtx')), 'Triton runs engines of TensorRT;'),
            ('scores.onnx', dict(precision='bf16'), 'bf16, which ONNX Runtime cannot run')):
        shutil.copy(files / name, tmp_path)
        metadata = json.loads((files / f'{name}.json').read_text())
        (tmp_path / f'{name}.json').write_text(json.dumps({**metadata, **change}))
        if name.endswith('.onnx'):
            proto = onnx.load(tmp_path / name)
            del proto.metadata_props[:]
            onnx.save(proto, tmp_path / name)
        with pytest.raises((InputError, RuntimeInputError), match=message):
            main(['triton', str(tmp_path / name), '--output', str(tmp_path / 'repository')])
