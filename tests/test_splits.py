"""Splits: what is held out, by class, on every machine alike, and never the test part."""
import math
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import Subset

from timm_tmblock.errors import InputError
from train.augment import DataConfig
from train.config import parse_args
from train.data import SAMPLE, InMemorySet, decode
from train.splits import find_missing_classes, hash_pixels, load_parts, open_splits, stratify

CONFIG = DataConfig((3, 32, 32), (0.5,) * 3, (0.2,) * 3)
FROZEN = [21, 17, 24, 7, 13, 9, 22, 32, 20, 30]


def make_set(sizes=(60, 20, 33), seed=0) -> InMemorySet:
    n = sum(sizes)
    images = torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    targets = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return InMemorySet(images, targets, [str(i) for i in range(len(sizes))])


def divide(dataset, fractions, seed=0):
    digests = [hash_pixels(image, seed) for image in dataset.images.numpy()]
    return [dataset.subset(part) for part in stratify(replace(dataset, digests=digests), fractions)]


def fingerprints(dataset: InMemorySet):
    return [(int(t), i.numpy().tobytes()) for i, t in zip(dataset.images, dataset.targets)]


def load(*flags, config=CONFIG):
    args = parse_args([*flags, '--device', 'cpu'])
    accelerator = Accelerator(cpu=True)
    return load_parts(open_splits(args, accelerator), args, config, accelerator)


@pytest.mark.parametrize('fractions', [(65, 15, 20), (0.9, 0.1), (1,), (1, 0, 1)])
def test_every_class_is_divided_in_the_same_proportions(fractions):
    dataset = make_set()
    parts = divide(dataset, fractions)
    for label, size in enumerate((60, 20, 33)):
        for part, fraction in zip(parts, fractions):
            assert abs((part.targets == label).sum().item() - size * fraction / sum(fractions)) < 1
    assert sorted(f for part in parts for f in fingerprints(part)) == sorted(fingerprints(dataset))


def test_cifar_sized_pool_is_divided_exactly():
    parts = divide(make_set((6000, 6000)), (65, 15, 20))
    assert [torch.bincount(p.targets).tolist() for p in parts] == [[3900, 3900], [900, 900], [1200, 1200]]


def test_split_does_not_depend_on_the_order_in_which_a_copy_stores_its_images():
    dataset = make_set()
    shuffled = dataset.subset(torch.randperm(len(dataset)))
    for a, b in zip(divide(dataset, (65, 15, 20)), divide(shuffled, (65, 15, 20))):
        assert fingerprints(a) == fingerprints(b)  # in the same order, too


def test_split_is_what_it_was():
    """The first images of a split made once, so that no change of this code or a library moves an image."""
    dataset = InMemorySet(torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1), torch.arange(40) % 2, ['a', 'b'])
    train, rest = divide(dataset, (3, 1), seed=5)
    assert rest.images.flatten().tolist() == FROZEN
    assert divide(dataset, (3, 1), seed=6)[1].images.flatten().tolist() != FROZEN


def test_held_out_part_is_of_the_training_split_alone():
    parts = load('--train-split', 'train[:200]', '--test-split', 'test[:50]')
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (180, 20, 50)
    seen, held_out = set(fingerprints(parts.train)), set(fingerprints(parts.validation))
    assert not seen & held_out
    everything = load('--train-split', 'train[:200]', '--val-fraction', '0')
    assert everything.validation is None and everything.test is None
    assert set(fingerprints(everything.train)) == seen | held_out


@pytest.mark.parametrize('weights', [['--pretrained'], ['--initial-checkpoint', 'some.safetensors']])
def test_weights_that_may_have_seen_all_training_images_are_not_measured_on_a_part_of_them(weights):
    flags = ['--eval-only', *weights, '--train-split', 'train[:200]', '--test-split', 'test[:50]']
    parts = load(*flags)
    assert parts.train is None and parts.validation is None and len(parts.test) == 50
    assert len(load(*flags, '--val-fraction', '0.1').validation) == 20  # asked for, as of a run that held it out
    load(*flags, '--memory-limit', '0')  # nothing is to be divided


@pytest.mark.parametrize('flags, config', [
    ([], dict(input_size=(3, 24, 24))), ([], dict(crop_pct=0.8)),
    (['--pool', '65', '15', '20'], dict(input_size=(3, 24, 24)))])
def test_parts_are_the_same_images_whatever_the_network_takes(flags, config):
    """Told by their classes, which are in the order of the images."""
    flags = ['--train-split', 'train[:200]', '--test-split', 'test[:50]', *flags]
    native, other = load(*flags), load(*flags, config=replace(CONFIG, **config))
    for part in ('train', 'validation', 'test'):
        assert torch.equal(getattr(native, part).targets, getattr(other, part).targets)
    assert not torch.equal(native.train.images, other.train.images)


