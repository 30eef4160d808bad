"""The runtime sees images as PyTorch does, needs no PyTorch, and says what it cannot do."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from timm.data import create_transform

import export.runtime as runtime
from export.onnx import OnnxOptions
from timm_tmblock import Explainer, explain
from timm_tmblock.image import read_image

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / 'train' / 'sample' / 'images'
SCRIPT = ROOT / 'export' / 'runtime.py'


@pytest.fixture(scope='module')
def folder(write_unchecked, tmp_path_factory):
    """A copy of the runtime beside files of the pretrained network."""
    folder = tmp_path_factory.mktemp('runtime')
    shutil.copy(SCRIPT, folder)
    model = timm.create_model('rn26_tm', pretrained=True).eval()
    for name, options in dict(
            patches=OnnxOptions(patch_logits=True),
            plain=OnnxOptions(),
            pixels=OnnxOptions(patch_logits=True, softmax=True, preprocessing='NHWC'),
            half=OnnxOptions('fp16'),
            brain=OnnxOptions('bf16'),
    ).items():
        write_unchecked(model, folder / f'{name}.onnx', options)
    return folder


SAFE_PATH = ['-P'] if sys.version_info >= (3, 11) else []


def run_script(folder, *arguments, env=None):
    """The copied runtime, from a folder where nothing of the project can be imported."""
    return subprocess.run(
        [sys.executable, *SAFE_PATH, 'runtime.py', 'run', *map(str, arguments)], cwd=folder, capture_output=True,
        text=True, env=env)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Images of every mode and shape that is read."""
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (50, 40, 4), dtype=np.uint8)
    Image.fromarray(noise[..., :3]).save(folder / 'rgb.png')
    Image.fromarray(noise).save(folder / 'alpha.png')
    Image.fromarray(noise[..., 0]).save(folder / 'grey.png')
    Image.fromarray(noise[..., :3]).convert('CMYK').save(folder / 'cmyk.jpg')
    Image.fromarray(noise[..., :3]).quantize(16).save(folder / 'palette.gif')
    Image.fromarray(rng.integers(0, 65536, (32, 32), dtype=np.uint16)).save(folder / 'deep.png')
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    Image.fromarray(noise[..., :3]).save(folder / 'turned.jpg', exif=exif)
    for i, size in enumerate([(32, 32), (33, 32), (31, 64), (200, 5), (1, 1), (300, 201)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f'size{i}.webp', lossless=True)
    return folder


@pytest.mark.parametrize('size, crop_pct, interpolation', [
    ((32, 32), 1.0, 'bicubic'), ((32, 32), 0.875, 'bilinear'), ((84, 84), 0.9, 'lanczos'), ((32, 48), 0.95, 'bicubic'),
    ((48, 32), 1.0, 'bilinear'), ((32, 32), 1.1, 'bicubic'), ((33, 32), 1.1, 'bicubic'), ((48, 31), 1.2, 'lanczos')])
@pytest.mark.parametrize('crop_mode', ['center', 'squash'])
def test_images_are_read_and_cropped_as_by_timm(pictures, size, crop_pct, interpolation, crop_mode):
    transform = create_transform(
        (3, *size), crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation, normalize=False)
    preprocessing = dict(input_size=(3, *size), crop_pct=crop_pct, interpolation=interpolation)
    preprocessing.update(dict(crop_mode=crop_mode) if crop_mode == 'squash' else {})
    for path in sorted(pictures.iterdir()):
        expected = transform(read_image(path)).numpy().transpose(1, 2, 0)
        got = np.asarray(runtime.resize_and_crop(runtime.read_image(path), preprocessing))
        np.testing.assert_array_equal(got, expected, err_msg=path.name)


@pytest.mark.parametrize('name', ['patches', 'pixels'])
def test_predictions_are_pytorchs(folder, pictures, name):
    paths = [*sorted(IMAGES.iterdir()), *sorted(pictures.iterdir())]
    explainer = Explainer('rn26_tm')
    predictions = runtime.load(folder / f'{name}.onnx', 'cpu')(paths, batch_size=7)
    assert len(predictions) == len(paths)
    for path, prediction in zip(paths, predictions):
        expected = explainer(path)
        np.testing.assert_allclose(prediction.probabilities, expected.probabilities, atol=1e-4)
        np.testing.assert_allclose(prediction.patch_probabilities, expected.patch_probabilities, atol=1e-4)
        assert prediction.label == expected.top(1)[0][0]
        assert [n for n, _ in prediction.top(2)] == [n for n, _ in expected.top(2)]
        assert list(prediction.template_names) == list(expected.template_names)


def test_paths_images_and_arrays_give_the_same(folder):
    runner = runtime.load(folder / 'plain.onnx', 'cpu')
    path = IMAGES / 'ship.png'
    with Image.open(path) as image:
        array = np.array(image)
        with open(path, 'rb') as file:
            single = [runner(source) for source in (path, str(path), path.read_bytes(), image, array, file)]
        single += [prediction for source in (path, str(path), image, array) for _, prediction in runner.stream(source)]
    assert len(single) == 10
    several = runner([path, array]) + runner(np.stack([array] * 3))
    assert isinstance(single[0], runtime.Prediction) and len(several) == 5
    for prediction in single + several:
        np.testing.assert_allclose(prediction.probabilities, single[0].probabilities, atol=1e-6)
        assert prediction.patch_probabilities is None
    with pytest.raises(runtime.RuntimeInputError, match='no patch scores; export it again with --patch-logits'):
        single[0].picture()


def test_image_alone_is_classified_without_another_thread(folder, monkeypatch):
    runner = runtime.load(folder / 'plain.onnx', 'cpu')
    image = IMAGES / 'cat.png'
    expected = runner([image])[0].probabilities
    monkeypatch.setattr(runtime, 'ThreadPoolExecutor', lambda n: pytest.fail('a thread'))
    np.testing.assert_array_equal(runner(image).probabilities, expected)
    with pytest.raises(runtime.RuntimeInputError, match='missing.png'):
        runner(IMAGES / 'missing.png')
    with pytest.raises(runtime.RuntimeInputError, match='NoneType is not an image'):
        runner(None)  # as OpenCV reads a file that is not there


@pytest.mark.parametrize('batch_size', [1, 3, 64])
def test_stream_takes_what_an_iterator_writes_over_or_closes(folder, batch_size):
    runner = runtime.load(folder / 'plain.onnx', 'cpu')
    paths = sorted(IMAGES.glob('*.png'))
    expected = [p.probabilities for p in runner(paths)]
    arrays = [np.asarray(Image.open(path).convert('RGB')) for path in paths]

    def reuse():
        frame = np.empty_like(arrays[0])
        for array in arrays:
            frame[...] = array
            yield frame

    def close():
        for path in paths:
            with Image.open(path) as image:
                yield image

    for images in (reuse(), close()):
        got = list(runner.stream(images, batch_size))
        np.testing.assert_allclose([p.probabilities for _, p in got], expected, atol=1e-6)
        for (seen, _), array in zip(got, arrays):
            np.testing.assert_array_equal(np.asarray(seen), array)

    def read():
        for path in paths:
            with open(path, 'rb') as file:
                yield file

    def refill():
        buffer = bytearray()
        for path in paths:
            buffer[:] = path.read_bytes()
            yield buffer

    for images in (read(), refill()):
        np.testing.assert_allclose(
            [p.probabilities for _, p in runner.stream(images, batch_size)], expected, atol=1e-6)
    with pytest.raises(runtime.RuntimeInputError, match='The batch size is 0; it must be at least 1'):
        runner(paths, batch_size=0)


@pytest.mark.parametrize('size', [(1, 2_100_000), (2_100_000, 1)])
def test_image_that_would_fill_the_memory_once_resized_is_left_out(folder, tmp_path, size):
    Image.new('L', size).save(tmp_path / 'long.png')
    runner, failed = runtime.load(folder / 'plain.onnx', 'cpu'), []
    sources = [IMAGES / 'ship.png', tmp_path / 'long.png', IMAGES / 'frog.png']
    got = [p.label for _, p in runner.stream(sources, 3, lambda image, e: failed.append((image, str(e))))]
    assert got == ['ship', 'frog']
    (path, error), = failed
    assert path == tmp_path / 'long.png' and f'An image of {size[0]}×{size[1]} pixels is too long' in error
    Image.new('L', (1, 30_000)).save(tmp_path / 'shorter.png')
    assert runner(tmp_path / 'shorter.png').image.size == (32, 32)


def test_sidecar_of_another_file_is_told(folder, tmp_path):
    model = onnx.load(folder / 'plain.onnx')
    del model.metadata_props[:]  # as another tool may
    onnx.save(model, tmp_path / 'plain.onnx')
    shutil.copy(folder / 'plain.onnx.json', tmp_path)
    with pytest.warns(UserWarning, match='was changed after plain.onnx.json was written, or is not its file'):
        assert runtime.load(tmp_path / 'plain.onnx', 'cpu')(IMAGES / 'ship.png').label == 'ship'


def test_threads_may_share_a_runner(folder):
    runner = runtime.load(folder / 'patches.onnx', 'cpu', threads=1)
    assert runner.session.session.get_session_options().intra_op_num_threads == 1
    paths = sorted(IMAGES.iterdir())
    expected = [p.probabilities for p in runner(paths)]
    results = {}

    def work(i):
        results[i] = [p.probabilities for p in runner(paths, batch_size=1 + i)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    for got in results.values():
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_copy_runs_alone_without_pytorch(folder):
    code = (
        "import runtime, sys; r = runtime.load('patches.onnx', 'cpu'); print(r(sys.argv[1]).label);"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'timm', 'timm_tmblock', 'onnx', 'export'}))")
    run = subprocess.run(
        [sys.executable, '-c', code, IMAGES / 'ship.png'], cwd=folder, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ['ship', '[]']


def test_command_reads_folders_and_goes_on_past_a_broken_image(folder, tmp_path):
    (tmp_path / 'deep').mkdir()
    shutil.copy(IMAGES / 'ship.png', tmp_path / 'deep')
    shutil.copy(IMAGES / 'frog.png', tmp_path)
    (tmp_path / 'broken.png').write_bytes((IMAGES / 'cat.png').read_bytes()[:200])
    (tmp_path / 'notes.txt').write_text('no image')
    (tmp_path / '._frog.png').write_bytes(b'what macOS puts beside a file')
    run = run_script(folder, 'patches.onnx', tmp_path, '--json', '--explain', tmp_path / 'out', '--batch-size', 2)
    assert run.returncode == 2
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert [(Path(r['image']).name, r['top'][0][0]) for r in results] == [('ship.png', 'ship'), ('frog.png', 'frog')]
    regions = runtime.load(folder / 'patches.onnx', 'cpu')(IMAGES / 'ship.png').patch_probabilities.argmax(0)
    names = runtime.load(folder / 'patches.onnx', 'cpu').metadata['template_names']
    assert results[0]['regions'] == [[names[k] for k in row] for row in regions]
    errors = run.stderr.splitlines()
    assert len(errors) == 2 and 'broken.png' in errors[0] and errors[1] == 'error: 1 of 3 images could not be read.'
    for result in results:
        with Image.open(result['picture']) as picture:
            assert picture.width > 700
    run = run_script(folder, 'plain.onnx', IMAGES / 'frog.png', '--top', 1)
    assert run.returncode == 0 and run.stdout.startswith(f'{IMAGES / "frog.png"}: frog ') and run.stderr == ''
    shutil.copy(IMAGES / 'frog.png', tmp_path / '鳥.png')
    run = run_script(folder, 'plain.onnx', tmp_path / '鳥.png', env={**os.environ, 'PYTHONIOENCODING': 'cp1252'})
    assert run.returncode == 0 and r'\u9ce5.png: frog ' in run.stdout
    run = run_script(folder, 'patches.onnx', IMAGES / 'frog.png', '--explain', tmp_path / 'one.png')
    assert run.returncode == 0 and (tmp_path / 'one.png').is_file()


def test_picture_is_of_the_predicted_class_where_another_has_its_name():
    regions = np.random.default_rng(0).dirichlet([1, 1, 1], (4, 4)).transpose(2, 0, 1)
    pictures = [
        np.asarray(runtime.Prediction(
            Image.new('RGB', (32, 32)), np.array([0.1, 0.2, 0.7]), regions, names, names).picture())
        for names in (['crane', 'bee', 'crane'], ['stork', 'bee', 'crane'])]
    left = 2 * pictures[0].shape[1] // 3
    assert np.array_equal(*(picture[30:-60, left:] for picture in pictures))


def test_one_picture_of_several_images_is_refused_before_any_is_read(tmp_path):
    with pytest.raises(runtime.RuntimeInputError, match='one.png is one picture, for 2 images; name a folder'):
        runtime.main(['run', str(tmp_path / 'none.onnx'), 'a.jpg', 'b.jpg', '--explain', str(tmp_path / 'one.png')])


def test_module_of_the_checkout_runs_without_pytorch_too(folder):
    run = subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'export', 'run', folder / 'plain.onnx', IMAGES / 'ship.png'],
        cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and ': ship' in run.stdout
    assert ' onnxruntime.capi\n' in run.stderr and ' torch\n' not in run.stderr


