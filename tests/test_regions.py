"""Regions of images: what is drawn and measured is what the network saw, against loops and brute force."""
import json
import re
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import silhouette_samples, silhouette_score
from torchvision.transforms.functional import gaussian_blur

from timm_tmblock.checkpoint import save_weights
from timm_tmblock.errors import InputError
from timm_tmblock.layers import PatchMean
from timm_tmblock.models._labels import CIFAR10_LABELS, CIFAR100_LABELS
from train.analysis import geometry, mosaic, trust, words
from train.analysis.__main__ import main, take_images, tell_command
from train.analysis.mixing import measure_mixing
from train.analysis.regions import Sample, crop_patches, draw_sample, embed_regions, map_size
from train.analysis.superclasses import find_superclasses
from train.data import InMemorySet, open_dataset


@pytest.fixture(scope='module')
def model():
    return timm.create_model('rn26_tm', pretrained=True).eval()


def make_set(counts, size=32, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    images = torch.from_numpy(rng.integers(0, 256, (len(targets), 3, size, size), dtype=np.uint8))
    return InMemorySet(images, torch.from_numpy(targets), [f'c{k}' for k in range(len(counts))])


def save(path, name, labels, **kwargs):
    """A file of untrained weights."""
    model = timm.create_model(name, **kwargs)
    save_weights(path, model.state_dict(), dict(
        model=name, model_args=kwargs, num_classes=len(labels), label_names=labels))
    return str(path)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


def test_sample_has_the_same_number_of_each_class_and_no_region_twice():
    data = make_set([5, 7, 3])
    sample = draw_sample(data, (8, 8), 4, 9, seed=1)
    assert np.bincount(sample.targets).tolist() == [3, 3, 3]  # as many as the smallest has
    assert all(len(set(row)) == 9 and max(row) < 64 for row in sample.places.tolist())
    known = {image.numpy().tobytes(): int(target) for image, target in zip(data.images, data.targets)}
    for image, target in zip(sample.images, sample.targets):
        assert known[image.transpose(2, 0, 1).tobytes()] == target
    assert len({image.tobytes() for image in sample.images}) == 9
    assert (draw_sample(data, (8, 8), 4, 9, seed=1).places == sample.places).all()
    for settings, message in ((dict(regions_per_image=65), '1 to 64 regions'), (dict(regions_per_image=0), '1 to 64')):
        with pytest.raises(InputError, match=message):
            draw_sample(data, (8, 8), images_per_class=2, seed=0, **settings)
    with pytest.raises(InputError, match='no image of c1'):
        draw_sample(make_set([2, 0]), (8, 8), 1, 1, seed=0)


@pytest.mark.parametrize('name, patch_size', [('rn26_tm', 4), ('dn100_tm_cat', 3)])
def test_embeddings_are_what_the_layers_give(trained_like, name, patch_size):
    model = trained_like(name, patch_size=patch_size).double()
    sample = draw_sample(make_set([3] * 10), map_size(model, (32, 32)), 1, 5, seed=0)
    found = embed_regions(model, sample, batch_size=3)
    mean, std = (torch.tensor(model.pretrained_cfg[k]).double().view(1, -1, 1, 1) for k in ('mean', 'std'))
    x = (torch.from_numpy(sample.images).permute(0, 3, 1, 2).double() / 255 - mean) / std
    f = model._forward_trunk(x)
    logits = model.forward_patch_logits(x)[1]
    block, n = model.tm(f), 0
    for i, places in enumerate(sample.places):
        for place in places:
            at = (i, slice(None), place // 8, place % 8)
            for key, expected in (
                    ('stage 3', f), ('patch mean', model.tm.patch_mean(f)), ('block output', block),
                    ('scores', logits.softmax(1))):
                np.testing.assert_allclose(found[key][n], expected[at].detach().numpy(), rtol=2e-3, atol=2e-4)
            n += 1
    if name == 'rn26_tm':
        close(found['shortcut'], found['stage 3'] @ model.tm.shortcut.weight[:, :, 0, 0].detach().numpy().T)
        values = found['block output'] - found['shortcut']
    else:
        assert 'shortcut' not in found
        values = found['block output'][:, -192:]
    close(found['values'], values)


@pytest.mark.parametrize('name', ['rn26_tm', 'dn100_tm_cat'])
def test_mixing_is_measured_as_by_a_loop_over_regions(trained_like, name):
    model = trained_like(name).double()
    torch.manual_seed(0)
    x = torch.randn(5, 3, 32, 32).double()
    block, norm, regions = model.tm, model.tm.norm, []
    with torch.no_grad():
        f = model._forward_trunk(x)
        block.match.bias -= block.patch_logits(f).mean(dim=(0, 2, 3))  # so that several classes are matched
        logits = block.patch_logits(f)
        norm.bias[logits.argmax(1).flatten().mode().values] = -9.  # the class that most regions match is off
        output = block(f).permute(0, 2, 3, 1).flatten(0, 2).numpy()
    norm.requires_grad_(False)
    found = measure_mixing(model, [x[:1], x[1:]])
    std = (norm.running_var + norm.eps).sqrt()
    for image in range(5):
        for a in logits[image].flatten(1).T:  # of one region
            p = [max(0., float(v)) for v in (a - norm.running_mean) / std * norm.weight + norm.bias]
            own = p[int(a.argmax())]
            regions.append([own > 0 and own == max(p), own / sum(p) if sum(p) else 0., own == 0])
    regions = np.array(regions, dtype=float)
    assert 0 < regions[:, 0].mean() < 1 and (regions[:, 1] > 0).any() and 0 < regions[:, 2].mean() < 1
    for key, column in zip(('agreement', 'matched_share', 'matched_off'), regions.T):
        images = column.reshape(5, 64).mean(axis=1)
        assert found[key] == pytest.approx(column.mean(), abs=1e-6)
        assert found[f'{key}_error'] == pytest.approx(images.std(ddof=1) / 5 ** 0.5, rel=1e-3)
    rest = f.permute(0, 2, 3, 1).flatten(0, 2).numpy()
    if name == 'rn26_tm':
        rest = rest @ block.shortcut.weight[:, :, 0, 0].detach().numpy().T
        values = output - rest
    else:
        values = output[:, -192:]
    spread = (values.var(axis=0).sum() / rest.var(axis=0).sum()) ** 0.5
    assert found['value_spread'] == pytest.approx(spread, rel=1e-6)


@pytest.mark.parametrize('name', [
    'rn26_tm', 'rn26_tm.mini_imagenet', 'wrn16_tm.mini_imagenet', 'dn100_tm.mini_imagenet'])
def test_map_is_as_large_as_that_of_the_patch_logits(name):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for size in (model.img_size, (32, 48)):
            assert map_size(model, size) == model.forward_patch_logits(torch.zeros(1, 3, *size))[1].shape[2:]


def test_networks_laid_out_for_other_images_are_not_compared(tmp_path):
    big = save(tmp_path / 'big.safetensors', 'rn26_tm', list(CIFAR10_LABELS), img_size=64)  # 8×8 at 64 pixels
    with pytest.raises(InputError, match='have feature maps of different sizes'):
        main(['geometry', big, '--baseline', 'rn26', '--images-per-class', '3', '--regions', '2'])


def test_networks_whose_files_are_called_alike_are_told_apart(tmp_path):
    files = [
        save(tmp_path / run / 'last.safetensors', name, list(CIFAR10_LABELS))
        for run, name in (('a', 'rn26_tm'), ('b', 'rn26'))]
    flags = ['--baseline', files[1], '--images-per-class', '3', '--regions', '2', '--output', str(tmp_path / 'g')]
    spaces = main(['geometry', files[0], *flags])['spaces']
    assert list(spaces) == [f'b.last: {layer}' for layer in ('stage 3', 'patch mean')] + [
        f'a.last: {layer}' for layer in ('stage 3', 'patch mean', 'shortcut', 'values', 'block output')]


def test_command_leaves_out_where_files_go_and_nothing_else():
    assert tell_command(['trust', 'a', '--output', 'a', '--seed', '1']) == 'python -m train.analysis trust a --seed 1'
    assert tell_command(['trust', 'a', '--output=a']) == 'python -m train.analysis trust a'


def test_words_without_patches_count_for_nothing():
    scores = np.repeat(np.eye(4), 10, axis=0)  # four different patches for six words
    found = words.find_words(scores, np.arange(40), 6, 5, seed=0)
    assert np.count_nonzero(found.counts) == 4
    values = words.measure_words(found, np.repeat(np.arange(4), 10))
    assert values['purity'] == 1 and np.isnan(values['mixed_purity'])


def test_baseline_has_the_features_and_their_mean_over_patches(trained_like):
    sample, baseline = draw_sample(make_set([2] * 10), (8, 8), 1, 64, seed=0), trained_like('rn26')
    found = embed_regions(baseline, sample)
    assert set(found) == {'stage 3', 'patch mean'} and baseline.patch_size == 4
    image, order = slice(0, 64), sample.places[0].argsort()  # of the first image, all regions
    f, mean = (torch.from_numpy(found[key][image][order].T.reshape(1, -1, 8, 8)) for key in ('stage 3', 'patch mean'))
    torch.testing.assert_close(mean, PatchMean(4)(f), rtol=1e-4, atol=1e-5)
    assert set(embed_regions(trained_like('rn26_tm'), sample, ('values', 'scores'))) == {'values', 'scores'}


@pytest.mark.parametrize('patch_size', [3, 4, 5])
def test_patch_shows_the_pixels_that_its_mean_is_of(patch_size):
    rows, columns = np.mgrid[:32, :32]
    image = np.stack([rows, columns, np.full((32, 32), 255)], axis=-1).astype(np.uint8)
    sample = Sample(image[None], np.array([0]), ['c'], (8, 8), np.arange(64)[None])
    patches = crop_patches(sample, patch_size, stride=4)
    assert patches.shape == (64, 4 * patch_size, 4 * patch_size, 3)
    x = torch.zeros(1, 1, 8, 8, requires_grad=True)
    y = PatchMean(patch_size)(x)
    for place in range(64):
        gradient, = torch.autograd.grad(y[0, 0, place // 8, place % 8], x, retain_graph=True)
        seen = {tuple(cell) for cell in gradient[0, 0].nonzero().tolist()}
        shown = patches[place][patches[place][..., 2] == 255]  # not the grey outside of the image
        assert {(int(r) // 4, int(c) // 4) for r, c, _ in shown} == seen
        assert len(shown) == 16 * len(seen)


def test_neighbour_shares_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    x, labels, groups = rng.normal(size=(60, 3)), rng.integers(0, 3, 60), np.repeat(np.arange(15), 4)
    shares = []
    for i in range(60):
        others = [j for j in range(60) if groups[j] != groups[i]]
        nearest = sorted(others, key=lambda j: ((x[i] - x[j]) ** 2).sum())[:7]
        shares.append(np.mean([labels[j] == labels[i] for j in nearest]))
    assert geometry.find_neighbour_shares(x, labels, groups, 7) == pytest.approx(shares)


def test_measures_are_of_classes_and_of_superclasses():
    rng = np.random.default_rng(0)
    names = list(CIFAR10_LABELS)
    targets = np.repeat(np.arange(10), 3)
    sample = Sample(np.zeros((30, 32, 32, 3), np.uint8), targets, names, (8, 8), np.zeros((30, 2), int))
    x = rng.normal(size=(60, 4))
    points = geometry.measure_points(x, sample, k=3)
    values = geometry.summarize(points, sample)
    vehicles = np.isin(sample.region_targets, [names.index(n) for n in ('airplane', 'automobile', 'ship', 'truck')])
    assert values['superclass_silhouette'] == pytest.approx(silhouette_score(x, vehicles))
    assert values['class_silhouette'] == pytest.approx(silhouette_score(x, sample.region_targets))
    by_image = silhouette_samples(x, vehicles).reshape(30, 2).mean(1)
    assert values['superclass_silhouette_error'] == pytest.approx(by_image.std(ddof=1) / 30 ** 0.5)
    others = geometry.measure_points(rng.normal(size=(60, 2)), sample, k=3)
    lead = geometry.compare(dict(ours=points, other=others), sample)['other']['ours']
    by_image = (others['class_neighbour_rate'] - points['class_neighbour_rate']).reshape(30, 2).mean(1)
    assert lead['class_neighbour_rate'] == pytest.approx(by_image.mean())
    assert lead['class_neighbour_rate_error'] == pytest.approx(by_image.std(ddof=1) / 30 ** 0.5)
    chance = geometry.find_chance(sample)
    assert chance['class'] == pytest.approx(2 / 29)  # of the other images of 30, those of the same class
    assert chance['superclass'] == pytest.approx(0.4 * 9 / 27 + 0.6 * 15 / 27)  # of those of other classes
    expected = geometry.find_neighbour_shares(x, vehicles, sample.region_targets, 3)
    assert (points['superclass_neighbour_rate'] == expected).all()
    sample.class_names = [f'c{k}' for k in range(10)]
    assert geometry.find_chance(sample)['superclass'] is None
    assert geometry.summarize(geometry.measure_points(x, sample), sample)['superclass_silhouette'] is None


def test_superclasses_of_cifar100_are_twenty_of_five():
    names, groups = find_superclasses(list(CIFAR100_LABELS))
    assert names[groups[CIFAR100_LABELS.index('shark')]] == 'fish' and len(names) == 20
    assert np.bincount(groups).tolist() == [5] * 20
    assert len({groups[CIFAR100_LABELS.index(n)] for n in ('maple_tree', 'oak_tree', 'palm_tree')}) == 1
    assert find_superclasses(list(CIFAR100_LABELS)[::-1])[1].tolist() != groups.tolist()


def test_grid_keeps_a_grid_and_fills_each_cell_once():
    rng = np.random.default_rng(0)
    order = rng.permutation(25)
    points = np.stack([order % 5 * 3. - 7, order // 5 * 0.2 + 1], axis=1)  # (x, y)
    places, side = mosaic.snap_to_grid(points)
    assert side == 5 and (places == np.stack([order // 5, order % 5], axis=1)).all()
    places, side = mosaic.snap_to_grid(rng.normal(size=(23, 2)))
    assert side == 5 and len({tuple(p) for p in places.tolist()}) == 23
    patches = rng.integers(0, 256, (23, 6, 6, 3), dtype=np.uint8)
    colors = rng.integers(0, 256, (23, 3), dtype=np.uint8)
    picture = mosaic.paint_mosaic(rng.normal(size=(23, 2)), patches, colors)
    cells = picture.reshape(5, 10, 5, 10, 3).transpose(0, 2, 1, 3, 4).reshape(25, 10, 10, 3)
    painted = {cell[2:-2, 2:-2].tobytes(): tuple(cell[0, 0]) for cell in cells}
    for patch, color in zip(patches, colors):
        assert painted[patch.tobytes()] == tuple(color)


def test_words_keep_the_nearest_patches_one_of_an_image():
    rng = np.random.default_rng(0)
    scores, image = rng.dirichlet([0.3] * 4, 200), rng.integers(0, 40, 200)
    found = words.find_words(scores, image, 6, 5, seed=0)
    distances = ((scores[:, None] - found.centers) ** 2).sum(-1)
    label = distances.argmin(1)
    assert found.counts.tolist() == np.bincount(label, minlength=6).tolist()
    for k, nearest in enumerate(found.nearest):
        kept = []
        for n in sorted(np.flatnonzero(label == k), key=lambda n: distances[n, k]):
            if image[n] not in image[kept] and len(kept) < 5:
                kept.append(n)
        assert nearest.tolist() == kept


def test_purity_is_of_pure_and_of_mixed_words():
    found = words.VisualWords(
        np.array([[0.9, 0.1, 0.], [0.4, 0.3, 0.3], [0.2, 0., 0.8]]), np.array([6, 3, 1]),
        [np.array([0, 1]), np.array([2, 3]), np.array([4])])
    values = words.measure_words(found, np.array([0, 1, 0, 0, 2]))
    assert values == pytest.approx(dict(mixed_words=1 / 3, mixed_patches=0.3, purity=0.75, mixed_purity=1.))
    assert found.order.tolist() == [0, 1, 2]


def test_ranks_and_covers_are_of_whole_cells():
    evidence = torch.tensor([[[3., 1.], [2., 9.]]])
    ranks = trust.rank_cells(evidence)
    assert ranks.tolist() == [[[1, 3], [2, 0]]]
    x, fill = torch.arange(16.).view(1, 1, 4, 4), torch.full((1, 1, 4, 4), -1.)
    covered = trust.cover(x, fill, ranks < 2)
    assert covered[0, 0].tolist() == [[-1, -1, 2, 3], [-1, -1, 6, 7], [8, 9, -1, -1], [12, 13, -1, -1]]


def test_maps_are_those_of_their_definitions(model):
    torch.manual_seed(0)
    x, classes = torch.randn(3, 3, 32, 32), torch.tensor([1, 8, 5])
    maps = {name: f(x, classes) for name, f in trust.create_explainers(model, (8, 8), 0).items()}
    assert {tuple(m.shape) for m in maps.values()} == {(3, 8, 8)}
    with torch.no_grad():
        logits, patches = model.forward_patch_logits(x)
        for i, k in enumerate(classes):
            torch.testing.assert_close(maps['class map'][i].sigmoid(), patches[i].softmax(0)[k])
            torch.testing.assert_close(maps["another image's class map"][(i + 1) % 3], maps['class map'][i])
            # with average pooling and a linear classifier, Grad-CAM is CAM
            features = model.forward_features(x[i:i + 1])[0]
            scores = model.fc(features.permute(1, 2, 0))  # of each position by itself
            torch.testing.assert_close(
                maps['CAM probabilities'][i].sigmoid(), scores.softmax(2)[..., k], rtol=1e-4, atol=1e-6)
            cam = (model.fc.weight[k][:, None, None] * features).sum(0)
            assert torch.corrcoef(torch.stack([maps['Grad-CAM'][i].flatten(), cam.flatten()]))[0, 1] > 0.9999


@pytest.mark.parametrize('fill', ['mean', 'blur'])
@torch.no_grad()
def test_occlusion_hides_patches_by_what_masks_and_is_of_log_odds(model, fill):
    torch.manual_seed(0)
    x, classes = torch.randn(2, 3, 32, 32), torch.tensor([1, 8])
    hidden = torch.zeros_like(x) if fill == 'mean' else gaussian_blur(x, [11, 11], [5., 5.])
    occlusion = trust.create_explainers(model, (8, 8), 0, fill)['occlusion'](x, classes)
    for i, k in enumerate(classes):
        effect, counts = torch.zeros(32, 32), torch.zeros(32, 32)
        for top in range(0, 17, 4):
            for left in range(0, 17, 4):
                covered = x[i:i + 1].clone()
                part = (..., slice(top, top + 16), slice(left, left + 16))
                covered[part] = hidden[i:i + 1][part]
                whole, rest = (model(images).double().softmax(1)[0, k].logit() for images in (x[i:i + 1], covered))
                effect[part] += whole - rest
                counts[part] += 1
        torch.testing.assert_close(
            occlusion[i], F.avg_pool2d((effect / counts)[None, None], 4)[0, 0], rtol=1e-3, atol=1e-3)


def test_occlusion_hides_patches_of_images_that_are_no_multiple_of_the_map(monkeypatch):
    seen = []

    def attribute(self, images, window, strides, **kwargs):
        seen.append((window, strides))
        return torch.zeros_like(images)

    monkeypatch.setattr(trust.Occlusion, 'attribute', attribute)
    model = timm.create_model('rn26_tm', img_size=84)
    trust.create_explainers(model, (11, 11), 0)['occlusion'](torch.zeros(1, 3, 84, 84), torch.tensor([0]))
    assert seen == [((3, 40, 40), (3, 8, 8))]  # 5 cells, each of 8 pixels


def test_confident_cells_are_ranked_by_their_scores_not_by_where_they_lie():
    scores = torch.tensor([30., 32., 31., 40.]).view(1, 1, 2, 2) * torch.tensor([1., 0., -1.]).view(1, 3, 1, 1)
    assert scores.softmax(1)[0, 0].eq(1).all()
    ranks = trust.rank_cells(trust.log_odds(scores, torch.tensor([0])))
    assert ranks.tolist() == [[[3, 1], [2, 0]]]


class Counting(torch.nn.Module):
    """Two classes; the first one's probability is the share of the left upper quarter that is white."""

    def forward(self, x):
        p = x[:, :, :4, :4].mean((1, 2, 3)).clamp(0.001, 0.999)
        return torch.stack([p, 1 - p], 1).log()


def test_curves_follow_the_evidence():
    x = torch.ones(5, 1, 8, 8)
    evidence = torch.zeros(4, 4)
    evidence[:2, :2] = 1
    maps = {
        'true': lambda images, classes: evidence.expand(len(images), 4, 4),
        'wrong': lambda images, classes: -evidence.expand(len(images), 4, 4),
    }
    curves = trust.follow(Counting(), x, torch.zeros(5, dtype=torch.long), maps, steps=16, batch_size=2, progress=False)
    expected = [max(1 - step / 4, 0) for step in range(17)]
    np.testing.assert_allclose(curves['true'].deletion, np.tile(expected, (5, 1)), atol=2e-3)
    assert curves['wrong'].deletion[0, 4] > 0.99 and curves['true'].deletion.shape == (5, 17)
    assert curves['true'].without_least.all() and not curves['true'].without_most.any()
    summary = trust.summarize(curves)
    assert summary['true']['deletion'] == pytest.approx(np.trapezoid(expected, dx=1 / 16), abs=2e-3)
    assert summary['wrong']['deletion_lead'] == pytest.approx(
        summary['true']['deletion'] - summary['wrong']['deletion']) and summary['wrong']['deletion_lead'] < 0
    assert summary['wrong']['without_least'] == 0 and summary['wrong']['without_least_lead'] == 100


def test_errors_of_maps_and_of_their_leads_are_over_images():
    rng = np.random.default_rng(0)
    curves = {
        name: trust.Curves(rng.random((7, 5)), rng.random((7, 5)), rng.random(7) > 0.5, rng.random(7) > 0.5)
        for name in ('class map', 'other')}
    row = trust.summarize(curves)['other']
    for key in ('deletion', 'insertion', 'without_most', 'without_least'):
        ours, theirs = (
            [100. * x for x in getattr(c, key)] if key.startswith('without') else
            [sum((a + b) / 2 for a, b in zip(line, line[1:])) / 4 for line in getattr(c, key).tolist()]
            for c in curves.values())
        leads = [a - b for a, b in zip(ours, theirs)]
        for values, name in ((theirs, key), (leads, f'{key}_lead')):
            mean = sum(values) / 7
            assert row[name] == pytest.approx(mean)
            assert row[f'{name}_error'] == pytest.approx((sum((v - mean) ** 2 for v in values) / 6 / 7) ** 0.5)


@pytest.mark.parametrize('fill', ['mean', 'blur'])
def test_images_are_masked_and_uncovered_cell_by_cell(fill):
    x = torch.zeros(3, 1, 8, 8)
    x[..., :4, :4] = 1
    blurred = gaussian_blur(x[0], [11, 11], [5., 5.])
    evidence = torch.arange(16., 0, -1).view(4, 4)  # row by row
    maps = {'map': lambda images, classes: evidence.expand(len(images), 4, 4)}
    curves = trust.follow(
        Counting(), x, torch.zeros(3, dtype=torch.long), maps, fill=fill, batch_size=2, progress=False)['map']
    hidden = blurred if fill == 'blur' else torch.zeros_like(blurred)
    for curve, image, other in ((curves.deletion, x[0].clone(), hidden), (curves.insertion, blurred.clone(), x[0])):
        expected = [image[:, :4, :4].mean()]
        for top, left in ((i, j) for i in range(0, 8, 2) for j in range(0, 8, 2)):
            part = (0, slice(top, top + 2), slice(left, left + 2))
            image[part] = other[part]
            expected.append(image[:, :4, :4].mean())
        np.testing.assert_allclose(curve, np.tile(torch.stack(expected).clamp(0.001, 0.999), (3, 1)), atol=1e-5)


def test_images_of_a_set_sorted_by_class_are_drawn_and_others_are_the_first(monkeypatch):
    def take(targets):
        images = torch.zeros(len(targets), 3, 8, 8, dtype=torch.uint8)
        data = InMemorySet(images, torch.tensor(targets), ['a', 'b', 'c'])
        monkeypatch.setattr('train.analysis.__main__.open_images', lambda *args: data)
        return take_images(Namespace(images=12, seed=0), None).targets.tolist()

    assert set(take([0] * 10 + [1] * 10 + [2] * 10)) == {0, 1, 2}
    assert take([0, 2, 1] * 10) == [0, 2, 1] * 4
    few = take([0] * 4 + [1] * 4 + [2] * 4)  # which are all taken
    assert sorted(few) == [0] * 4 + [1] * 4 + [2] * 4 != few


def test_shares_beside_the_maps_are_of_the_same_images(tmp_path):
    found = main(['trust', 'rn26_tm', '--images', '9', '--steps', '2', '--output', str(tmp_path / 'trust')])
    model = timm.create_model('rn26_tm', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    dataset = open_dataset('sample', 'test[:9]')
    with torch.no_grad():
        logits, patches = model.forward_patch_logits(torch.stack([transform(image) for image, _ in dataset]))
    targets, predicted, matched = torch.tensor([k for _, k in dataset]), logits.argmax(1), patches.argmax(1)
    for key, hits in (('top1', predicted == targets), ('patch_accuracy', matched == targets[:, None, None]),
                      ('patch_agreement', matched == predicted[:, None, None])):
        assert found[key] == pytest.approx(100 * hits.double().mean().item()), key


@pytest.mark.parametrize('command, flags', [
    ('geometry', ['--images-per-class', '4', '--regions', '2']),
    ('mosaic', ['--images-per-class', '4', '--regions', '2']),
    ('words', ['--images-per-class', '4', '--regions', '4', '--words', '12', '--show', '5']),
    ('trust', ['--images', '7', '--steps', '4']),
])
def test_command_writes_the_same_pictures_and_numbers_again(tmp_path, command, flags):
    results = [main([command, 'rn26_tm', *flags, '--output', str(tmp_path / str(i) / command)]) for i in range(2)]
    assert results[0] == results[1] and results[0]['analysis'] == command and 'NaN' not in json.dumps(results[0])
    assert results[0]['command'] == ' '.join(['python -m train.analysis', command, 'rn26_tm', *flags])
    for suffix in ('json', 'png', 'svg'):
        files = [(tmp_path / str(i) / f'{command}.{suffix}').read_bytes() for i in range(2)]
        assert files[0] == files[1] and len(files[0]) > 500
    with Image.open(tmp_path / '0' / f'{command}.png') as image:
        assert image.width > 600
    assert str(tmp_path) not in (tmp_path / '0' / f'{command}.json').read_text()


def test_masks_of_two_kinds_are_written_side_by_side_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags in ([], ['--fill', 'blur']):
        main(['trust', 'rn26_tm', '--images', '2', '--steps', '2', *flags])
        assert re.findall(r'\nAgainst (.*), the class map is .* by ', capsys.readouterr().out) == [
            'Grad-CAM', 'CAM probabilities', 'occlusion', "another image's class map", 'random']
    names = ('rn26_tm.trust', 'rn26_tm.trust_blur')
    found = [json.loads((tmp_path / 'output' / 'analysis' / f'{name}.json').read_text()) for name in names]
    assert [result['settings']['fill'] for result in found] == ['mean', 'blur']


def test_constants_are_measured_and_set_beside_the_paper(tmp_path):
    values = main(['maximizer', 'rn26_tm', '--images', '20', '--output', str(tmp_path / 'm')])
    assert values['paper'] == dict(mu=2.5, eta=17.) and values['eta'] > 0 and len(values['layer_mu']) == 8
    assert json.loads((tmp_path / 'm.json').read_text()) == values and len(list(tmp_path.iterdir())) == 1


def test_mixing_command_writes_its_measures(tmp_path):
    values = main(['mixing', 'rn26_tm', '--images', '20', '--output', str(tmp_path / 'm')])
    assert values['images'] == 20 and 0.8 < values['agreement'] <= 1 and 0 < values['value_spread'] < 1
    assert json.loads((tmp_path / 'm.json').read_text()) == values and len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Of seven templates, and of other classes."""
    folder = tmp_path_factory.mktemp('weights')
    return dict(
        SEVEN=save(folder / 'seven.safetensors', 'rn26_tm', list(CIFAR10_LABELS), num_templates=7),
        OTHER=save(folder / 'other.safetensors', 'rn26', list('abcdefghij')))


@pytest.mark.parametrize('flags, message', [
    (['geometry', 'rn26_tm', '--baseline', 'rn26_tm'], 'rn26_tm has a template matching block'),
    (['words', 'rn26_tm', '--images-per-class', '1', '--regions', '1'], 'too few for 100 words'),
    (['mosaic', 'nothing'], 'nothing is not a model with pretrained weights'),
    (['mosaic', 'rn26_tm', '--images-per-class', '1', '--regions', '1'], 'one region of each class, too few'),
    (['trust', 'rn26_tm', '--images', '1'], 'must be at least 2, not 1'),
    (['mixing', 'rn26_tm', '--images', '1'], 'must be at least 2, not 1'),
    (['words', 'SEVEN'], 'matches 7 templates and has 10 classes'),
    (['geometry', 'rn26_tm', '--baseline', 'OTHER'], 'have different classes'),
    (['geometry', 'rn26_tm', '--max-regions', '79'], '8 regions of one image of each of 10 classes are more than 79'),
    (['geometry', 'rn26_tm', '--seed', '-1'], 'must be from 0 to 2147483647, not -1'),
    (['geometry', 'rn26_tm', '--perplexity', '0'], 'must be at least 1'),
    (['trust', 'rn26_tm', '--split', 'nothing'], "Cannot open split 'nothing'"),
    (['words', 'rn26_tm', '--regions', '65'], '1 to 64 regions'),
    (['painting', 'rn26_tm'], 'invalid choice'),
    (['trust', 'rn26_tm', '--output', '/proc/none/x'], 'Cannot write /proc/none/x.json'),
])
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, weights, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    flags = [weights.get(flag, flag) for flag in flags]
    with pytest.raises(InputError, match=message) as error:
        main(flags)
    assert '\n' not in str(error.value) and not list(tmp_path.iterdir())
