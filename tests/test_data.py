"""Batches: the right pixels, each image as often as it should be, the same again after a restart."""
import multiprocessing
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from sklearn.metrics import recall_score
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder, ImageNet

from timm_tmblock.errors import InputError
from timm_tmblock.image import IMAGE_SUFFIXES
from train import data
from train.augment import DataConfig
from train.data import (
    SAMPLE,
    ImageSet,
    InMemorySet,
    adopt_classes,
    check_classes,
    decode,
    fits_in_memory,
    get_class_names,
    is_whole_folder,
    open_dataset,
    read_batches,
    share_images,
    tell_other_names,
)
from train.failure import naming_failures
from train.loader import InMemoryLoader, StreamingLoader
from train.signals import init_worker
from train.splits import hash_pixels
from train.validation import Evaluator, validate

CONFIG = DataConfig(input_size=(3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def make_set(n=22) -> InMemorySet:
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return InMemorySet(images, torch.arange(n), [f'class {i}' for i in range(n)])


def make_loader(training=True, dataset=None, batch_size=5, config=CONFIG, **kwargs) -> InMemoryLoader:
    return InMemoryLoader(dataset or make_set(), config, batch_size, torch.device('cpu'), training=training, **kwargs)


@pytest.mark.parametrize('batch_size', [5, 1])
@pytest.mark.parametrize('world_size', [1, 2, 3, 25])
def test_evaluation_counts_each_image_once_in_as_many_batches_of_all_processes(world_size, batch_size):
    seen, lengths = [], set()
    for rank in range(world_size):
        loader = make_loader(training=False, batch_size=batch_size, rank=rank, world_size=world_size)
        batches = list(loader.epoch(0))
        assert len(batches) == len(loader)
        lengths.add(len(batches))
        seen += [t.item() for _, targets in batches for t in targets][:loader.max_samples]
    assert sorted(seen) == list(range(22)) and len(lengths) == 1


@pytest.mark.parametrize('rank, accuracy', [(0, 50), (1, 100)])
def test_accuracy_leaves_out_the_image_that_fills_a_share(rank, accuracy):
    loader = make_loader(training=False, dataset=make_set(3), rank=rank, world_size=2)  # of 0 and 2, and of 1

    class Guess(torch.nn.Module):
        def forward(self, images):
            return torch.eye(6)[torch.tensor([0, 1] if rank == 0 else [1, 1])]

    values = validate(Guess(), loader, Accelerator(cpu=True))
    assert values['top1'] == values['balanced_accuracy'] == accuracy


def test_balanced_accuracy_is_that_of_scikit_learn_whatever_the_classes_and_batches():
    generator = torch.Generator().manual_seed(0)
    for size, batch in ((7, 1), (64, 2), (63, 5)):
        targets = torch.randint(4, (size,), generator=generator) ** 2 // 2  # 0, 2 and 4 of 6 classes, unequally often
        logits = torch.randn(size, 6, generator=generator) + torch.nn.functional.one_hot(targets, 6)
        evaluator = Evaluator('cpu', max_samples=size - 1)  # the last is padding
        for part in torch.arange(size).split(batch):
            evaluator.update(logits[part], targets[part])
        target, predicted = targets[:-1], logits[:-1].argmax(1)
        expected = recall_score(target, predicted, labels=target.unique(), average='macro')
        values = evaluator.compute()
        assert values['balanced_accuracy'] == pytest.approx(100 * expected)
        assert values['top1'] == pytest.approx(100 * (predicted == target).double().mean().item())


def test_evaluation_images_are_normalised_and_nothing_else():
    dataset = make_set()
    images = torch.cat([x for x, _ in make_loader(training=False, dataset=dataset).epoch(0)])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CONFIG.mean, CONFIG.std))
    torch.testing.assert_close(images, (dataset.images / 255 - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('world_size', [1, 2])
def test_training_epochs_are_disjoint_full_batches_in_changing_order(world_size):
    loaders = [make_loader(rank=r, world_size=world_size) for r in range(world_size)]
    orders = []
    for epoch in (0, 1):
        order = [t.item() for loader in loaders for _, targets in loader.epoch(epoch) for t in targets]
        assert len(order) == len(set(order)) == 20
        orders.append(order)
    assert orders[0] != orders[1]


def test_processes_draw_different_augmentation():
    dataset = InMemorySet(make_set(1).images.expand(40, -1, -1, -1), torch.zeros(40, dtype=torch.int64), ['a'])
    first, second = (next(make_loader(dataset=dataset, rank=r, world_size=2).epoch(0))[0] for r in (0, 1))
    assert not torch.equal(first, second)


def test_streamed_images_are_augmented_alike_whoever_reads_them():
    def take(**kwargs):
        dataset, config = open_dataset('sample', 'train[:64]'), replace(CONFIG, input_size=(3, 32, 32), re_prob=0.5)
        config = replace(config, policy='rand-m9-mstd0.5-inc1')
        kwargs = {**dict(batch_size=8, seed=0, num_workers=0), **kwargs}
        batches = list(StreamingLoader(dataset, config, device=torch.device('cpu'), training=True, **kwargs).epoch(0))
        return [torch.cat(parts) for parts in zip(*batches)]

    torch.manual_seed(0)
    before, (images, targets) = torch.get_rng_state(), take()
    assert torch.equal(torch.get_rng_state(), before)
    for kwargs in (dict(num_workers=2), dict(batch_size=16)):
        same, of_same = take(**kwargs)
        assert torch.equal(images, same) and torch.equal(targets, of_same)
    others, of_others = take(seed=1)
    assert not torch.equal(images, others) and not torch.equal(targets, of_others)


def test_epoch_taken_up_in_the_middle_goes_on_the_same():
    loader = make_loader()
    whole = list(loader.epoch(3))
    rest = list(make_loader().epoch(3, start=2))
    assert len(whole) == 4 and len(rest) == 2
    for (a, b), (c, d) in zip(whole[2:], rest):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_seed_changes_order():
    a, b = (next(make_loader(seed=s).epoch(0)) for s in (0, 1))
    assert not torch.equal(a[1], b[1])


@pytest.mark.parametrize('seed, epoch', [(1, 0), (0, 1)])
def test_seed_and_epoch_change_crops_and_flips(seed, epoch):
    dataset = InMemorySet(make_set(1).images.expand(40, -1, -1, -1), torch.zeros(40, dtype=torch.int64), ['a'])
    first = next(make_loader(dataset=dataset).epoch(0))[0]
    assert not torch.equal(first, next(make_loader(dataset=dataset, seed=seed).epoch(epoch))[0])


def test_channels_last_batches():
    images, _ = next(make_loader(channels_last=True).epoch(0))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_set_smaller_than_a_batch_is_refused():
    with pytest.raises(InputError, match='use a --batch-size of at most 22'):
        make_loader(batch_size=23)


@pytest.fixture
def folder(tmp_path):
    """Class folders of images of several sizes and modes."""
    for split in ('train', 'validation'):
        for i, name in enumerate(('ant', 'bee')):
            (tmp_path / split / name).mkdir(parents=True)
            for j, mode in enumerate(('RGB', 'L', 'RGBA', 'P')):
                Image.new('RGB', (8 + 4 * j, 8 + 2 * j), (60 * i, 100, 50 * j)).convert(mode).save(
                    tmp_path / split / name / f'{j}.png')
    return tmp_path


def test_classes_of_torchvisions_imagenet_have_their_first_name_and_its_splits_are_no_whole_folder():
    reader = ImageNet.__new__(ImageNet)
    reader.class_to_idx = {'tench': 0, 'Tinca tinca': 0, 'goldfish': 1, 'Carassius auratus': 1, 'great white shark': 2}
    reader.root = 'somewhere'
    assert get_class_names(reader) == ['tench', 'goldfish', 'great white shark']
    assert not is_whole_folder(reader, Path('somewhere'))
    folder = ImageFolder.__new__(ImageFolder)
    folder.root = 'somewhere'
    assert is_whole_folder(folder, Path('somewhere'))


def test_folder_of_images_is_decoded_to_the_input_size(folder):
    dataset = open_dataset(str(folder), 'train')
    decoded = decode(dataset, CONFIG, progress=False)
    assert decoded.class_names == ['ant', 'bee']
    assert decoded.images.shape == (8, 3, 8, 8)
    assert sorted(decoded.targets.tolist()) == [0] * 4 + [1] * 4
    for image, target in zip(decoded.images[::4], (0, 1)):  # the two of the input's size, in RGB
        assert image.unique(dim=1).squeeze().unique(dim=1).flatten().tolist() == [60 * target, 100, 0]


@pytest.mark.parametrize('suffix', IMAGE_SUFFIXES)
def test_folders_are_read_whatever_the_format_of_their_images(tmp_path, suffix):
    for name, level in (('dark', 40), ('light', 200)):
        (tmp_path / 'train' / name).mkdir(parents=True)
        kind = '.png' if name == 'dark' else suffix.upper()
        Image.new('RGB', (32, 32), (level,) * 3).save(tmp_path / 'train' / name / f'0{kind}')
    decoded = decode(open_dataset(str(tmp_path), 'train'), CONFIG, progress=False)
    assert decoded.class_names == ['dark', 'light'] and decoded.targets.tolist() == [0, 1]
    assert decoded.images.float().mean((1, 2, 3)).tolist() == pytest.approx([40, 200], abs=2)


@pytest.mark.parametrize('kind', ['', 'torch/folder'])
def test_images_of_folders_are_upright_and_on_white_where_they_are_transparent(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    for name in 'ab':
        (tmp_path / 'train' / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / 'train' / name / '0.png', exif=exif)
    dataset = open_dataset(kind, 'train', str(tmp_path / 'train')) if kind else open_dataset(str(tmp_path), 'train')
    background = 255 - pixels[..., 3:].astype(float)
    on_white = (pixels[..., :3] * (pixels[..., 3:] / 255) + background).round()
    expected = torch.from_numpy(np.rot90(on_white, -1).copy()).permute(2, 0, 1)
    decoded = decode(dataset, CONFIG, progress=False)
    assert (decoded.images - expected).abs().max() <= 1
    (images, _), = StreamingLoader(dataset, CONFIG, 2, torch.device('cpu'), num_workers=1).epoch(0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CONFIG.mean, CONFIG.std))
    assert ((images * std + mean) * 255 - expected).abs().max() <= 1.01


def test_stored_images_are_decoded_exactly():
    dataset = open_dataset('sample', 'test[:20]')
    decoded = decode(dataset, DataConfig((3, 32, 32), (0, 0, 0), (1, 1, 1)), progress=False)
    for i in (0, 7, 19):
        image, target = dataset[i]  # by timm
        np.testing.assert_array_equal(decoded.images[i].permute(1, 2, 0).numpy(), np.asarray(image))
        assert decoded.targets[i] == target


def test_processes_decode_the_same_in_the_same_order(monkeypatch):
    dataset = open_dataset('sample', 'test')
    config = DataConfig((3, 24, 24), (0, 0, 0), (1, 1, 1))
    digest = partial(hash_pixels, seed=0)  # of the images of 32x32
    alone = decode(dataset, config, progress=False, digest=digest)
    monkeypatch.setattr(data, 'WORTH_A_PROCESS', 1e5)
    monkeypatch.setattr(data, 'CHUNK', 30)
    state = torch.get_rng_state()
    processes = set()
    create = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(multiprocessing.process.BaseProcess, 'start', lambda p: (processes.add(p), create(p)))
    shared = decode(dataset, config, progress=False, digest=digest, num_workers=2)
    assert len(processes) == min(2, os.cpu_count())
    assert torch.equal(shared.images, alone.images) and torch.equal(shared.targets, alone.targets)
    assert list(shared.digests) == list(alone.digests) and len(set(alone.digests)) == len(dataset)
    assert torch.equal(torch.get_rng_state(), state)  # a run goes on with the numbers it would have had


def test_divisions_of_grey_images_are_those_of_the_coloured_ones():
    dataset = open_dataset('sample', 'test[:30]')
    digest = partial(hash_pixels, seed=0)
    colour, grey = (
        decode(dataset, DataConfig((channels, 32, 32), (0,), (1,)), progress=False, digest=digest)
        for channels in (3, 1))
    assert list(grey.digests) == list(colour.digests) and len(set(grey.digests)) == 30
    for image, (source, _) in zip(grey.images, dataset):
        np.testing.assert_array_equal(image[0].numpy(), np.asarray(source.convert('L')))


def test_sample_is_stratified():
    for split, n in (('train', 150), ('test', 50)):
        dataset = open_dataset('sample', split)
        decoded = decode(dataset, DataConfig((3, 32, 32), (0, 0, 0), (1, 1, 1)), progress=False)
        assert torch.bincount(decoded.targets).tolist() == [n] * 10
        assert decoded.class_names[0] == 'airplane' and decoded.class_names[9] == 'truck'


def test_larger_sets_stream(folder):
    dataset = open_dataset(str(folder), 'validation')
    assert fits_in_memory(len(dataset), CONFIG, 1.) and not fits_in_memory(len(dataset), CONFIG, 1e-6)
    loader = StreamingLoader(dataset, CONFIG, 3, torch.device('cpu'), num_workers=0)
    targets = torch.cat([t for _, t in loader.epoch(0)])
    assert sorted(targets.tolist()) == [0] * 4 + [1] * 4
    expected = decode(dataset, CONFIG, progress=False)
    images = torch.cat([x for x, _ in loader.epoch(0)])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CONFIG.mean, CONFIG.std))
    torch.testing.assert_close(images, (expected.images / 255 - mean) / std, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('changes', [
    dict(hflip=1.), dict(policy='rand-m9-n4-inc1'), dict(re_prob=1., re_mode='pixel')])
def test_streamed_training_images_are_augmented_as_configured(tmp_path, changes):
    ramp = np.broadcast_to(np.arange(0, 256, 32, dtype=np.uint8)[None, :, None], (8, 8, 3))
    for name in ('ant', 'bee'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(ramp.copy()).save(tmp_path / 'train' / name / f'{i}.png')
    plain = replace(CONFIG, hflip=0., mean=(0., 0., 0.), std=(1., 1., 1.))

    def draw(config):
        loader = StreamingLoader(
            open_dataset(str(tmp_path), 'train'), config, 8, torch.device('cpu'), training=True, seed=0, num_workers=1)
        return next(loader.epoch(0))[0]

    def rises(x):  # to the right, each row alike: what is left of the ramp in any crop
        return bool((x.diff(dim=3) >= -1e-4).all() and (x.diff(dim=2).abs() < 1e-2).all())

    images = draw(replace(plain, **changes))
    assert rises(draw(plain)) and not rises(images)
    assert rises(images.flip(3)) == ('hflip' in changes)


@pytest.mark.parametrize('changes, levels', [
    (dict(augmented=False), 8),  # the image as it is
    (dict(train_interpolation='nearest'), 8), (dict(interpolation='nearest'), 8),
    (dict(train_interpolation='bilinear', interpolation='nearest'), 9),  # and more
    (dict(train_crop_mode='rkrr', scale=(4., 4.), ratio=(1., 1.)), 9),
    (dict(color_jitter=(0.5, 0.5, 0.5)), 9)])
def test_streamed_training_images_are_resized_and_coloured_as_configured(tmp_path, changes, levels):
    ramp = np.broadcast_to(np.arange(0, 256, 32, dtype=np.uint8)[None, :, None], (8, 8, 3))
    for name in ('ant', 'bee'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(ramp.copy()).save(tmp_path / 'train' / name / f'{i}.png')
    config = replace(CONFIG, hflip=0., mean=(0., 0., 0.), std=(1., 1., 1.), scale=(0.5, 0.5), ratio=(1., 1.))
    images = next(StreamingLoader(
        open_dataset(str(tmp_path), 'train'), replace(config, **changes), 8, torch.device('cpu'), training=True, seed=0,
        num_workers=1).epoch(0))[0]
    found = set((255 * images).round().int().flatten().tolist())
    assert found <= set(range(0, 256, 32)) if levels == 8 else not found <= set(range(0, 256, 32))
    if changes == dict(augmented=False):
        assert torch.equal((255 * images).round(), torch.from_numpy(ramp.copy()).permute(2, 0, 1).expand(8, -1, -1, -1))


@pytest.mark.parametrize('crop_mode', ['center', 'squash'])
def test_streamed_images_without_augmentation_are_those_that_are_measured(tmp_path, crop_mode):
    for name in ('ant', 'bee'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)).save(
            tmp_path / 'train' / name / '0.png')
    config = replace(CONFIG, augmented=False, crop_mode=crop_mode, crop_pct=0.8)
    training, measured = (next(StreamingLoader(
        open_dataset(str(tmp_path), 'train'), config, 2, torch.device('cpu'), training=training, seed=0,
        num_workers=1).epoch(0))[0] for training in (True, False))
    assert torch.equal(training, measured)  # both images are the same


@pytest.mark.parametrize('vflip', [0., 1.])
@pytest.mark.parametrize('scale, ratio', [(1., 1.), (0.25, 1.), (0.25, 0.25)])
def test_streamed_training_crops_are_as_large_as_asked_for(tmp_path, scale, ratio, vflip):
    ramp = np.add.outer(np.arange(0, 128, 4), np.arange(0, 128, 4)).astype(np.uint8)  # 32 x 32
    for name in ('ant', 'bee'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(ramp).convert('RGB').save(tmp_path / 'train' / name / f'{i}.png')
    config = replace(
        CONFIG, hflip=0., vflip=vflip, mean=(0., 0., 0.), std=(1., 1., 1.), scale=(scale, scale), ratio=(ratio, ratio))
    loader = StreamingLoader(
        open_dataset(str(tmp_path), 'train'), config, 8, torch.device('cpu'), training=True, seed=0, num_workers=1)
    images = 255 * next(loader.epoch(0))[0]
    side = 32 * scale ** 0.5
    for dim, pixels, sign in ((2, side / ratio ** 0.5, -1 if vflip else 1), (3, side * ratio ** 0.5, 1)):
        step = images.diff(dim=dim)[:, :, 2:5, 2:5].mean((1, 2, 3))  # 4 levels a pixel, of which 8 are left
        torch.testing.assert_close(step, torch.full((8,), sign * 4 * pixels / 8), rtol=0.1, atol=0.)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_streamed_epoch_taken_up_in_the_middle_goes_on_the_same(folder, num_workers):
    def make():
        config = replace(CONFIG, policy='rand-m9-mstd0.5-inc1', re_prob=0.5)
        return StreamingLoader(
            open_dataset(str(folder), 'train'), config, 2, torch.device('cpu'), training=True, seed=3,
            num_workers=num_workers)

    loader = make()
    first, whole = list(loader.epoch(4)), list(loader.epoch(5))
    rest = list(make().epoch(5, start=2))
    assert len(whole) == 4 and len(rest) == 2
    assert any(not torch.equal(a, b) for (a, _), (b, _) in zip(first, whole))
    for (a, b), (c, d) in zip(whole[2:], rest):
        assert torch.equal(a, c) and torch.equal(b, d)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_damaged_image_of_a_streamed_set_is_named_not_replaced(folder, num_workers):
    (folder / 'train' / 'bee' / '1.png').write_bytes(b'')
    loader = StreamingLoader(
        open_dataset(str(folder), 'train'), CONFIG, 2, torch.device('cpu'), training=True, num_workers=num_workers)
    with pytest.raises(InputError, match=r'cannot be read.*bee/1\.png') as error, naming_failures(''):
        list(loader.epoch(0))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_all_damaged_images_are_named_at_once(folder, monkeypatch, num_workers):
    monkeypatch.setattr(data, 'WORTH_A_PROCESS', 1.)
    for name in ('ant/2.png', 'bee/1.png'):
        (folder / 'train' / name).write_bytes(b'')
    with pytest.raises(InputError, match=r'ant/2.png.*; .*bee/1\.png') as error, naming_failures(''):
        decode(open_dataset(str(folder), 'train'), CONFIG, progress=False, num_workers=num_workers)
    assert '\n' not in str(error.value)


def test_few_large_images_are_shared_by_all_processes():
    source = range(400)
    for size, workers, expected in ((32, 1, 50), (224, 1, 27), (224, 8, 6), (8, 0, 50)):
        assert data._Chunks(source, replace(CONFIG, input_size=(3, size, size)), None, workers).size == expected


def test_images_beside_class_folders_are_no_class(folder):
    Image.new('RGB', (8, 8)).save(folder / 'train' / 'overview.png')
    with pytest.raises(InputError, match='train/overview.png is not in a class folder; move it into one'):
        open_dataset(str(folder), 'train')


def test_splits_without_class_folders_are_no_classes(tmp_path):
    for part in ('train', 'test'):
        (tmp_path / part).mkdir()
        Image.new('RGB', (8, 8)).save(tmp_path / part / 'cat.0.png')
    with pytest.raises(InputError, match='has images in test and train without class folders; .* such as test/CLASS'):
        open_dataset(str(tmp_path), 'train')


def test_hidden_files_are_no_images(folder):
    expected = len(open_dataset(str(folder), 'train'))
    (folder / 'train' / 'ant' / '._0.png').write_bytes(b'of macOS')
    assert len(open_dataset(str(folder), 'train')) == expected


@pytest.mark.parametrize('name, split, kwargs, message', [
    ('hfds/does/not-exist', 'train', {}, 'Cannot open'),
    ('torch/nothing', 'train', dict(root='.'), 'Cannot open'),
    ('torch/cifar10', 'train', {}, 'torchvision reads torch/cifar10 from a folder; name that folder with --data-dir'),
    ('missing_folder', 'train', {}, 'Cannot open .* there is no such folder; sets of the Hub are named hfds/USER/NAME'),
    ('sample', 'holdout', {}, 'holdout'),
    ('sample', 'test', dict(root='elsewhere'), '--dataset names a folder of images, not --data-dir'),
    ('torch/cifar10', 'train[:100]', {}, "Only hfds/ sets can be sliced, as in 'train.:100.'"),
    ('torch/CIFAR10', 'holdout', {}, "has the splits train and test, not 'holdout'"),
])
def test_sets_that_cannot_be_opened_are_named(name, split, kwargs, message):
    with pytest.raises(InputError, match=message) as error:
        open_dataset(name, split, **kwargs)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('kind, split, kwargs, message', [
    ('', 'test', {}, "has no split 'test', it has train, validation"),  # timm opens all images of both
    ('torch/image_folder', 'test', {}, "has no split 'test', it has train, validation"),
    ('', 'train[:50%]', {}, 'name a whole split'),  # of which timm reads 'train'
    ('', 'train', dict(root='elsewhere'), 'is a folder; leave out --data-dir'),
])
def test_split_that_a_folder_does_not_have_is_not_another(folder, kind, split, kwargs, message):
    kwargs = dict(root=str(folder)) if kind else kwargs
    with pytest.raises(InputError, match=message):
        open_dataset(kind or str(folder), split, **kwargs)


@pytest.mark.parametrize('parts', [('Training', 'Testing'), ('Test', 'other'), ('dev', 'holdout')])
def test_parts_by_other_names_are_not_read_as_one(tmp_path, parts):
    for part in parts:
        for name in 'ab':
            (tmp_path / part / name).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(tmp_path / part / name / '0.png')
    with pytest.raises(InputError, match=f"has no split 'train', it has {', '.join(sorted(parts))}"):
        open_dataset(str(tmp_path), 'train')
    assert len(open_dataset(str(tmp_path), parts[0])) == 2


def test_groups_of_classes_are_no_splits(tmp_path):
    for group, name in (('animals', 'cat'), ('animals', 'dog'), ('vehicles', 'car')):
        (tmp_path / group / '.cache').mkdir(parents=True, exist_ok=True)
        (tmp_path / group / name).mkdir()
        Image.new('RGB', (8, 8)).save(tmp_path / group / name / '0.png')
    assert get_class_names(open_dataset(str(tmp_path), 'train')) == ['car', 'cat', 'dog']
    assert get_class_names(open_dataset('torch/folder', 'train', str(tmp_path))) == ['animals', 'vehicles']


def save_classes(folder, *names):
    """A grey image of each class, one level lighter than the last."""
    for level, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new('RGB', (8, 8), (level,) * 3).save(folder / name / '0.png')


def test_classes_of_a_folder_are_numbered_by_name_without_hidden_ones(tmp_path):
    save_classes(tmp_path / 'train', 'a', 'A', '01', '1', 'B', 'b', '.ipynb_checkpoints', 'B/.trash/a')
    dataset = open_dataset(str(tmp_path), 'train')
    assert get_class_names(dataset) == ['01', '1', 'A', 'a', 'B', 'b']  # not in the order of a set
    found = decode(dataset, DataConfig((3, 8, 8), (0, 0, 0), (1, 1, 1)), progress=False)
    assert found.images[:, 0, 0, 0].tolist() == [2, 3, 1, 0, 4, 5] and found.targets.tolist() == list(range(6))


def test_split_may_lack_a_class(tmp_path):
    save_classes(tmp_path / 'train', 'a', 'b', 'c')
    save_classes(tmp_path / 'validation', 'c', 'a')
    save_classes(tmp_path / 'test', 'd', 'a')
    small = open_dataset(str(tmp_path), 'validation')
    assert adopt_classes(small, ['a', 'b', 'c']) == ['a', 'b', 'c']
    found = decode(small, DataConfig((3, 8, 8), (0, 0, 0), (1, 1, 1)), progress=False)
    assert found.images[:, 0, 0, 0].tolist() == [1, 0] and found.targets.tolist() == [0, 2]
    assert adopt_classes(open_dataset(str(tmp_path), 'test'), ['a', 'b', 'c']) == ['a', 'd']
    small = open_dataset('torch/folder', 'validation', str(tmp_path / 'validation'))
    assert adopt_classes(small, ['a', 'b', 'c']) == ['a', 'b', 'c']
    found = decode(small, DataConfig((3, 8, 8), (0, 0, 0), (1, 1, 1)), progress=False)
    assert found.images[:, 0, 0, 0].tolist() == [1, 0] and found.targets.tolist() == [0, 2]


def test_class_may_be_called_as_a_split(tmp_path):
    save_classes(tmp_path, 'bus', 'car', 'train', 'train/.ipynb_checkpoints')
    assert get_class_names(open_dataset(str(tmp_path), 'train')) == ['bus', 'car', 'train']


def test_split_without_classes_is_told_apart_from_a_class(tmp_path):
    save_classes(tmp_path, 'train/a', 'train/b', 'val/a', 'val/b', 'test')
    with pytest.raises(InputError, match="has no split 'test', it has train, val; name one"):
        open_dataset(str(tmp_path), 'test')


def test_labels_that_are_integers_are_classes(tmp_path):
    pixels = [dict(bytes=(SAMPLE / 'images' / 'cat.png').read_bytes(), path=None)] * 3
    for split, labels in (('train', [0, 2, 1]), ('test', [1, 0, 1])):
        datasets.Dataset.from_dict(dict(image=pixels, label=labels)).to_parquet(tmp_path / f'{split}.parquet')
    train, test = (open_dataset(f'hfds/{tmp_path}', split) for split in ('train', 'test'))
    assert get_class_names(train) == ['0', '1', '2'] and get_class_names(test) == ['0', '1']
    assert adopt_classes(test, get_class_names(train)) == ['0', '1', '2']
    datasets.Dataset.from_dict(dict(image=pixels, label=[7, 10 ** 9, 3])).to_parquet(tmp_path / 'train.parquet')
    with pytest.raises(InputError, match='The dataset does not say its classes'):  # numbers of images, say
        get_class_names(open_dataset(f'hfds/{tmp_path}', 'train'))


def test_labels_that_are_names_are_classes(tmp_path):
    pixels = [dict(bytes=(SAMPLE / 'images' / 'cat.png').read_bytes(), path=None)] * 3
    splits = dict(train=['owl', 'crow', 'ant'], test=['owl', 'ant', 'owl'], validation=['ant', None, 'owl'])
    for split, labels in splits.items():
        datasets.Dataset.from_dict(dict(image=pixels, label=labels)).to_parquet(tmp_path / f'{split}.parquet')
    train, test, bad = (open_dataset(f'hfds/{tmp_path}', split) for split in splits)
    assert get_class_names(train) == ['ant', 'crow', 'owl'] and get_class_names(test) == ['ant', 'owl']
    assert adopt_classes(test, get_class_names(train)) == ['ant', 'crow', 'owl']
    config = DataConfig((3, 32, 32), (0, 0, 0), (1, 1, 1))
    assert decode(train, config, progress=False).targets.tolist() == [2, 1, 0]
    assert decode(test, config, progress=False).targets.tolist() == [2, 0, 2]
    assert adopt_classes(train, ['owl', 'crow', 'ant']) == ['owl', 'crow', 'ant']  # a network's own order
    assert decode(train, config, progress=False).targets.tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r'Image 1 of the dataset has no label \(-1\); name a split that has'):
        decode(bad, config, progress=False)
    assert decode(bad, config, progress=False, labelled=False).targets.tolist() == [0, -1, 1]  # enough to calibrate on


def test_workers_end_with_what_they_were_for(tmp_path):
    for i in range(40):
        (tmp_path / 'a').mkdir(exist_ok=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'a' / f'{i:02}.png')
    (tmp_path / 'a' / '03.png').write_bytes(b'no image')
    source = ImageSet(open_dataset(str(tmp_path), 'train'), 3)
    loader = DataLoader(source, batch_size=2, num_workers=2, worker_init_fn=init_worker, collate_fn=list)
    before = set(multiprocessing.active_children())
    with pytest.raises(InputError, match='03.png'):
        list(read_batches(loader))
    assert set(multiprocessing.active_children()) <= before
    batches = read_batches(loader)
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()  # as where an error ends the loop over them
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize('image, label, message', [
    (None, 0, r'cannot be read, remove or replace it: it is empty; or name the split train\[:1\]\+train\[2:\]$'),
    ('x', None, 'has no label')])
def test_empty_cell_of_a_table_is_named(tmp_path, image, label, message):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn
    Image.new('RGB', (8, 8)).save(tmp_path / 'x.png')
    good = dict(bytes=(tmp_path / 'x.png').read_bytes(), path=None)
    table = Dataset.from_dict(
        dict(image=[good, good if image == 'x' else image], label=[1, label]),
        Features(image=ImageColumn(), label=ClassLabel(names=['a', 'b'])))
    (tmp_path / 'set').mkdir()
    table.to_parquet(tmp_path / 'set' / 'train.parquet')
    with pytest.raises(InputError, match=f'Image 1 of the dataset {message}'):
        decode(open_dataset(f'hfds/{tmp_path / "set"}', 'train'), CONFIG, progress=False)


@pytest.mark.parametrize('mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('channels', [1, 3])
def test_images_are_made_square_as_the_network_has_it(tmp_path, mode, channels):
    size = (32, 96, 3)[:2 + (channels > 1)]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    for name in 'ab':
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / '0.png')
    config = DataConfig((channels, 8, 8), (0.5, 0.4, 0.3)[:channels], (0.2, 0.3, 0.4)[:channels], crop_mode=mode)
    transform = create_transform(  # timm's for evaluation, with borders of the mean colour
        config.input_size, interpolation='bicubic', crop_pct=1., crop_mode=mode, mean=config.mean, std=config.std)
    expected = transform(image)
    dataset = open_dataset(str(tmp_path), 'train')
    streamed = StreamingLoader(dataset, config, 2, torch.device('cpu'), num_workers=0)
    in_memory = InMemoryLoader(decode(dataset, config, progress=False), config, 2, torch.device('cpu'))
    for loader in (streamed, in_memory):
        torch.testing.assert_close(next(loader.epoch(0))[0], expected.expand(2, -1, -1, -1))


@pytest.mark.parametrize('name', ['torch', 'hfds', 'wds'])
def test_folder_may_be_called_as_a_kind_of_set(tmp_path, monkeypatch, name):
    for label in 'ab':
        (tmp_path / name / 'train' / label).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / name / 'train' / label / '0.png')
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset(name, 'train')) == 2