def test_picture_shows_what_each_region_matched(monkeypatch):
    patches = np.zeros((3, 2, 2), dtype=np.float32)
    patches[[0, 1, 2, 2], [0, 0, 1, 1], [0, 1, 0, 1]] = 1
    prediction = runtime.Prediction(
        Image.new('RGB', (32, 32), 'white'), np.array([0.1, 0.2, 0.7]), patches, ['a', 'b', 'c'], ['a', 'b', 'c'])
    written = []
    write = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, 'text', lambda self, xy, text, *args, **kwargs: (
        written.append(text), write(self, xy, text, *args, **kwargs))[1])
    picture = np.asarray(prediction.picture(size=100)).astype(int)
    assert written[0] == 'c 70 %, b 20 %' and written[2:] == ['match with c', 'c', 'b', 'a']
    long = runtime.Prediction(
        prediction.image, prediction.probabilities, patches, ['a' * 90, 'b\n', 'c'], ['a' * 90, 'b\n', 'c'])
    assert long.picture(size=100).size == (picture.shape[1], picture.shape[0]) and long.picture(size=20).width == 100
    regions = picture[30:130, 120:220]
    corners = [tuple(regions[y, x]) for y, x in ((20, 20), (20, 80), (80, 20), (80, 80))]
    assert corners[2] == corners[3] and len(set(corners)) == 3
    match = picture[30:130, 230:330]
    assert match[90, 50, 2] < 40 and match[10, 50, 2] > 200  # gold where the class was matched
    prediction.activations = np.zeros((3, 2, 2), dtype=np.float32)
    prediction.activations[:, 0] = [[4], [2], [3]]  # of the upper half, where c has no probability
    match = np.asarray(prediction.picture(size=100)).astype(int)[30:130, 230:330]
    assert match[90, 50, 2] > 200 and 40 < match[10, 50, 2] < 90  # three quarters of the highest score