@pytest.mark.parametrize('config', [CONFIG, replace(CONFIG, input_size=(1, 24, 24), mean=(0,), std=(1,))])
def test_parts_of_a_set_that_streams_are_those_of_one_in_memory(config):
    flags = ['--train-split', 'train[:200]', '--test-split', 'test[:50]']
    whole = load(*flags, config=config)
    image = math.prod(config.input_size) / 1e9  # GB
    for limit, in_memory in ((0, ()), (60 * image, ('validation', 'test'))):
        parts = load(*flags, '--memory-limit', str(limit), config=config)
        for name in ('train', 'validation', 'test'):
            part = getattr(parts, name)
            assert isinstance(part, InMemorySet) == (name in in_memory)
            if isinstance(part, Subset):
                part = decode(part.dataset, config, progress=False, rows=part.indices)
            elif not isinstance(part, InMemorySet):
                part = decode(part, config, progress=False)
            assert fingerprints(part) == fingerprints(getattr(whole, name))


def test_named_validation_split_leaves_training_whole():
    parts = load('--train-split', 'train[:50]', '--val-split', 'train[50:70]')
    assert (len(parts.train), len(parts.validation)) == (50, 20)


def test_pool_of_all_splits_is_divided_as_in_the_paper():
    parts = load('--test-split', 'test', '--pool', '65', '15', '20')
    assert [torch.bincount(p.targets).tolist() for p in (parts.train, parts.validation, parts.test)] == [
        [130] * 10, [30] * 10, [40] * 10]
    another = load('--test-split', 'test', '--pool', '65', '15', '20', '--split-seed', '1')
    assert set(fingerprints(another.test)) != set(fingerprints(parts.test))


@pytest.mark.parametrize('flags, message', [
    (['--val-split', 'test', '--test-split', 'test'], 'named for validation and for test'),
    (['--train-split', 'test', '--test-split', 'test'], 'named for train and for test'),
    (['--train-split', ''], 'name a --train-split'),
    (['--val-split', 'test', '--val-fraction', '0.2'], 'leave out --val-fraction'),
    (['--pool', '65', '15', '20', '--val-fraction', '0'], '--pool says which .* leave out --val-fraction'),
    (['--train-split', 'train[:20]', '--val-fraction', '0.01'], 'holds none out'),
    (['--pool', '0', '1', '1'], '65 15 20'),
])
def test_divisions_that_cannot_be_are_refused(flags, message):
    with pytest.raises(InputError, match=message) as error:
        load(*flags)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('splits, flags, message', [
    (dict(train=['ant', 'bee'], val=['bee', 'cow']), ['--val-split', 'val'],
     "Split 'val' has a class 'cow' that 'train' lacks; add images of it there, or remove those"),
    (dict(train=['ant']), [], "has only one class, 'ant'; put the images of each class into a folder"),
])
def test_sets_whose_classes_teach_nothing_are_refused(tmp_path, splits, flags, message):
    for split, names in splits.items():
        for name in names:
            shutil.copytree(SAMPLE / 'images', tmp_path / split / name)
    with pytest.raises(InputError, match=message):
        load('--dataset', str(tmp_path), *flags)


def test_classes_without_training_images_are_found():
    names = ['ant', 'bee', 'cow', 'dog']
    dataset = InMemorySet(torch.zeros(3, 3, 1, 1, dtype=torch.uint8), torch.tensor([0, 2, 2]), names)
    assert find_missing_classes(dataset, names) == ['bee', 'dog']
    dataset.targets = torch.tensor([3, 1, 2, 0])
    assert find_missing_classes(dataset, names) == []


def test_pool_is_refused_where_its_splits_fit_in_memory_one_by_one_alone(monkeypatch):
    monkeypatch.setattr('train.splits.fits_in_memory', lambda images, config, limit: images <= 60)
    load('--train-split', 'train[:50]', '--val-split', 'train[50:60]', '--test-split', 'test[:50]')
    with pytest.raises(InputError, match='The pooled images take more than --memory-limit .* GB, .*; raise it.$'):
        load('--train-split', 'train[:50]', '--test-split', 'test[:50]', '--pool', '65', '15', '20')


@pytest.mark.parametrize('flags', [['--val-split', 'val'], ['--test-split', 'val', '--val-split', 'validation']])
def test_images_that_have_two_names_serve_one_end(tmp_path, flags):
    shutil.copytree(SAMPLE / 'images', tmp_path / 'flat' / 'a')
    for split in ('train', 'val', 'validation')[:1 + len(flags) // 2]:
        shutil.copytree(SAMPLE / 'images', tmp_path / 'split' / split / 'a')
    if len(flags) == 2:  # no splits: timm takes all images for each
        with pytest.raises(InputError, match="has no folders for 'train' and 'val', .* or leave out --val-split"):
            load('--dataset', str(tmp_path / 'flat'), *flags)
    else:
        (tmp_path / 'split' / 'val').rename(tmp_path / 'split' / 'eval')
        with pytest.raises(InputError, match="'validation' and 'val' of dataset .* have images in common"):
            load('--dataset', str(tmp_path / 'split'), *flags)
