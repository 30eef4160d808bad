"""Explanations say what the network computed, at the right place, for any image."""
import io
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from export import runtime
from export.metadata import describe_model
from export.runtime import Prediction
from timm_tmblock import Explainer, Explanation, InputError, PatchSupervised, explain
from timm_tmblock.__main__ import main
from timm_tmblock.errors import exiting_on_input_error
from timm_tmblock.explanation import class_color, forward_class_activation
from timm_tmblock.image import IMAGE_SUFFIXES, list_images, read_image
from timm_tmblock.models import PreActResNet

ROOT = Path(__file__).parent.parent
NAMES = ['ant', 'bee', 'cat']


def make_explanation(patch_probabilities, size=(16, 16), probabilities=(0.7, 0.2, 0.1)) -> Explanation:
    return Explanation(Image.new('RGB', size, 'gray'), np.array(probabilities), patch_probabilities, NAMES, NAMES)


@pytest.fixture
def regions():
    """Ant everywhere but for one region of bee at the upper right."""
    p = np.empty((3, 4, 4))
    p[0], p[1], p[2] = 0.8, 0.1, 0.1
    p[:, 0, 3] = 0.05, 0.9, 0.05
    return p


def test_probabilities_are_the_networks(trained_like):
    model = trained_like('rn26_tm')
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    explanation = explain(model, image)
    x = create_transform(**resolve_data_config(model=model))(Image.fromarray(image))[None]
    with torch.no_grad():
        logits, patch_logits = model.forward_patch_logits(x)
    np.testing.assert_allclose(explanation.probabilities, logits.softmax(1)[0], atol=1e-6)
    np.testing.assert_allclose(explanation.patch_probabilities, patch_logits.softmax(1)[0], atol=1e-6)
    assert explanation.patch_classes.tolist() == patch_logits[0].argmax(0).tolist()
    assert explanation.top(1)[0][1] == pytest.approx(logits.softmax(1).max().item(), abs=1e-6)