def test_classes_of_one_name_have_one_number(capsys):
    for other in (['airplane', 'bird', 'car'], ['plane', 'bird', 'auto']):
        assert capsys.readouterr().err == ''
        check_classes('net', ['airplane', 'bird', 'car'], 'set', other)
        tell_other_names('net', ['airplane', 'bird', 'car'], 'set', other)
    assert "class 0 is 'airplane' in the one and 'plane' in the other); they are compared" in capsys.readouterr().err
    for other in (['airplane', 'car', 'bird'], ['bird', 'airplane', 'monkey'], ['x', 'y', 'bird']):
        with pytest.raises(InputError, match='net and set have classes in another order'):
            check_classes('net', ['airplane', 'bird', 'car'], 'set', other)


def test_folder_of_classes_alone_is_one_split(folder):
    assert len(open_dataset(str(folder / 'train'), 'test')) == 8


@pytest.mark.parametrize('size', [(8, 8), (16, 16)])
def test_images_are_cropped_whatever_their_size(tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    (tmp_path / 'ant').mkdir()
    Image.fromarray(pixels).save(tmp_path / 'ant' / '0.png')
    config = replace(CONFIG, crop_pct=0.5, interpolation='bilinear')
    decoded = decode(open_dataset(str(tmp_path), 'train'), config, progress=False).images[0]
    whole = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decoded.permute(1, 2, 0).numpy(), np.asarray(whole.crop((4, 4, 12, 12))))