def test_folder_gives_the_file_for_the_machine(folder, monkeypatch):
    sizes = {name: (folder / f'{name}.onnx').stat().st_size for name in ('half', 'plain')}
    assert sizes['half'] < sizes['plain']
    assert runtime.load(folder, 'cpu').metadata['precision'] == 'fp32'
    monkeypatch.setattr(runtime, '_pick_device', lambda *args, **kwargs: 'cuda')
    assert runtime._find(folder, 'auto', None).name == 'half.onnx'


def test_folder_gives_a_file_that_runs_and_of_one_network(folder, tmp_path):
    for name in ('brain', 'plain', 'half'):
        for suffix in ('onnx', 'onnx.json'):
            shutil.copy(folder / f'{name}.{suffix}', tmp_path)
    (tmp_path / 'half.onnx').rename(tmp_path / 'small.onnx')
    said = json.loads((tmp_path / 'half.onnx.json').read_text())
    (tmp_path / 'half.onnx.json').unlink()
    (tmp_path / 'small.onnx.json').write_text(json.dumps(dict(said, precision='int8')))
    assert runtime._find(tmp_path, 'cpu', None).name == 'plain.onnx'
    (tmp_path / 'plain.onnx').unlink()
    assert runtime._find(tmp_path, 'cpu', None).name == 'small.onnx'  # not brain.onnx, which comes first by name
    (tmp_path / 'small.onnx.json').write_text(json.dumps(dict(said, weights_sha256='0')))
    with pytest.raises(runtime.RuntimeInputError, match='holds files of several networks; name one'):
        runtime.load(tmp_path, 'cpu')