@pytest.mark.parametrize('batch_size', [1, 2, 5])
@pytest.mark.parametrize('name', ['rn20', 'rn26_tm', 'wrn16', 'dn100_tm', 'dn100_tm_cat'])
def test_logits_are_the_mean_of_class_activation_maps(trained_like, name, batch_size):
    model = trained_like(name).double()
    x = torch.randn(batch_size, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        logits, maps = forward_class_activation(model, x)
        expected, features = model(x), model.forward_features(x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(maps.mean((2, 3)), expected, rtol=0, atol=1e-10)
    for i, j in ((0, 0), (3, 5)):  # the classifier of that position alone
        torch.testing.assert_close(maps[:, :, i, j], model.fc(features[:, :, i, j]), rtol=0, atol=1e-10)


def test_grad_cam_of_captum_is_the_class_activation_map(trained_like):
    captum = pytest.importorskip('captum.attr')
    model = trained_like('rn26_tm').double()
    x, target = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([4, 0, 9])
    grad_cam = captum.LayerGradCam(model, model.norm).attribute(x, target)[:, 0].detach()
    maps = forward_class_activation(model, x)[1].detach()[torch.arange(3), target]
    torch.testing.assert_close(grad_cam * grad_cam[0].numel(), maps - model.fc.bias[target, None, None].detach())


@pytest.mark.parametrize('name', ['rn26', 'rn26_tm'])
def test_class_activation_maps_explain_networks_with_and_without_templates(trained_like, name):
    model = trained_like(name, **(dict(num_templates=4) if name == 'rn26_tm' else {}))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    explanation = explain(model, image, method='cam')
    x = create_transform(**resolve_data_config(model=model))(Image.fromarray(image))[None]
    with torch.no_grad():
        logits, maps = forward_class_activation(model, x)
    np.testing.assert_allclose(explanation.probabilities, logits.softmax(1)[0], atol=1e-6)
    np.testing.assert_allclose(explanation.patch_probabilities, maps.softmax(1)[0], atol=1e-6)
    scores = F.interpolate(maps.clip(min=0) / maps.max(), (32, 32), mode='bilinear')[0]
    for i, name in enumerate(explanation.template_names):
        np.testing.assert_allclose(explanation.heat_map(name), scores[i], atol=1e-5)
    assert explanation.method == 'cam' and len(explanation.template_names) == 10
    assert explanation.picture().width > 500


@pytest.mark.parametrize('create, message', [
    (lambda: timm.create_model('rn26', global_pool='max'), 'average pooling and a linear classifier'),
    (lambda: timm.create_model('resnet18', num_classes=10), 'a linear classifier, which ResNet is not'),
    (lambda: timm.create_model('rn26', num_classes=0), 'average pooling and a linear classifier')])
def test_network_without_class_activation_maps_is_refused(create, message):
    with pytest.raises(InputError, match=message):
        Explainer(create(), method='cam')


def test_method_there_is_not_is_refused(trained_like):
    with pytest.raises(InputError, match="no method 'lime'; the methods are match, cam"):
        Explainer(trained_like('rn26_tm'), method='lime')


@pytest.mark.parametrize('training', [True, False])
def test_model_is_evaluated_and_left_as_it_was(trained_like, training):
    model = trained_like('rn26_tm').train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    explain(model, np.zeros((32, 32, 3), np.uint8))
    assert model.training == training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_frozen_norms_stay_frozen(trained_like):
    model = trained_like('rn26_tm').train()
    model.norm.eval()
    explain(model, np.zeros((32, 32, 3), dtype=np.uint8))
    assert model.training and not model.norm.training
    with pytest.raises(RuntimeError):
        Explainer(model).run(np.zeros((1, 5, 32, 32), dtype=np.float32))
    assert model.training and model.conv1.training


@pytest.mark.parametrize('mode', ['center', 'squash'])
@pytest.mark.parametrize('size', [(100, 100), (100, 20), (40, 90)])
def test_image_of_an_explanation_is_what_the_network_saw(size, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    pixels[:size[1] // 4] = pixels[:, :size[0] // 4] = 0  # black where a crop may or may not reach
    model = timm.create_model('rn26_tm', img_size=(32, 64), pretrained_cfg_overlay=dict(crop_mode=mode)).eval()
    seen = []
    model.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    shown = explain(model, pixels).image.resize((64, 32), Image.Resampling.BILINEAR)
    mean, std = (np.array(model.pretrained_cfg[k]) for k in ('mean', 'std'))
    expected = (seen[0][0].permute(1, 2, 0).numpy() * std + mean) * 255
    assert np.abs(np.asarray(shown) - expected).mean() < 20  # bicubic or bilinear, and a pixel of rounding


def test_heat_map_peaks_where_the_class_matched(regions):
    heat = make_explanation(regions, size=(64, 64)).heat_map('bee')
    assert heat.shape == (64, 64)
    row, col = np.unravel_index(heat.argmax(), heat.shape)
    assert row < 16 and col >= 48
    assert heat.max() == pytest.approx(0.9, abs=1e-3) and heat.min() == pytest.approx(0.1, abs=1e-3)


def test_heat_map_is_of_the_predicted_class_by_default(regions):
    explanation = make_explanation(regions)
    np.testing.assert_array_equal(explanation.heat_map(), explanation.heat_map('ant'))


def test_picture_colours_each_region_by_its_class(regions):
    size = 64
    picture = np.asarray(make_explanation(regions, size=(64, 64)).picture(size=size)).astype(int)
    panel = picture[36:36 + size, 2 * 16 + size:2 * 16 + 2 * size]
    ant, bee = panel[40, 20], panel[8, 56]
    assert np.array_equal(panel[60, 4], ant) and not np.array_equal(ant, bee)
    legend = picture[36 + size:, 2 * 16 + size:2 * 16 + 2 * size].reshape(-1, 3)
    assert {(31, 119, 180), (255, 127, 14)} <= set(map(tuple, legend))  # both classes
    assert (44, 160, 44) not in set(map(tuple, legend))  # no region matched it


def test_legend_names_the_classes_there_are_most_frequent_first(monkeypatch):
    p = np.full((3, 4, 4), 0.1)
    p[2], p[1, 0, 0] = 0.5, 0.9  # cow, but for one region of bee; nowhere ant
    written = []
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, 'text', lambda self, xy, text, *args, **kwargs: (
        written.append((xy, text)), draw(self, xy, text, *args, **kwargs))[1])
    size = 200
    picture = np.asarray(make_explanation(p).picture('bee', size=size))
    assert 'Match with "bee"' in [text for _, text in written]
    legend = [(xy, text) for xy, text in written if re.fullmatch(r'\w+ \d+ %', text)]
    assert [text for _, text in legend] == [f'{NAMES[2]} 94 %', f'{NAMES[1]} 6 %']
    for (x, y), index in zip((xy for xy, _ in legend), (2, 1)):
        assert tuple(picture[y + 8, x - 10]) == class_color(index)
    assert len({class_color(i) for i in range(100)}) == 100


def test_legend_has_of_long_names_what_fits_its_column(monkeypatch):
    names = ['black-footed albatross', 'bee', 'long-tailed jaeger of the north']
    p = np.full((3, 4, 4), 0.1)
    p[0, :2], p[2, 2:] = 0.9, 0.9
    drawn = []
    monkeypatch.setattr(ImageDraw.ImageDraw, 'text', lambda self, xy, text, *args, font, **kwargs: drawn.append(
        (xy[0], text, font.getlength(text))))
    Explanation(Image.new('RGB', (16, 16)), np.array([0.7, 0.2, 0.1]), p, names, names).picture('bee', size=280)
    legend = [(x, text, length) for x, text, length in drawn if text.endswith(' 50 %')]
    assert [text[:5] for _, text, _ in legend] == ['long-', 'black'] and all('... ' in text for _, text, _ in legend)
    assert all(x + length <= start + 140 for (x, _, length), start in zip(legend, (16 + 280 + 16, 16 + 280 + 16 + 140)))


def test_command_explains_the_images_of_a_folder_by_the_weights_it_is_told(tmp_path, capsys):
    torch.manual_seed(0)
    save_file(timm.create_model('rn26', num_classes=7).state_dict(), tmp_path / 'w.safetensors')  # of another origin
    for name in ('b.png', 'a/c.JPG', 'a/.hidden.png', 'note.txt'):
        path = tmp_path / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((ROOT / 'train/sample/images/ship.png').read_bytes())
    main(['explain', 'rn26', str(tmp_path / 'images'), '--checkpoint', str(tmp_path / 'w.safetensors'), '--json',
          '--method', 'cam', '--output', str(tmp_path / 'explained')])
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r['image'] for r in results] == [str(tmp_path / 'images' / name) for name in ('a/c.JPG', 'b.png')]
    assert all(Path(r['picture']).is_file() and r['top'] == results[0]['top'] for r in results)
    assert all(re.fullmatch('class [0-6]', name) for name, _ in results[0]['top'])
    model = timm.create_model('rn26', num_classes=7, checkpoint_path=str(tmp_path / 'w.safetensors')).eval()
    explanation = Explainer(model, 'cam')(tmp_path / 'images' / 'b.png')
    assert results[1]['regions'] == [[f'class {k}' for k in row] for row in explanation.patch_classes]
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputError, match='There are no images in .*empty'):
        main(['explain', 'rn26_tm', str(tmp_path / 'empty')])


def test_package_and_runtime_find_the_same_images(tmp_path):
    for name in (f'{i}/x{suffix.upper() if i else suffix}' for i in range(2) for suffix in IMAGE_SUFFIXES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ('.x.png', '1/.thumbnails/x.png', '.cache/0/x.png', 'x.explained.png',
                 '0/x-1a2b3c.explained.png'):  # the last two of runs before
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = list_images([tmp_path, 'missing.png'])
    assert len(found) == 2 * len(IMAGE_SUFFIXES) + 1 and found == runtime.list_images([str(tmp_path), 'missing.png'])
    hidden = tmp_path / '.cache' / '0'
    assert list_images([hidden]) == runtime.list_images([str(hidden)]) == [hidden / 'x.png']  # as one names it


@pytest.mark.parametrize('width, height', [(56, 40), (40, 56), (100, 5)])
def test_pictures_have_the_shape_of_the_image(width, height):
    p = np.full((3, 5, 7), 0.1)
    p[0], p[:, 4, 6] = 0.8, (0.1, 0.8, 0.1)  # bee at the lower right
    explanation = make_explanation(p, size=(width, height))
    by_file = Prediction(explanation.image, explanation.probabilities, p.astype(np.float32), NAMES, NAMES)
    tall = round(140 * height / width)
    for picture, left, top in ((explanation.picture(size=140), 16 + 140 + 16, 36), (by_file.picture(140), 160, 30)):
        panel = np.asarray(picture).astype(int)[top:top + tall, left:left + 140]
        assert picture.height > tall and panel.shape[0] == tall
        at = panel[tall - 1, 139]
        assert np.array_equal(at, panel[tall * 4 // 5 + 1, 6 * 20 + 1])  # a fifth of the height, a seventh of the width
        assert not np.array_equal(at, panel[tall * 4 // 5 - 2, 139]) and not np.array_equal(at, panel[tall - 1, 118])


def test_third_panel_is_the_heat_map_of_the_class_one_names():
    probabilities = np.full((3, 4, 4), 0.05)
    probabilities[0] = 0.9
    probabilities[:, 0, 3] = 0.05, 0.9, 0.05
    explanation, size = make_explanation(probabilities, size=(64, 64)), 64
    default, ant, bee = (
        np.asarray(explanation.picture(name, size=size)).astype(int)[36:36 + size, 3 * 16 + 2 * size:3 * 16 + 3 * size]
        for name in (None, 'ant', 'bee'))
    assert np.array_equal(default, ant)
    assert ant[40, 20].sum() > bee[40, 20].sum() and bee[4, 60].sum() > ant[4, 60].sum()


@pytest.mark.parametrize('size', [(32, 32), (100, 60)])
def test_cropped_images_show_what_is_left(trained_like, size):
    model = trained_like('rn26_tm', pretrained_cfg_overlay=dict(crop_pct=0.5))
    width, height = size
    pixels, quarter = np.zeros((height, width, 3), np.uint8), min(size) // 4
    middle = np.s_[height // 2 - quarter:height // 2 + quarter, width // 2 - quarter:width // 2 + quarter]
    pixels[middle] = 255  # which is what is left
    seen = explain(model, pixels)
    assert seen.image.size == (min(size) // 2,) * 2 and np.asarray(seen.image).min() == 255
    x = create_transform(**resolve_data_config(model=model))(Image.fromarray(pixels))[None]
    with torch.no_grad():
        np.testing.assert_allclose(seen.probabilities, model(x).softmax(1)[0], atol=1e-6)


def test_command_draws_the_class_one_names(tmp_path):
    image = 'train/sample/images/bird.png'
    main(['explain', 'rn26_tm', str(ROOT / image), '--class-name', 'ship', '--output', str(tmp_path)])
    with Image.open(next(tmp_path.glob('*.png'))) as picture:
        expected = explain('rn26_tm', ROOT / image).picture('ship')
        assert np.array_equal(np.asarray(picture), np.asarray(expected))


@pytest.mark.parametrize('size', [(32, 32), (100, 60), (5, 9)])
@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA', 'P'])
def test_images_of_any_size_and_mode_are_explained(trained_like, size, mode):
    explanation = explain(trained_like('rn26_tm'), Image.new('RGB', size, 'teal').convert(mode))
    assert explanation.image.size == (min(size), min(size))
    assert explanation.picture().width == 3 * 288 + 4 * 16


def test_kept_templates_are_not_named_as_the_new_classes(trained_like):
    explanation = explain(trained_like('rn26_tm', num_classes=4, num_templates=6), np.zeros((32, 32, 3), np.uint8))
    assert explanation.template_names == [f'template {i}' for i in range(6)]
    assert len(explanation.class_names) == 4
    explanation.picture()


def test_grey_models_take_colour_images(trained_like):
    model, image = trained_like('rn26_tm', in_chans=1), np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    a, b = (explain(model, source) for source in (image, Image.fromarray(image).convert('L')))
    np.testing.assert_array_equal(a.patch_probabilities, b.patch_probabilities)
    assert a.patch_probabilities.std() > 0.01 and np.array_equal(np.asarray(a.image), image)


@pytest.mark.parametrize('method', ['match', 'cam'])
@pytest.mark.parametrize('wrap', [nn.DataParallel, partial(torch.compile, backend='eager')])
def test_wrapped_models_are_explained_as_they_are(trained_like, wrap, method):
    model, image = trained_like('rn26_tm'), np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)
    a, b = (explain(m, image, method) for m in (model, wrap(model)))
    np.testing.assert_array_equal(a.patch_probabilities, b.patch_probabilities)


@pytest.mark.parametrize('image, message', [
    (torch.zeros(3, 32, 32), 'Tensor is not an image; give a path, bytes, PIL image or '),
    (None, 'NoneType is not an image'), (b'abc', 'The image is empty or not an image Pillow can read')])
def test_what_is_no_image_is_one_sentence(trained_like, image, message):
    with pytest.raises(InputError, match=f'^{message}'):
        explain(trained_like('rn26_tm'), image)


def test_bytes_of_a_file_are_read_as_the_file():
    path = ROOT / 'train' / 'sample' / 'images' / 'ship.png'
    assert read_image(path.read_bytes()).tobytes() == read_image(path).tobytes()


def test_heat_map_is_of_the_template_most_regions_match_where_none_is_of_the_class(regions):
    explanation = make_explanation(regions)
    explanation.template_names = ['template 0', 'template 1', 'template 2']  # of other classes
    regions[:, 0, 3] = 0, 0, 1
    assert explanation.template_index() == 0
    regions[:, 1:] = np.array([0.2, 0.5, 0.3])[:, None, None]
    assert explanation.template_index() == 1 and explanation.picture().width > 0
    with pytest.raises(InputError, match=r"'ant' has no template of its own; use method=\"cam\" .* template 0"):
        explanation.heat_map('ant')
    with pytest.raises(InputError, match="no class 'owl'; the templates are template 0, template 1, template 2"):
        explanation.heat_map('owl')


def test_explanation_is_its_picture_in_a_notebook(regions):
    explanation = make_explanation(regions)
    assert len(repr(explanation)) < 100 and explanation != make_explanation(regions)  # which arrays cannot be asked
    shown = Image.open(io.BytesIO(explanation._repr_png_()))
    assert np.array_equal(np.asarray(shown), np.asarray(explanation.picture()))


def test_heat_map_of_no_evidence_is_cold(regions):
    explanation = make_explanation(regions)
    for activations in (np.zeros((3, 4, 4)), np.full((3, 4, 4), -1.)):
        explanation.activations = activations
        assert not explanation.heat_map('ant').any()


def test_names_by_index_are_those_of_the_outputs(tmp_path):
    names = {i: f'bird {i}' for i in reversed(range(11))}  # timm takes a dict, whose keys are text once saved
    timm.models.save_for_hf(
        timm.create_model('rn26_tm', num_classes=11), tmp_path, model_config=dict(label_names=names),
        safe_serialization=True)
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    expected = [f'bird {i}' for i in range(11)]
    assert Explainer(model).class_names == expected
    assert describe_model(model, resolve_data_config({}, model=model))['class_names'] == expected


def test_heat_map_is_of_the_predicted_class_where_another_has_its_name(regions):
    names = ['crane', 'bee', 'crane']
    regions[:, 2, 1] = 0.1, 0.1, 0.8
    found = Explanation(Image.new('RGB', (16, 16)), np.array([0.1, 0.2, 0.7]), regions, names, names)
    assert found.template_index() == 2 and found.template_index('crane') == 0
    other = Explanation(found.image, found.probabilities, regions, ['a', 'bee', 'crane'], ['a', 'bee', 'crane'])
    assert np.array_equal(found.heat_map(), other.heat_map()) and found.heat_map().argmax() // 16 in (8, 9, 10)
    panel = (2 * (288 + 16) + 16, 36, 3 * (288 + 16), 36 + 288)
    assert np.array_equal(*(np.asarray(e.picture().crop(panel)) for e in (found, other)))


def test_names_of_files_that_are_not_utf_8_come_out_as_they_are(tmp_path, monkeypatch):
    path = os.fsencode(tmp_path) + b'/caf\xe9.png'
    Image.new('RGB', (32, 32)).save(os.fsdecode(path), format='PNG')
    out = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(out, encoding='utf-8'))
    with exiting_on_input_error():
        main(['explain', 'rn26_tm', os.fsdecode(path)])
    assert out.getvalue().startswith(path + b': ')


def test_unknown_class_is_refused(regions):
    with pytest.raises(InputError, match="'cow'.*ant, bee, cat"):
        make_explanation(regions).picture('cow')


@pytest.mark.parametrize('source, message', [
    ('local-dir:BROKEN', 'is not a model with pretrained weights'),
    ('local-dir:FOREIGN', "is not a model with pretrained weights.*argument 'foo'"),
    ('missing.onnx', 'There is no file'),
    ('missing.safetensors', 'There is no checkpoint'), ('nothing', 'nothing'),
    (lambda: timm.create_model('rn26'), 'has no patch logits'),
    (lambda: timm.create_model('resnet18'), r'ResNet has no patch logits \(forward_patch_logits, get'),
    (lambda: PatchSupervised(timm.create_model('rn26')), "PreActResNet has no .*, or the method 'cam'"),
    (lambda: timm.create_model('rn26_tm', num_classes=0), 'has no classifier'),
    (lambda: timm.create_model('rn26_tm', in_chans=2), 'images of 2 channels'),
    (lambda: timm.create_model('rn26_tm', pretrained_cfg_overlay=dict(crop_mode='border')), 'belongs to no region'),
    (lambda: PreActResNet(template_matching=True), 'make it with timm.create_model'),
])
def test_sources_without_patch_logits_are_refused(source, message, tmp_path):
    if source == 'local-dir:BROKEN':
        source = f'local-dir:{tmp_path}'
        (tmp_path / 'config.json').write_text('{}')
    elif source == 'local-dir:FOREIGN':
        source = f'local-dir:{tmp_path}'
        timm.models.save_for_hf(timm.create_model('rn26_tm'), tmp_path, safe_serialization=True)
        config = json.loads((tmp_path / 'config.json').read_text())
        (tmp_path / 'config.json').write_text(json.dumps(dict(config, model_args=dict(foo=1))))
    with pytest.raises(InputError, match=message):
        Explainer(source() if callable(source) else source)


def test_damaged_onnx_file_is_named(tmp_path):
    path = tmp_path / 'x.onnx'
    path.write_bytes(b'not a graph')
    with pytest.raises(InputError, match='x.onnx'):
        Explainer(path)


def test_command_continues_past_a_bad_image(tmp_path, capsys):
    good, bad = tmp_path / 'good.png', tmp_path / 'bad.png'
    Image.new('RGB', (32, 32), 'navy').save(good)
    bad.touch()
    with pytest.raises(InputError, match='1 of 2 images'):
        main(['explain', 'rn26_tm', str(bad), str(good), '--output', str(tmp_path / 'out'), '--json'])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result['image'] == str(good) and len(result['top']) == 3
    assert str(bad) in printed.err
    assert Image.open(result['picture']).format == 'PNG'
    assert len(list((tmp_path / 'out').iterdir())) == 1


def test_images_of_one_name_get_a_picture_each(tmp_path):
    for i, color in enumerate(('navy', 'olive', 'teal')):
        (tmp_path / str(i)).mkdir()
        Image.new('RGB', (32, 32), color).save(tmp_path / str(i) / 'same.png')
    main(['explain', 'rn26_tm', *map(str, sorted(tmp_path.glob('*/same.png'))), '--output', str(tmp_path / 'out')])
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
        'same-2.explained.png', 'same-3.explained.png', 'same.explained.png']


def test_command_exits_with_2_and_one_line(forks):
    run = forks.run('-m', 'timm_tmblock', 'explain', 'nothing', 'x.png')
    assert run.returncode == 2
    assert run.stderr.startswith('error: ') and run.stderr.count('\n') == 1