def test_labels_are_those_of_the_column_that_is_named(tmp_path):
    images = [Image.new('RGB', (8, 8), color) for color in ('red', 'blue')]
    features = datasets.Features(
        img=datasets.Image(), fine_label=datasets.ClassLabel(names=['crow', 'owl', 'swan']),
        coarse_label=datasets.ClassLabel(names=['songbird', 'other']))
    table = datasets.Dataset.from_dict(dict(img=images, fine_label=[2, 1], coarse_label=[0, 1]), features=features)
    (tmp_path / 'birds').mkdir()
    table.to_parquet(tmp_path / 'birds' / 'train.parquet')
    for key, names, targets in (
            ('fine_label', ['crow', 'owl', 'swan'], [2, 1]), ('coarse_label', ['songbird', 'other'], [0, 1])):
        dataset = open_dataset(f'hfds/{tmp_path / "birds"}', 'train', input_key='img', target_key=key)
        decoded = decode(dataset, DataConfig((3, 8, 8), (0, 0, 0), (1, 1, 1)), progress=False)
        assert decoded.class_names == names and decoded.targets.tolist() == targets


@pytest.mark.parametrize('kwargs', [dict(input_key='picture'), dict(input_key='img', target_key='fine_label')])
def test_unknown_columns_are_answered_with_those_there_are(kwargs):
    with pytest.raises(InputError, match='it has img, label; name one with --'):
        open_dataset(f'hfds/{SAMPLE}', 'test[:5]', **kwargs)


