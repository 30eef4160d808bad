"""Augmentation: the right crops, policies that depend on the seed alone, with any number of workers."""
import itertools
import os
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import needs_fork
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train

import train.loader
from timm_tmblock.errors import InputError
from train.augment import (
    Crops,
    DataConfig,
    _crop_by_copy,
    _crop_by_gather,
    apply_policy,
    create_policy,
    crop_and_flip,
    pad,
    seeded,
)
from train.data import InMemorySet
from train.loader import InMemoryLoader, TrainingBatches


def crops_of(image: np.ndarray, padding: int, mode: str, fill) -> dict:
    """Every crop of a padded image, plain, mirrored and upside down, made by numpy."""
    h, w = image.shape[1:]
    if mode == 'constant':
        padded = np.stack([np.pad(c, padding, constant_values=f) for c, f in zip(image, fill)])
    else:
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode='reflect')
    crops = {}
    for i in range(2 * padding + 1):
        for j in range(2 * padding + 1):
            for vertical in (1, -1):
                for horizontal in (1, -1):
                    crop = padded[:, i:i + h, j:j + w][:, ::vertical, ::horizontal]
                    crops[crop.tobytes()] = (i, j, vertical, horizontal)
    return crops


@pytest.mark.parametrize('size', [(8, 8), (6, 9)])
@pytest.mark.parametrize('mode', ['reflect', 'constant'])
@pytest.mark.parametrize('crop', [_crop_by_copy, _crop_by_gather])
@pytest.mark.parametrize('flips', [dict(), dict(hflip=0., vflip=0.5), dict(vflip=0.5)])
def test_crops_are_those_of_the_padded_image_and_all_occur(crop, mode, size, flips):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    config = DataConfig((3, *size), (0.5, 0.4, 0.3), (1, 1, 1), padding=2, padding_mode=mode, **flips)
    fill = [round(255 * m) for m in config.mean]
    expected = crops_of(image.numpy(), 2, mode, fill)
    crops = Crops.draw(2000, config, torch.Generator().manual_seed(0))
    out = crop(pad(image[None], config), torch.zeros(2000, dtype=torch.int64), crops, size)
    seen = {expected[np.ascontiguousarray(o).tobytes()] for o in out.numpy()}
    down, right = ((1, -1) if 'vflip' in flips else (1,)), ((1,) if 'hflip' in flips else (1, -1))
    assert seen == set(itertools.product(range(5), range(5), down, right))


@pytest.mark.parametrize('batch_size', [1, 2, 5])
def test_both_ways_to_crop_agree(batch_size):
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    config = DataConfig(input_size=(3, 8, 8), mean=(0.5, 0.4, 0.3), std=(1, 1, 1), vflip=0.5)
    crops = Crops.draw(batch_size, config, torch.Generator().manual_seed(1))
    index = torch.randint(0, 7, (batch_size,))
    padded = pad(images, config)
    assert torch.equal(_crop_by_copy(padded, index, crops, (8, 8)), _crop_by_gather(padded, index, crops, (8, 8)))


@pytest.mark.parametrize('batch_size', [1, 2, 5])
def test_without_padding_and_flip_images_stay(batch_size):
    images = torch.randint(0, 256, (batch_size, 3, 8, 8), dtype=torch.uint8)
    config = DataConfig(input_size=(3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1), padding=0, hflip=0.)
    crops = Crops.draw(batch_size, config, torch.Generator())
    assert torch.equal(crop_and_flip(pad(images, config), torch.arange(batch_size), crops, (8, 8)), images)


POLICIES = ['trivial', 'rand-m9-mstd0.5-inc1', 'rand-m15-n4', 'original', 'v0', '3a', 'augmix-m3-w3']


@pytest.mark.parametrize('channels, size', [(3, 32), (3, 84), (1, 32)])
@pytest.mark.parametrize('policy', POLICIES)
def test_policies_change_images_and_depend_on_the_seed_alone(policy, channels, size):
    config = DataConfig((channels, size, size), (0.5,) * channels, (0.2,) * channels, policy=policy)
    function = create_policy(config)
    images = torch.randint(0, 256, (32, channels, size, size), dtype=torch.uint8)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first = apply_policy(images, function, seed=7)
    after = random.random(), np.random.rand(), torch.rand(1)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert after == (random.random(), np.random.rand(), torch.rand(1))  # the run's own generators are untouched
    assert first.shape == images.shape and not torch.equal(first, images)
    assert torch.equal(apply_policy(images, function, seed=7), first)
    assert not torch.equal(apply_policy(images, function, seed=8), first)


@pytest.mark.parametrize('policy', [None, 'trivial'])
@pytest.mark.parametrize('changes', [
    dict(color_jitter=(0.4, 0.4, 0.4, 0.1)), dict(grayscale_prob=1.), dict(gaussian_blur_prob=1.)])
