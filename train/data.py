"""Image sets for training small networks.

A set that fits in memory is decoded once to a uint8 tensor; its batches are cropped, flipped and normalised on the
training device. A larger one streams through timm's loader with timm's augmentation.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, List, Optional, Protocol, Tuple

import numpy as np
import torch
from timm.data import create_dataset, create_loader
from timm.data.transforms_factory import create_transform
from tqdm import tqdm

from timm_tmblock.errors import InputError
from timm_tmblock.image import read_image

SAMPLE = Path(__file__).parent / 'sample'  # 2,000 images of CIFAR-10, see its README.md

Batch = Tuple[torch.Tensor, torch.Tensor]


class Loader(Protocol):
    """Batches of normalised images (B, C, H, W) and class indices (B,), already on the training device."""

    def __len__(self) -> int:
        """Batches an epoch on this process."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on."""
        ...


@dataclass
class DataConfig:
    """What a network expects of its input, as in timm's pretrained_cfg, and how training images are augmented."""
    input_size: Tuple[int, int, int]
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    interpolation: str = 'bicubic'
    crop_pct: float = 1.0
    padding: int = 4  # random crop of the image padded by this many pixels on each side
    padding_mode: str = 'reflect'
    hflip: float = 0.5


@dataclass
class InMemorySet:
    """Decoded images."""
    images: torch.Tensor  # (N, C, H, W) uint8
    targets: torch.Tensor  # (N,) int64
    class_names: List[str]

    def __len__(self) -> int:
        return len(self.targets)


def open_dataset(
        name: str,
        split: str,
        root: Optional[str] = None,
        input_key: str = 'image',
        target_key: str = 'label',
        download: bool = False,
        channels: int = 3,
) -> Any:
    """Open an image set by timm's names: `torch/<name>`, `hfds/<hub id or folder>`, a folder of class folders, ...

    Raises:
        InputError: If there is no such set, split or column.
    """
    if name == 'sample':
        name, input_key, target_key = f'hfds/{SAMPLE}', 'img', 'label'
    kwargs = dict(root=root, split=split, download=download, input_img_mode='L' if channels == 1 else 'RGB')
    if name.startswith('hfds/'):
        kwargs.update(input_key=input_key, target_key=target_key)
    elif not name.startswith('torch/') and '/' not in (root or ''):
        kwargs['root'] = root or name
    try:
        dataset = create_dataset(name, **kwargs)
        size = len(dataset)
    except Exception as e:  # every kind of set has errors of its own
        reason = str(e).strip().split('\n')[0] or type(e).__name__
        raise InputError(f'Cannot open split {split!r} of dataset {name!r}: {reason}') from e
    if size == 0:
        raise InputError(f'Split {split!r} of dataset {name!r} has no images; check the path and the split.')
    if name.startswith('hfds/'):
        table = dataset.reader.dataset.data
        # timm casts the image column, which adds an empty one where there was none
        columns = [c for c in table.column_names if table.column(c).null_count < size]
        for key, option in ((input_key, '--input-key'), (target_key, '--target-key')):
            if key not in columns:
                raise InputError(
                    f'Dataset {name!r} has no column {key!r}, it has {", ".join(columns)}; name one with {option}.')
    return dataset


def get_class_names(dataset: Any) -> List[str]:
    """Class names in the order of their indices."""
    reader = getattr(dataset, 'reader', dataset)
    class_to_idx = getattr(reader, 'class_to_idx', None)
    if not class_to_idx:
        raise InputError('The label column does not say its classes; cast it to datasets.ClassLabel first.')
    return [str(c) for c, _ in sorted(class_to_idx.items(), key=lambda item: item[1])]


def fits_in_memory(dataset: Any, config: DataConfig, limit_gb: float) -> bool:
    """Whether the decoded images take at most `limit_gb` GB."""
    return len(dataset) * math.prod(config.input_size) <= limit_gb * 1e9


def decode(dataset: Any, config: DataConfig, progress: bool = True) -> InMemorySet:
    """Decode every image once, resized as for evaluation where its size differs from the network's input.

    Raises:
        InputError: If an image cannot be read.
    """
    class_names = get_class_names(dataset)
    resize = create_transform(
        config.input_size, interpolation=config.interpolation, crop_pct=config.crop_pct, normalize=False)
    images = torch.empty(len(dataset), *config.input_size, dtype=torch.uint8)
    targets = torch.empty(len(dataset), dtype=torch.int64)
    for i in tqdm(range(len(dataset)), desc='Decoding', unit='img', disable=not progress, leave=False):
        try:
            # the reader, because timm's dataset silently puts another image in place of one that it cannot read
            image, target = (dataset.reader if hasattr(dataset, 'reader') else dataset)[i]
            images[i] = _to_uint8(image, config, resize)
        except (InputError, OSError, KeyError) as e:
            raise InputError(f'Image {i} of the dataset cannot be read, remove or replace it: {e}') from e
        targets[i] = int(target)
    return InMemorySet(images, targets, class_names)


