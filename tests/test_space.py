"""The Space in a real browser: upload, result, another class, another network, a file that is no image, a phone."""
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
import timm
from huggingface_hub import SpaceCard
from PIL import Image

from export.images import add_image_options
from export.runtime import load
from hub_cards import build_space
from hub_cards.build_space import build, main
from timm_tmblock.checkpoint import save_weights
from timm_tmblock.errors import InputError

ROOT = Path(__file__).parent.parent
APP = ROOT / 'hub_cards' / 'space'
PYTHON = Path(sys.prefix) / 'space' / 'bin' / 'python'
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync']
SHIP = ROOT / 'train' / 'sample' / 'images' / 'ship.png'
INSTALLED = list(PYTHON.parent.parent.glob('lib/python*/site-packages/gradio/__init__.py'))
needs_gradio = pytest.mark.skipif(not INSTALLED, reason='the Space is not installed: make .venv/space')
in_browser = [needs_gradio, pytest.mark.skipif(CHROMIUM is None, reason='there is no chromium')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The folder of a Space with the shipped network, two without template matching and one with its own templates."""
    from conftest import make_trained_like
    parser = ArgumentParser()
    add_image_options(parser)
    args = parser.parse_args(['--check-images', '10'])
    labels = timm.get_pretrained_cfg('rn26_tm').label_names
    others = []
    for name, kwargs in (('rn26', {}), ('rn26_tm', dict(num_templates=7)), ('rn26', dict(global_pool='max'))):
        others.append(make_trained_like(timm.create_model(name, **kwargs)).eval())
        others[-1].pretrained_cfg = dict(others[-1].pretrained_cfg, label_names=labels)
    shipped = timm.create_model('rn26_tm', pretrained=True).eval()
    models = [('rn26', others[0]), ('rn26_tm', shipped), ('rn26_tm.few', others[1]), ('rn26.max', others[2])]
    output = tmp_path_factory.mktemp('space') / 'space'
    build(output, models, args)
    return output


@pytest.fixture(scope='module')
def address(folder, tmp_path_factory):
    """Address of the running Space."""
    place = tmp_path_factory.mktemp('running')
    log = place / 'log.txt'
    shutil.copytree(folder, place, dirs_exist_ok=True)  # gradio writes beside the app
    environment = dict(
        os.environ, GRADIO_ANALYTICS_ENABLED='0', GRADIO_TEMP_DIR=str(place / 'uploads'), PYTHONUNBUFFERED='1',
        OMP_NUM_THREADS='1')
    environment.pop('PYTHONPATH', None)
    with log.open('w') as stream:
        app = subprocess.Popen([PYTHON, 'app.py'], cwd=place, env=environment, stdout=stream, stderr=stream)
    try:
        for _ in range(600):
            found = re.search(r'http://127\.0\.0\.1:\d+', log.read_text())
            if found or app.poll() is not None:
                break
            time.sleep(0.2)
        assert found, log.read_text()
        yield found[0]
    finally:
        app.kill()
        app.wait()


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """A function that opens the Space on a screen; nothing but the Space answers."""
    contexts = []

    def open_page(**screen):
        contexts.append(browser.new_context(**screen))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.route('**/*', lambda route: (
            route.continue_() if route.request.url.startswith((address, 'data:', 'blob:')) else route.abort()))
        page.goto(address, wait_until='domcontentloaded')
        page.wait_for_selector('input[type=file]', state='attached')
        return page

    yield open_page
    for context in contexts:
        context.close()


def upload(page, path):
    page.set_input_files('input[type=file]', path)
    page.wait_for_selector('.tm-result')


def shown_maps(page):
    """Alternative texts of the maps one can see."""
    return page.eval_on_selector_all(
        '.tm-result:first-of-type .tm-heat',
        'maps => maps.filter(m => +getComputedStyle(m).opacity > 0).map(m => m.alt)')


def wait_for_map(page, name):
    """Wait until the map of this alternative text is the one one sees, which a busy browser draws late."""
    page.wait_for_function(
        '''name => [...document.querySelectorAll('.tm-result:first-of-type .tm-heat')]
        .filter(m => +getComputedStyle(m).opacity > 0).map(m => m.alt).join() == name''', arg=name)


def look_apart(a, b):
    """Whether two screenshots show different things; edges may be drawn differently."""
    a, b = (np.asarray(Image.open(io.BytesIO(png)).convert('RGB')).astype(int) for png in (a, b))
    return a.shape != b.shape or np.abs(a - b).mean() > 1


def choose(page, label, value):
    page.get_by_label(label, exact=True).click()
    page.get_by_role('option', name=value, exact=True).click()
    page.get_by_role('option').first.wait_for(state='detached')  # it fades out, over the next one's options


def make_file(folder, kind):
    path = folder / f'{kind}.png'
    if kind == 'text':
        path.write_bytes(b'this is no image')
    elif kind == 'empty':
        path.write_bytes(b'')
    else:  # cut short: the header is there, the pixels are not
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    return path


class TestInBrowser:
    pytestmark = in_browser

    def test_result_of_an_uploaded_image_is_that_of_the_runtime(self, open_page, folder):
        page = open_page()
        upload(page, SHIP)
        prediction = load(folder / 'models' / 'rn26_tm.onnx', 'cpu')(SHIP)
        section = page.locator('.tm-result').first
        rows = [row.split('\n') for row in section.locator('.tm-row').all_inner_texts()][1:]
        best = prediction.patch_probabilities.argmax(0)
        assert [row[0] for row in rows] == [name for name, _ in prediction.top(10)]
        for name, probability, regions in rows:
            i = prediction.class_names.index(name)
            assert float(probability.split()[0]) == pytest.approx(100 * prediction.probabilities[i], abs=0.051)
            assert int(regions) == (best == i).sum()
        for i, name in enumerate(prediction.class_names):
            url = section.get_by_alt_text(f'Where {name} was matched').get_attribute('src')
            heat = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(',')[1]))))
            assert heat.shape == (8, 8, 4)
            np.testing.assert_allclose(heat[..., 3] / 255, prediction.patch_probabilities[i], atol=0.5 / 255 + 1e-6)
        cells = section.locator('.tm-grid i').evaluate_all('cells => cells.map(c => c.title)')
        assert [cell.rsplit(' ', 2)[0] for cell in cells] == [prediction.class_names[k] for k in best.ravel()]

    def test_another_class_changes_the_map(self, open_page):
        page = open_page()
        upload(page, SHIP)
        view = page.locator('.tm-result').first.locator('.tm-seen')
        page.mouse.move(0, 0)
        wait_for_map(page, 'Where ship was matched')
        first = view.screenshot()
        page.locator('.tm-row', has_text='truck').first.hover()  # a look
        wait_for_map(page, 'Where truck was matched')
        assert look_apart(view.screenshot(), first)
        page.mouse.move(0, 0)
        wait_for_map(page, 'Where ship was matched')
        assert not look_apart(view.screenshot(), first)
        page.locator('.tm-row', has_text='truck').first.click()  # a choice
        page.mouse.move(0, 0)
        wait_for_map(page, 'Where truck was matched')
        assert look_apart(view.screenshot(), first)
        rows = page.locator('.tm-result').first.locator('.tm-row').all_inner_texts()[1:]
        names = [row.split('\n')[0] for row in rows]
        page.keyboard.press('ArrowUp')  # without a mouse
        wait_for_map(page, f'Where {names[names.index("truck") - 1]} was matched')

    def test_next_image_shows_the_map_of_its_own_class(self, open_page):
        page = open_page()
        upload(page, SHIP)
        page.locator('.tm-row', has_text='truck').first.click()
        page.mouse.move(0, 0)
        wait_for_map(page, 'Where truck was matched')
        page.set_input_files('input[type=file]', SHIP.with_name('frog.png'))
        wait_for_map(page, 'Where frog was matched')

    def test_networks_are_compared(self, open_page, folder):
        page = open_page()
        assert page.get_by_label('Model', exact=True).input_value() == 'rn26_tm'
        assert page.get_by_label('Compare with', exact=True).input_value() == 'rn26'
        choose(page, 'Compare with', 'nothing')
        upload(page, SHIP)
        choose(page, 'Compare with', 'rn26')
        page.wait_for_selector('.tm-result h2:text-is("rn26")')
        assert page.locator('.tm-result h2').all_inner_texts() == ['rn26_tm', 'rn26']
        baseline = page.locator('.tm-result').nth(1)
        assert 'Class activation map, no template matching' in baseline.inner_text()
        prediction = load(folder / 'models' / 'rn26.onnx', 'cpu')(SHIP)
        for i, name in enumerate(prediction.class_names):
            url = baseline.get_by_alt_text(f'Class activation of {name}', exact=True).get_attribute('src')
            heat = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(',')[1]))))
            np.testing.assert_allclose(heat[..., 3] / 255, prediction.evidence(i), atol=0.5 / 255 + 1e-6)
        choose(page, 'Compare with', 'rn26.max')  # which has no class activation maps either
        page.wait_for_selector('.tm-result h2:text-is("rn26.max")')
        assert 'This file has no patch scores' in baseline.inner_text()
        assert baseline.locator('.tm-heat').count() == 0 and baseline.locator('.tm-row').count() == 11
        choose(page, 'Compare with', 'nothing')
        page.wait_for_function("document.querySelectorAll('.tm-result').length == 1")
        choose(page, 'Model', 'rn26_tm.few')  # templates that are no classes
        page.wait_for_selector('.tm-result h2:text-is("rn26_tm.few")')
        assert page.locator('.tm-rows').count() == 2 and page.locator('.tm-heat').count() == 7
        assert len(shown_maps(page)) == 1

    @pytest.mark.parametrize('kind, message', [
        ('text', 'text.png is empty or not an image Pillow can read'),
        ('empty', 'empty.png is empty or not an image Pillow can read'),
        ('cut', 'cut.png cannot be decoded')])
    def test_file_that_is_no_image_gives_one_sentence_and_the_next_one_works(self, open_page, tmp_path, kind, message):
        page = open_page()
        page.set_input_files('input[type=file]', make_file(tmp_path, kind))
        problem = page.wait_for_selector('[role=alert].tm-problem').inner_text()
        assert problem.startswith(message) and '/' not in problem and problem.count('. ') == 0
        page.get_by_label('Clear').or_(page.get_by_label('Remove Image')).first.click()
        upload(page, SHIP)
        assert page.locator('.tm-problem').count() == 0

    def test_an_example_is_classified(self, open_page):
        page = open_page()
        page.locator('.gallery button, .gallery-item').first.click()
        page.wait_for_selector('.tm-result')
        assert page.locator('.tm-row').nth(1).inner_text().startswith('airplane')
        assert page.locator('.gallery-item').count() == 10

    def test_phone(self, open_page):
        page = open_page(viewport=dict(width=375, height=667), is_mobile=True, has_touch=True)
        upload(page, SHIP)
        page.wait_for_timeout(500)  # layout
        assert page.evaluate('document.documentElement.scrollWidth') <= 375
        for box in (page.locator('.tm-seen').first.bounding_box(), page.locator('.tm-rows').first.bounding_box()):
            assert box['x'] >= 0 and box['x'] + box['width'] <= 375 and box['width'] >= 250
        row = page.locator('.tm-row', has_text='truck').first
        row.tap()
        wait_for_map(page, 'Where truck was matched')
        assert row.bounding_box()['height'] >= 20


@needs_gradio
def test_programs_get_the_probabilities(address, folder):
    code = (
        'import json, sys; from gradio_client import Client, handle_file; '
        'print(json.dumps(Client(sys.argv[1], verbose=False).predict('
        'handle_file(sys.argv[2]), "rn26_tm", api_name="/classify")))')
    out = subprocess.run([PYTHON, '-c', code, address, SHIP], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr[-2000:]
    prediction = load(folder / 'models' / 'rn26_tm.onnx', 'cpu')(SHIP)
    got = json.loads(out.stdout)
    assert list(got) == list(prediction.class_names)
    np.testing.assert_allclose(list(got.values()), prediction.probabilities, atol=1e-5)


@needs_gradio
def test_space_runs_on_what_it_asks_for():
    installed = subprocess.run([PYTHON, '-m', 'pip', 'list', '--format', 'json'], capture_output=True, text=True)
    versions = {package['name'].lower(): package['version'] for package in json.loads(installed.stdout)}
    assert 'torch' not in versions and 'timm' not in versions
    assert versions['gradio'] == SpaceCard.load(APP / 'README.md').data.sdk_version


@needs_gradio
def test_space_without_models_says_so(folder, tmp_path):
    for name in ('app.py', 'runtime.py'):
        shutil.copy(folder / name, tmp_path)
    environment = dict(os.environ, GRADIO_ANALYTICS_ENABLED='0', MODELS='')
    out = subprocess.run([PYTHON, 'app.py'], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert out.returncode == 1 and 'Traceback' not in out.stderr
    assert out.stderr.startswith('There are no models: put ONNX files into models/')


@needs_gradio
def test_second_of_the_named_models_is_what_the_first_is_compared_with(folder, tmp_path):
    for name in ('app.py', 'runtime.py'):
        shutil.copy(folder / name, tmp_path)
    for name, file in dict(a='rn26_tm', b='rn26_tm.few', c='rn26').items():
        (tmp_path / name).mkdir()
        for suffix in ('onnx', 'onnx.json'):
            shutil.copy(folder / 'models' / f'{file}.{suffix}', tmp_path / name)
    code = 'import app; print([b.value for b in app.build().blocks.values() if type(b).__name__ == "Dropdown"])'
    models = ', '.join(str(tmp_path / name) for name in 'abc')
    environment = dict(os.environ, GRADIO_ANALYTICS_ENABLED='0', MODELS=models)
    out = subprocess.run([PYTHON, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert out.stdout.splitlines()[-1:] == ["['a', 'b']"], out.stderr[-2000:]


def test_folder_is_complete(folder):
    files = {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}
    names = ('rn26', 'rn26.max', 'rn26_tm', 'rn26_tm.few')
    onnx = {f'models/{name}.onnx{end}' for name in names for end in ('', '.json')}
    examples = {f'examples/{path.name}' for path in (ROOT / 'train' / 'sample' / 'images').glob('*.png')}
    assert files == {'README.md', 'app.py', 'requirements.txt', 'runtime.py'} | onnx | examples and len(examples) == 10
    card = SpaceCard.load(folder / 'README.md').data
    assert card.sdk == 'gradio' and (folder / card.app_file).is_file() and len(card.short_description) <= 60


def test_examples_may_be_ones_own(tmp_path):
    (tmp_path / 'birds').mkdir()
    for name in ('crow.jpg', 'owl.png'):
        shutil.copy(SHIP, tmp_path / 'birds' / name)
    parser = ArgumentParser()
    add_image_options(parser)
    build(tmp_path / 'space', [], parser.parse_args([]), examples=[tmp_path / 'birds' / 'crow.jpg'])
    assert [path.name for path in (tmp_path / 'space' / 'examples').iterdir()] == ['crow.jpg']
    for examples, message in (
            ([tmp_path / 'birds', tmp_path / 'birds' / 'owl.png'], 'and .*owl.png are called alike; rename one'),
            ([tmp_path / 'gone.png'], 'gone.png is not there, or no image'),
            ([ROOT / 'README.md'], 'README.md is not there, or no image')):
        with pytest.raises(InputError, match=message):
            main(['rn26_tm', '--output', str(tmp_path / 'new'), '--examples', *map(str, examples)])
    assert not (tmp_path / 'new').exists()


def test_page_names_the_license_of_the_shipped_weights_and_none_for_others(tmp_path):
    model = timm.create_model('rn26_tm', pretrained=True).eval()
    save_weights(tmp_path / 'own.safetensors', model.state_dict(), dict(model='rn26_tm'))
    for name in ('rn26_tm', str(tmp_path / 'own.safetensors')):
        folder = tmp_path / Path(name).stem
        main([name, '--output', str(folder), '--check-images', '8'])
        shipped = name == 'rn26_tm'
        assert SpaceCard.load(folder / 'README.md').data.license == ('apache-2.0' if shipped else None), name


def test_folder_from_a_checkout_that_is_read_only_can_be_written(tmp_path, monkeypatch):
    app = tmp_path / 'app'
    shutil.copytree(build_space.APP, app, ignore=shutil.ignore_patterns('__pycache__'))
    app.chmod(0o555)
    monkeypatch.setattr(build_space, 'APP', app)
    parser = ArgumentParser()
    add_image_options(parser)
    build(tmp_path / 'space', [], parser.parse_args([]))
    assert (tmp_path / 'space').stat().st_mode & 0o777 == 0o755


def test_what_a_killed_run_left_is_in_nobodys_way(tmp_path):
    (tmp_path / '.space.tmp').mkdir()
    (tmp_path / '.space.tmp' / 'app.py').write_text('half')
    parser = ArgumentParser()
    add_image_options(parser)
    build(tmp_path / 'space', [], parser.parse_args([]))
    assert [p.name for p in tmp_path.iterdir()] == ['space']


def test_folder_one_is_in_will_do(tmp_path, monkeypatch):
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    parser = ArgumentParser()
    add_image_options(parser)
    build(Path('.'), [], parser.parse_args([]))
    assert (tmp_path / 'here' / 'app.py').is_file()


def test_folder_is_never_overwritten(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'a.txt').write_text('mine')
    with pytest.raises(InputError, match='mine is not an empty folder; name another, or empty it'):
        main(['rn26_tm', '--output', str(tmp_path / 'mine')])
    with pytest.raises(InputError, match='Two models are called alike'):
        main(['rn26_tm', 'rn26_tm', '--output', str(tmp_path / 'new')])
    with pytest.raises(InputError, match='no_model is not a model with pretrained weights'):
        main(['no_model', '--output', str(tmp_path / 'new')])
    assert [path.name for path in tmp_path.rglob('*')] == ['mine', 'a.txt']