@pytest.mark.parametrize('device', ['gpu', 'cuda:1', 'CPU'])
def test_unknown_device_is_refused(folder, device):
    with pytest.raises(runtime.RuntimeInputError, match=f"There is no device '{device}'; .*CUDA_VISIBLE_DEVICES"):
        runtime.load(folder / 'plain.onnx', device)


def test_folder_that_is_not_here_is_no_repository_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / 'output').mkdir()
    monkeypatch.chdir(tmp_path)
    for source in ('output/missing', './missing', '../missing'):
        with pytest.raises(runtime.RuntimeInputError, match=f'There is no file or folder {source}'):
            runtime.load(source, 'cpu')
    with pytest.raises(runtime.RuntimeInputError, match='as the folder output is here, it is not looked for on'):
        runtime.load('output/missing', 'cpu')


def test_bad_sidecar_hides_no_onnx_file(folder, tmp_path):
    for name in ('half', 'plain'):
        shutil.copy(folder / f'{name}.onnx', tmp_path)
    shutil.copy(folder / 'plain.onnx.json', tmp_path)
    (tmp_path / 'half.onnx.json').write_text('{')
    assert runtime.load(tmp_path, 'cpu').metadata['precision'] == 'fp32'


def with_properties(source, target, **properties):
    proto = onnx.load(source)
    for p in proto.metadata_props:
        p.value = properties.get(p.key, p.value)
    onnx.save(proto, target)
    return target


def with_preprocessing(source, target, **changes):
    described = {p.key: p.value for p in onnx.load(source).metadata_props}['preprocessing']
    return with_properties(source, target, preprocessing=json.dumps({**json.loads(described), **changes}))