def test_image_without_a_label_is_named(folder, monkeypatch):
    dataset = open_dataset(str(folder), 'train')
    dataset.reader.samples[3] = (dataset.reader.samples[3][0], -1)  # as in the test splits of competitions
    with pytest.raises(InputError, match=r'Image 3 of the dataset has no label \(-1\); name a split that has'):
        decode(dataset, CONFIG, progress=False)
    assert decode(dataset, CONFIG, progress=False, labelled=False).targets[3] == -1  # enough to calibrate on


@pytest.mark.parametrize('a, b, shared', [
    ('train', 'train', True), ('train', 'test', False), ('train[:10]', 'train[9:]', True),
    ('train[:10]', 'train[10:]', False), ('train[:10%]', 'train[140:150]', True), ('test', 'train[:5]+test[:5]', True)])
def test_parts_that_share_images_are_known(a, b, shared):
    a, b = (open_dataset('sample', split) for split in (a, b))
    assert share_images(a, b) is share_images(b, a) is shared


def test_parts_of_torchvision_share_no_images():
    train, test = (SimpleNamespace(root='r', train=train) for train in (True, False))
    assert share_images(train, train) and not share_images(train, test)


def test_labels_without_names_are_refused():
    with pytest.raises(InputError, match='ClassLabel'):
        get_class_names(object())