def _to_uint8(source: Any, config: DataConfig, resize: Any) -> torch.Tensor:
    channels, height, width = config.input_size
    image = read_image(source, 'L' if channels == 1 else 'RGB')
    if image.size == (width, height):
        pixels = torch.from_numpy(np.array(image))
        return pixels.view(height, width, channels).permute(2, 0, 1)
    return resize(image)


class InMemoryLoader:
    """Batches of an InMemorySet, this process's share of them.

    Order, crops and flips are functions of seed, epoch, batch and process alone, so an epoch taken up again at any
    batch goes on as if it had never stopped. In training the order is shuffled and the last incomplete batch dropped;
    in evaluation each image is seen once, by one process.
    """

    def __init__(
            self,
            dataset: InMemorySet,
            config: DataConfig,
            batch_size: int,
            device: torch.device,
            training: bool = False,
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
            channels_last: bool = False,
    ) -> None:
        self.config = config
        self.batch_size = batch_size
        self.device = device
        self.training = training
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.images = dataset.images.to(device)
        self.targets = dataset.targets.to(device)
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)
        self.scale = (1 / (255 * std)).view(1, -1, 1, 1).to(device)
        self.shift = (-mean / std).view(1, -1, 1, 1).to(device)
        if training and len(self) == 0:
            raise InputError(
                f'{len(dataset)} training images do not fill one batch of {batch_size} on {world_size} processes; '
                f'use a smaller --batch-size.')

    def __len__(self) -> int:
        if self.training:
            return len(self.targets) // (self.batch_size * self.world_size)
        return math.ceil(len(self._share()) / self.batch_size)

    def _share(self) -> range:
        return range(self.rank, len(self.targets), self.world_size)

    def _generator(self, *key: int) -> torch.Generator:
        seed = np.random.SeedSequence([self.seed, *key]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed) >> 1)  # torch takes 63 bits

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if self.training:
            order = torch.randperm(len(self.targets), generator=self._generator(epoch))
        else:
            order = torch.tensor(self._share())
        order = order.to(self.device)
        for batch in range(start, len(self)):
            first = (batch * self.world_size + self.rank if self.training else batch) * self.batch_size
            index = order[first:first + self.batch_size]
            images = self.images[index]
            if self.training:
                images = random_crop_flip(images, self.config, self._generator(epoch, batch, self.rank))
            images = images.to(memory_format=self.memory_format) * self.scale + self.shift
            yield images, self.targets[index]


def random_crop_flip(images: torch.Tensor, config: DataConfig, generator: torch.Generator) -> torch.Tensor:
    """Crop each padded image at its own random place, and mirror it with probability `hflip`.

    Args:
        images: (B, C, H, W), any dtype.
        config: Padding, its mode ('reflect', or 'constant' for the mean colour) and flip probability.
        generator: CPU generator all random numbers come from.
    """
    b, c, h, w = images.shape
    device = images.device
    offsets = torch.randint(-config.padding, config.padding + 1, (2, b, 1), generator=generator).to(device)
    flip = (torch.rand(b, 1, generator=generator) < config.hflip).to(device)
    rows = torch.arange(h, device=device) + offsets[0]  # (B, H)
    cols = torch.arange(w, device=device) + offsets[1]  # (B, W)
    cols = torch.where(flip, cols.flip(1), cols)
    if config.padding_mode == 'constant':
        inside = ((rows >= 0) & (rows < h))[:, None, :, None] & ((cols >= 0) & (cols < w))[:, None, None, :]
        rows, cols = rows.clamp(0, h - 1), cols.clamp(0, w - 1)
    else:
        rows, cols = (n - 1 - (n - 1 - i.abs()).abs() for i, n in ((rows, h), (cols, w)))
    sample = torch.arange(b, device=device)[:, None, None, None]
    channel = torch.arange(c, device=device)[None, :, None, None]
    out = images[sample, channel, rows[:, None, :, None], cols[:, None, None, :]]
    if config.padding_mode == 'constant':
        fill = torch.tensor(config.mean, device=device) * 255
        out = torch.where(inside, out, fill.round().to(images.dtype).view(1, -1, 1, 1))
    return out


class StreamingLoader:
    """timm's loader over a set that does not fit in memory, with timm's augmentation in training."""

    def __init__(
            self,
            dataset: Any,
            config: DataConfig,
            batch_size: int,
            device: torch.device,
            training: bool = False,
            num_workers: int = 4,
            distributed: bool = False,
            channels_last: bool = False,
    ) -> None:
        self.device = device
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.loader = create_loader(
            dataset,
            input_size=config.input_size,
            batch_size=batch_size,
            is_training=training,
            hflip=config.hflip,
            color_jitter=0.,
            interpolation=config.interpolation,
            mean=config.mean,
            std=config.std,
            crop_pct=config.crop_pct,
            num_workers=num_workers,
            distributed=distributed,
            device=device,
            use_prefetcher=False,  # its uint8 collation and side stream need CUDA
        )

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if hasattr(self.loader.sampler, 'set_epoch'):
            self.loader.sampler.set_epoch(epoch)
        for batch, (images, targets) in enumerate(self.loader):
            if batch >= start:
                yield images.to(self.device, memory_format=self.memory_format), targets.to(self.device)