@pytest.mark.parametrize('make, message', [
    (lambda f, t: t / 'missing.onnx', 'There is no file or folder .*missing.onnx'),
    (lambda f, t: shutil.copy(f / 'plain.onnx', t / 'x.bin'), 'neither an .onnx file nor an .engine or .plan'),
    (lambda f, t: t, 'holds no ONNX file'),
    (lambda f, t: shutil.copy(f / 'plain.onnx', t / 'x.failed.onnx').parent, 'holds no ONNX file'),
    (lambda f, t: f / 'brain.onnx', 'no kernels for this precision here .*export it in fp32 or fp16'),
    (lambda f, t: (t / 'x.onnx').write_bytes((f / 'plain.onnx').read_bytes()[:9000]) and t / 'x.onnx', 'cannot load'),
    (lambda f, t: with_properties(f / 'plain.onnx', t / 'x.onnx', metadata_version='3'), 'metadata of version 3'),
    (lambda f, t: with_properties(f / 'plain.onnx', t / 'x.onnx', class_names='["a"]'), '1 classes but gives scores'),
    (lambda f, t: with_properties(f / 'plain.onnx', t / 'x.onnx', outputs='[]'), 'lacks a part of its metadata'),
    (lambda f, t: with_properties(f / 'plain.onnx', t / 'x.onnx', preprocessing='{}'), 'lacks a part of its metadata'),
    (lambda f, t: with_properties(f / 'plain.onnx', t / 'x.onnx', class_names='null'), 'lacks a part of its metadata'),
    (lambda f, t: with_properties(f / 'plain.onnx', t / 'x.onnx', input='[]'), 'lacks a part of its metadata'),
    *((lambda f, t, change=change: with_preprocessing(f / 'plain.onnx', t / 'x.onnx', **change), 'lacks a part of')
      for change in (dict(interpolation='x'), dict(interpolation=3), dict(input_size=[]), dict(crop_pct=0),
                     dict(mean=[0.5]), dict(std=[0, 1, 1]), dict(mean=[math.nan] * 3),
                     dict(crop_pct=99), dict(mean=['a', 'b', 'c']), dict(color='BGR'))),
    (lambda f, t: (t / 'x.engine').write_bytes(b'plan') and t / 'x.engine', 'There is no .*x.engine.json, which'),
    (lambda f, t: (t / 'x.engine.json').mkdir() or (t / 'x.engine').write_bytes(b'plan') and t / 'x.engine',
     'Cannot read .*x.engine.json: Is a directory'),
])
def test_bad_file_is_one_sentence(folder, tmp_path, make, message):
    with pytest.raises(runtime.RuntimeInputError, match=message) as error:
        runtime.load(make(folder, tmp_path), 'auto' if 'x.engine' in message else 'cpu')
    assert '\n' not in str(error.value)


def test_revision_of_what_is_here_is_refused(folder):
    for source in (folder, folder / 'plain.onnx'):
        with pytest.raises(runtime.RuntimeInputError, match='is a local path, which has no revisions'):
            runtime.load(source, 'cpu', revision='v1')


def test_foreign_file_and_future_opset_are_one_sentence(folder, tmp_path):
    proto = onnx.load(folder / 'plain.onnx')
    proto.opset_import[0].version = 99
    onnx.save(proto, tmp_path / 'future.onnx')
    with pytest.raises(runtime.RuntimeInputError, match='ONNX Runtime cannot load .*future.onnx'):
        runtime.load(tmp_path / 'future.onnx', 'cpu')
    proto = onnx.load(folder / 'plain.onnx')
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / 'foreign.onnx')
    with pytest.raises(runtime.RuntimeInputError, match='does not say its classes and preprocessing'):
        runtime.load(tmp_path / 'foreign.onnx', 'cpu')
    shutil.copy(folder / 'plain.onnx.json', tmp_path / 'foreign.onnx.json')  # as another tool may leave it
    assert runtime.load(tmp_path / 'foreign.onnx', 'cpu')(IMAGES / 'ship.png').label == 'ship'


@pytest.mark.parametrize('kind', [RuntimeError, onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException])
def test_gpu_that_does_not_start_is_told_and_prints_nothing_into_the_results(folder, monkeypatch, capsys, kind):
    """As where the driver is too old, of which ONNX Runtime prints four lines before it takes the CPU."""
    real = onnxruntime.InferenceSession

    def start(content, options, providers, **kwargs):
        if providers[0] != 'CPUExecutionProvider':
            if kwargs.get('enable_fallback', 1):
                print('*************** EP Error ***************')
            raise kind(f'{300 * "a signature "}: CUDA failure 35: CUDA driver version is insufficient ; GPU=0')
        return real(content, options, providers=['CPUExecutionProvider'], **kwargs)

    monkeypatch.setattr(onnxruntime, 'InferenceSession', start)
    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: ['CUDAExecutionProvider'])
    with pytest.raises(runtime.RuntimeInputError, match='driver version is insufficient; look at the driver, CUDA'):
        runtime.load(folder / 'plain.onnx', 'cuda')
    flags = ['--device', 'cuda', '--allow-fallback', '--json']
    with pytest.warns(match='ONNX Runtime continues on the CPU: CUDA failure 35'):
        runtime.main(['run', str(folder / 'plain.onnx'), str(IMAGES / 'ship.png'), *flags])
    printed = capsys.readouterr()
    assert json.loads(printed.out)['top'][0][0] == 'ship' and 'EP Error' not in printed.err