def test_colours_are_changed_after_the_policy_as_timm_does(policy, changes):
    config = DataConfig((3, 32, 32), (0.5,) * 3, (0.2,) * 3, policy=policy)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)

    def draw(config):  # one by one, as all of a batch share a generator
        function = create_policy(config)
        return torch.cat([
            image[None] if function is None else apply_policy(image[None], function, seed=i)
            for i, image in enumerate(images)])

    before, changed = draw(config), draw(replace(config, **changes))
    assert not torch.equal(changed, before)
    if 'grayscale_prob' in changes:
        assert torch.equal(changed, changed[:, :1].expand_as(changed))
    if 'gaussian_blur_prob' in changes:
        assert (changed.float().std((2, 3)) <= before.float().std((2, 3))).all()
    if 'color_jitter' in changes and policy is None:
        timms = transforms_imagenet_train(32, **changes, separate=True)[1]
        assert torch.equal(changed[:1], apply_policy(images[:1], timms, seed=0))
    assert torch.equal(draw(replace(config, color_jitter=(0.4,) * 3, color_jitter_prob=0.)), before)


@pytest.mark.parametrize('policy', ['trivial', 'rand-m9-n1'])  # one change an image, so that the colour is known
def test_policies_fill_with_the_mean_colour(policy):
    config = DataConfig((3, 16, 16), (0.9, 0.5, 0.2), (0.2,) * 3, policy=policy)
    images = torch.tensor(config.fill, dtype=torch.uint8).view(1, 3, 1, 1).expand(64, 3, 16, 16)
    changed = apply_policy(images, create_policy(config), seed=0)
    assert not torch.equal(changed, images)
    assert torch.equal(changed, changed[:, :, 8:9, 8:9].expand_as(changed))


def test_policies_seed_no_generator_of_a_gpu(monkeypatch):
    """Dropout draws from it."""
    seeds = []
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', seeds.append)
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(4)
    with seeded(3):
        assert torch.equal(torch.rand(4), first)
    assert seeds == [] and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('policy', ['rand-q3', 'autoaugment', 'augmix-q3', 'zzz'])
def test_unknown_policies_are_refused(policy):
    dataset = InMemorySet(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4), list('abcd'))
    with pytest.raises(InputError, match='This augmentation of single images cannot be used'):
        TrainingBatches(dataset, DataConfig((3, 8, 8), (0,) * 3, (1,) * 3, policy=policy), 2, torch.device('cpu'))


@pytest.mark.parametrize('num_workers', [0, 2])
def test_batches_do_not_depend_on_the_number_of_workers(num_workers):
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = InMemorySet(images, torch.arange(20), [str(i) for i in range(20)])
    config = DataConfig((3, 8, 8), (0.5,) * 3, (0.2,) * 3, policy='trivial')
    make = partial(InMemoryLoader, dataset, config, 5, torch.device('cpu'), training=True)
    expected = list(make().epoch(2))
    loader = make(num_workers=num_workers)
    next(loader.epoch(1))  # and broken off
    for start in (1, 0):
        batches = list(loader.epoch(2, start=start))
        assert len(batches) == 4 - start
        for (a, b), (c, d) in zip(expected[start:], batches):
            assert torch.equal(a, c) and torch.equal(b, d)


@needs_fork
def test_workers_outlive_an_epoch(monkeypatch):
    # each image is the number of the process that augmented it
    monkeypatch.setattr(train.loader, 'create_policy', lambda config: lambda image: Image.fromarray(
        np.array([[[os.getpid() >> 16, os.getpid() >> 8 & 255, os.getpid() & 255]]], dtype=np.uint8)))
    dataset = InMemorySet(torch.zeros(4, 3, 1, 1, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ['a'])
    config = DataConfig((3, 1, 1), (0.,) * 3, (1 / 255,) * 3, padding=0)
    loader = InMemoryLoader(dataset, config, 2, torch.device('cpu'), training=True, num_workers=1)
    batches = [images for epoch in (0, 1) for images, _ in loader.epoch(epoch)]
    processes = {tuple(image.flatten().tolist()) for image in torch.cat(batches)}
    high, middle, low = processes.pop()
    assert not processes and (int(high) << 16) + (int(middle) << 8) + int(low) != os.getpid()


def test_random_erasing_is_timms_on_normalised_batches():
    images = torch.full((1000, 3, 16, 16), 255, dtype=torch.uint8)
    dataset = InMemorySet(images, torch.arange(1000), [str(i) for i in range(1000)])
    config = DataConfig((3, 16, 16), (0.5,) * 3, (0.5,) * 3, re_prob=0.5, re_count=2)
    random.seed(0)
    batch, _ = next(InMemoryLoader(dataset, config, 1000, torch.device('cpu'), training=True).epoch(0))
    random.seed(0)
    expected = RandomErasing(0.5, mode='const', max_count=2, device='cpu')(torch.ones(1000, 3, 16, 16))
    assert torch.equal(batch, expected)
    erased = (batch == 0).any(dim=(1, 2, 3))  # 'const': the mean colour
    assert 430 <= erased.sum() <= 570  # 500 but for 4 standard deviations
    assert torch.equal(batch[~erased], torch.ones_like(batch[~erased]))
    assert ((batch == 0) | (batch == 1)).all()