def test_error_of_the_file_is_none_of_the_gpu(folder, monkeypatch):
    session = runtime.load(folder / 'plain.onnx', 'cpu', allow_fallback=True).session

    class Failing:
        def run(self, *args):
            raise ERRORS.Fail('no such input')

        def get_providers(self):
            return ['CUDAExecutionProvider']

    session.session = Failing()
    with pytest.raises(runtime.RuntimeInputError, match='ONNX Runtime failed: no such input'):
        session.run(np.zeros((1, 3, 32, 32), dtype=np.float32))


@pytest.mark.parametrize('device, expected', [('auto', 'CPUExecutionProvider'), ('cuda', 'CUDAExecutionProvider')])
def test_int8_for_cpus_runs_on_one_unless_the_gpu_is_asked_for(folder, tmp_path, monkeypatch, device, expected):
    real, preloaded, started = onnxruntime.InferenceSession, [], []

    class OnGpu:
        def __init__(self, content, options, providers, **kwargs):
            self.providers = [p if isinstance(p, str) else p[0] for p in providers]
            assert self.providers[0] == 'CPUExecutionProvider' or providers[0][1]['use_tf32'] == '0'
            started.append(self.providers[0])
            self.real = real(content, options, providers=['CPUExecutionProvider'], **kwargs)

        def get_providers(self):
            return self.providers

        def __getattr__(self, name):
            return getattr(self.real, name)

    proto = onnx.load(folder / 'plain.onnx')
    onnx.helper.set_model_props(proto, {
        **{p.key: p.value for p in proto.metadata_props}, 'quantization': '{"target": "cpu"}'})
    onnx.save(proto, tmp_path / 'x.onnx')
    monkeypatch.setattr(onnxruntime, 'InferenceSession', OnGpu)
    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: [
        'CUDAExecutionProvider', 'CPUExecutionProvider'])
    monkeypatch.setattr(onnxruntime, 'preload_dlls', lambda: preloaded.append(print('missing')), raising=False)
    monkeypatch.setattr(runtime, 'query_gpu', lambda: dict(name='a GPU'))
    runner = runtime.load(tmp_path / 'x.onnx', device)
    assert runner.session.provider == started[-1] == expected
    assert ('CUDAExecutionProvider' in started) is bool(preloaded) is (device == 'cuda')
    assert runtime.load(folder / 'plain.onnx', device).session.provider == 'CUDAExecutionProvider'
    assert runner(IMAGES / 'ship.png').label == 'ship'


@pytest.mark.parametrize('threads', [0, -1])
def test_threads_are_one_at_least(folder, threads):
    with pytest.raises(runtime.RuntimeInputError, match=f'must be at least 1, not {threads}'):
        runtime.load(folder / 'plain.onnx', 'cpu', threads=threads)


def test_file_that_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(runtime.RuntimeInputError, match='cannot be read: Is a directory'):
        runtime.OnnxSession(tmp_path, 'cpu')


def test_fallback_from_the_gpu_is_an_error_unless_allowed(folder, tmp_path):
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    with pytest.raises(runtime.RuntimeInputError, match='CUDAExecutionProvider.*--allow-fallback'):
        runtime.load(folder / 'plain.onnx', 'cuda')
    with pytest.warns(UserWarning, match='ONNX Runtime runs on the CPU: this onnxruntime has no CUDAExecutionProvider'):
        session = runtime.load(folder / 'plain.onnx', 'cuda', allow_fallback=True).session
    assert session.provider == 'CPUExecutionProvider'
    (tmp_path / 'both').mkdir()
    for name, precision in (('a', 'fp16'), ('b', 'fp32')):
        shutil.copy(folder / 'plain.onnx', tmp_path / 'both' / f'{name}.onnx')
        metadata = dict(json.loads((folder / 'plain.onnx.json').read_text()), precision=precision)
        (tmp_path / 'both' / f'{name}.onnx.json').write_text(json.dumps(metadata))
    assert runtime._find(tmp_path / 'both', 'cuda', None, allow_fallback=True).name == 'b.onnx'  # fp16 is for GPUs


def test_first_of_equal_classes_is_the_label_and_the_best():
    p = runtime.Prediction(Image.new('RGB', (1, 1)), np.full(4, 0.25), None, list('abcd'), [])
    assert p.label == p.top(1)[0][0] == 'a' and [name for name, _ in p.top()] == ['a', 'b', 'c']


ERRORS = onnxruntime.capi.onnxruntime_pybind11_state


@pytest.mark.parametrize('error, said', [
    (ERRORS.EPFail('cuDNN failed'), 'cuDNN failed'),
    (ERRORS.Fail(
        '[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Conv node. Status Message: CUDNN '
        'failure 1001: CUDNN_STATUS_NOT_INITIALIZED ; GPU=0 ; hostname=h ; file=conv.cc'),
     'CUDNN failure 1001: CUDNN_STATUS_NOT_INITIALIZED'),
    (ERRORS.RuntimeException(
        '[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : running Conv node: /src/bfc_arena.cc:376 void* '
        'onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) Failed to allocate memory for requested buffer of '
        'size 9'), 'Failed to allocate memory for requested buffer of size 9'),
], ids=['EPFail', 'Fail', 'RuntimeException'])
@pytest.mark.parametrize('allowed', [False, True])
def test_failure_of_the_gpu_at_run_time_goes_on_with_the_cpu_if_allowed_alone(folder, allowed, error, said):
    session = runtime.load(folder / 'plain.onnx', 'cpu', allow_fallback=allowed).session
    calls, all_at_once = [], threading.Barrier(3)

    class Failing:
        def run(self, *args):
            calls.append(args)
            if all_at_once.wait(30) == 0:  # later than the others
                time.sleep(1)
            raise error

        def get_providers(self):
            return ['CUDAExecutionProvider', 'CPUExecutionProvider']

    session.session = failing = Failing()
    results = []

    def work():
        try:
            results.append(session.run(np.zeros((1, 3, 32, 32), dtype=np.float32))[0].shape)
        except runtime.RuntimeInputError as e:
            results.append(str(e))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == 3 * ([(1, 10)] if allowed else [f'ONNX Runtime failed: {said}'])
    assert len(calls) == 3 and (session.session is failing) is not allowed


def test_both_packages_of_onnxruntime_are_refused(folder, monkeypatch):
    monkeypatch.setattr(runtime.importlib.metadata, 'distribution', lambda name: object())
    with pytest.raises(runtime.RuntimeInputError, match='pip uninstall -y onnxruntime onnxruntime-gpu'):
        runtime.load(folder / 'plain.onnx', 'cpu')


def test_hub_repository_that_cannot_be_had_is_one_sentence(monkeypatch):
    with pytest.raises(runtime.RuntimeInputError, match='nobody/nothing cannot be fetched from the Hub') as error:
        runtime.load('nobody/nothing')
    assert '\n' not in str(error.value)


def test_input_and_images_that_cannot_be_used_are_one_sentence(folder):
    session = runtime.load(folder / 'plain.onnx', 'cpu').session
    with pytest.raises(runtime.RuntimeInputError, match='ONNX Runtime failed'):
        session.run(np.zeros((1, 3, 31, 32), dtype=np.float32))
    with pytest.raises(runtime.RuntimeInputError, match='images is a folder; name the images in it'):
        runtime.read_image(IMAGES)
    with pytest.raises(runtime.RuntimeInputError, match='dtype float32; give uint8'):
        runtime.read_image(np.zeros((4, 4, 3), dtype=np.float32))
    with pytest.raises(runtime.RuntimeInputError, match='The image has no pixels'):
        runtime.read_image(np.zeros((0, 4, 3), dtype=np.uint8))


def test_unwritable_picture_is_one_sentence(folder):
    run = run_script(folder, 'patches.onnx', IMAGES / 'ship.png', '--explain', '/proc/none/x.png')
    assert run.returncode == 2 and run.stderr.startswith('error: Cannot write /proc/none/x.png')


@pytest.mark.parametrize('flags, message', [
    (['--batch-size', '0'], 'must be at least 1'), (['--top', '0'], 'must be at least 1'),
    (['--explain', 'x.jpg'], 'writes PNG files, not .jpg')])
def test_flags_of_run_that_cannot_be_used_are_one_sentence(folder, flags, message):
    with pytest.raises(runtime.RuntimeInputError, match=message):
        runtime.main(['run', str(folder / 'patches.onnx'), str(IMAGES / 'ship.png'), *flags])


@pytest.mark.parametrize('more, code, said', [
    ([], 0, ''), (['none.png'], 2, r'error: .*none\.png.*\nerror: 1 of 2 .*\n')])
def test_output_that_nobody_reads_is_no_error(folder, more, code, said):
    command = [sys.executable, 'runtime.py', 'run', 'plain.onnx', str(IMAGES / 'ship.png'), *more]
    env = {**os.environ, 'PYTHONUNBUFFERED': ''}  # so that there is something left to write at the end
    with subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as run:
        run.stdout.close()  # as `head` does, once it has its lines
        assert re.fullmatch(said, run.stderr.read()) and run.wait() == code


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no device that is always full')
def test_full_disk_under_the_output_is_one_sentence(folder):
    command = [sys.executable, str(ROOT / 'export' / 'runtime.py'), 'run', str(folder / 'plain.onnx')]
    with open('/dev/full', 'w') as full:
        run = subprocess.run(
            [*command, str(IMAGES / 'ship.png'), '--device', 'cpu'], stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 2 and run.stderr == 'error: The output cannot be written: No space left on device.\n'


def test_file_loaded_before_a_fork_is_refused_after_it(folder, monkeypatch):
    runner = runtime.load(folder / 'plain.onnx', 'cpu')
    worker = os.getpid() + 1
    monkeypatch.setattr(os, 'getpid', lambda: worker)
    with pytest.raises(runtime.RuntimeInputError, match='load it in each worker'):
        runner(IMAGES / 'ship.png')


def test_file_that_was_closed_is_refused(folder):
    with runtime.load(folder / 'plain.onnx', 'cpu') as runner:
        assert runner(IMAGES / 'ship.png').label == 'ship'
    with pytest.raises(runtime.RuntimeInputError, match='plain.onnx was closed; load it again'):
        runner(IMAGES / 'ship.png')


def test_prediction_that_is_kept_keeps_no_others(folder):
    predictions = runtime.load(folder / 'patches.onnx', 'cpu')([IMAGES / 'ship.png', IMAGES / 'bird.png'])
    for array in (predictions[0].probabilities, predictions[0].patch_probabilities):
        assert array.base is None or array.base.nbytes == array.nbytes


@pytest.mark.parametrize('code, message', [
    (0, None), (100, None), (34, None), (3, 'started before this process was forked'),
    (804, r'driver does not start \(CUDA error 804\); see what nvidia-smi says, or use the CPU with --device cpu')])
def test_driver_that_does_not_start_is_not_taken_for_no_gpu(folder, monkeypatch, code, message):
    class Driver:
        def __getattr__(self, name):
            return lambda *args: code if name == 'cuInit' else 0

    monkeypatch.setattr(runtime.ctypes, 'CDLL', lambda name: Driver())
    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: [
        'CUDAExecutionProvider', 'CPUExecutionProvider'])
    if message is None:
        assert runtime.query_gpu() is None
        return
    for source in (folder / 'plain.onnx', folder):
        with pytest.raises(runtime.RuntimeInputError, match=message):
            runtime.load(source)
        with pytest.warns(UserWarning, match='ONNX Runtime runs on the CPU: ') as told:
            assert runtime.load(source, allow_fallback=True)(IMAGES / 'ship.png').label == 'ship'
        assert len(told) == 1


@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity'), reason='no affinity here')
def test_threads_are_no_more_than_the_cores_that_are_allowed(folder, monkeypatch):
    found = []
    real = onnxruntime.InferenceSession

    def start(content, options, **kwargs):
        found.append(options.intra_op_num_threads)
        return real(content, options, **kwargs)

    monkeypatch.setattr(onnxruntime, 'InferenceSession', start)
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    for allowed in ({0, 1}, set(range(64))):
        monkeypatch.setattr(os, 'sched_getaffinity', lambda pid, allowed=allowed: allowed)
        runtime.load(folder / 'plain.onnx', 'cpu')
    runtime.load(folder / 'plain.onnx', 'cpu', threads=3)
    assert found == [2, 0, 3]


@pytest.mark.parametrize('error', ['ImportError', 'FileNotFoundError'])  # the latter on Windows
def test_library_that_is_broken_is_not_called_missing(tmp_path, monkeypatch, error):
    (tmp_path / 'tensorrt.py').write_text(f"raise {error}('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'tensorrt', raising=False)
    with pytest.raises(runtime.RuntimeInputError, match='tensorrt is installed but cannot be imported .libnvinfer'):
        runtime.import_tensorrt()


@pytest.mark.parametrize('preprocessing', [None, 'NHWC'])
def test_grey_networks_run_as_in_pytorch(trained_like, write_unchecked, tmp_path, preprocessing):
    model = trained_like('rn26_tm', in_chans=1)
    model.pretrained_cfg = dict(model.pretrained_cfg, label_names=list('abcdefghij'))
    write_unchecked(model, tmp_path / 'x.onnx', OnnxOptions(patch_logits=True, preprocessing=preprocessing))
    runner = runtime.load(tmp_path / 'x.onnx', 'cpu')
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, s, dtype=np.uint8) for s in ((32, 32), (32, 32, 3), (50, 40, 3))]
    for picture, prediction in zip(pictures, runner(pictures, batch_size=2), strict=True):
        np.testing.assert_allclose(prediction.probabilities, explain(model, picture).probabilities, atol=1e-4)
