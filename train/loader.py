"""Batches for training and evaluation, a process's share of them.

A set in memory is cropped, flipped and normalised in batches; a larger one streams through timm's loader.
"""
import math
import os
from typing import Any, Iterable, Iterator, List, Optional, Protocol, Tuple, Union

import torch
from accelerate import skip_first_batches
from timm.data import create_loader, create_transform
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor
from timm.task import evaluation_sample_limit
from torch.utils.data import DataLoader, Dataset, Subset

from timm_tmblock.errors import InputError
from train.augment import Crops, DataConfig, apply_policy, create_policy, crop_and_flip, mix_seed, pad
from train.config import refusing
from train.data import ImageSet, InMemorySet, read_batches, share_batch
from train.signals import init_worker

Batch = Tuple[torch.Tensor, torch.Tensor]
UNCHANGED = 'no augmentation'


def say_too_few(images: int, batch_size: int, processes: int) -> str:
    advice = f'a --batch-size of at most {images // processes}' if images >= processes else 'fewer processes'
    return f'{images} training images do not fill one batch of {batch_size} on {processes} processes; use {advice}.'


class Loader(Protocol):
    """Batches of normalised images (B, C, H, W) and class indices (B,), already on the training device."""
    num_images: int  # of every process
    max_samples: Optional[int]  # images of this process that count in evaluation; None: all
    augmentation: str  # how training crops

    def __len__(self) -> int:
        """Batches an epoch on this process."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on."""
        ...


class TrainingBatches(Dataset):
    """Augmented batches by (epoch, batch): images (B, C, H, W) uint8 and targets (B,).

    Order, crops, flips and policy are functions of seed, epoch, batch and process alone, so a run taken up again at
    any batch goes on as if it had never stopped, with any number of workers. The last incomplete batch is dropped.
    """

    def __init__(
            self,
            dataset: InMemorySet,
            config: DataConfig,
            batch_size: int,
            device: torch.device,
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
    ) -> None:
        self.config = config
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        with refusing('This augmentation of single images'):
            self.policy = create_policy(config)
        if self.policy is not None:
            device = torch.device('cpu')  # policies are of single images, there
        self.padded = pad(dataset.images, config).to(device)
        self.targets = dataset.targets.to(device)
        self.order: Tuple[int, torch.Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return len(self.targets) // (self.batch_size * self.world_size)

    def _shuffled(self, epoch: int) -> torch.Tensor:
        if self.order[0] != epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            self.order = epoch, torch.randperm(len(self.targets), generator=generator).to(self.targets.device)
        return self.order[1]

    def __getitem__(self, key: Tuple[int, int]) -> Batch:
        epoch, batch = key
        seed = mix_seed(self.seed, epoch, batch, self.rank)
        first = (batch * self.world_size + self.rank) * self.batch_size
        index = self._shuffled(epoch)[first:first + self.batch_size]
        crops = Crops.draw(self.batch_size, self.config, torch.Generator().manual_seed(seed))
        images = crop_and_flip(self.padded, index, crops, self.config.input_size[1:])
        if self.policy is not None:
            images = apply_policy(images, self.policy, seed)
        return images, self.targets[index]


class EvaluationBatches(Dataset):
    """A process's share of a set by (epoch, batch): images (B, C, H, W) uint8 and targets (B,).

    All processes have as many batches, or FSDP would wait for some: shares repeat an image after `max_samples`.
    """

    def __init__(
            self,
            dataset: InMemorySet,
            batch_size: int,
            device: torch.device,
            rank: int = 0,
            world_size: int = 1,
    ) -> None:
        sampler = OrderedDistributedSampler(dataset, world_size, rank)
        share = torch.tensor(list(sampler), dtype=torch.int64)
        self.max_samples = sampler.num_valid_samples
        self.batch_size = batch_size
        self.images, self.targets = dataset.images[share].to(device), dataset.targets[share].to(device)

    def __len__(self) -> int:
        return math.ceil(len(self.targets) / self.batch_size)

    def __getitem__(self, key: Tuple[int, int]) -> Batch:
        batch = slice(key[1] * self.batch_size, (key[1] + 1) * self.batch_size)
        return self.images[batch], self.targets[batch]


class InMemoryLoader:
    """Batches of an InMemorySet."""

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
            num_workers: int = 0,
    ) -> None:
        self.num_images = len(dataset)
        self.max_samples: Optional[int] = None
        self.device = device
        self.pinned = device.type == 'cuda'
        self.keys: List[Tuple[int, int]] = []  # of the epoch in progress, for workers
        self.workers: Optional[DataLoader] = None
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.augmentation = f'random crops from {config.padding} pixels of padding' if config.augmented else UNCHANGED
        self.erase: Optional[RandomErasing] = None
        self.batches: Union[TrainingBatches, EvaluationBatches]
        if training:
            self.batches = batches = TrainingBatches(dataset, config, batch_size, device, seed, rank, world_size)
            if len(batches) == 0:
                raise InputError(say_too_few(len(dataset), batch_size, world_size))
            if batches.policy is not None and num_workers > 0:
                self.workers = DataLoader(
                    batches, batch_size=None, sampler=self.keys,
                    num_workers=min(num_workers, os.cpu_count() or 1), pin_memory=self.pinned,
                    collate_fn=share_batch, worker_init_fn=init_worker,
                    persistent_workers=True,  # each imports PyTorch anew where processes are not forked
                    generator=torch.Generator())  # of its own: the global one would advance, and again after a restart
            if config.re_prob > 0:
                with refusing('These settings of random erasing'):
                    self.erase = RandomErasing(
                        config.re_prob, mode=config.re_mode, max_count=config.re_count, device=device)
        else:
            self.batches = EvaluationBatches(dataset, batch_size, device, rank, world_size)
            self.max_samples = self.batches.max_samples
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)
        self.scale = (1 / (255 * std)).view(1, -1, 1, 1).to(device)
        self.shift = (-mean / std).view(1, -1, 1, 1).to(device)

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        keys = [(epoch, batch) for batch in range(start, len(self.batches))]
        self.keys[:] = keys
        batches: Iterable[Batch] = map(self.batches.__getitem__, keys) if self.workers is None else self.workers
        for images, targets in batches:
            images, targets = (t.to(self.device, non_blocking=self.pinned) for t in (images, targets))
            images = self.normalize(images)
            # its random numbers are the process's, which checkpoints hold
            yield images if self.erase is None else self.erase(images), targets

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) to float32 with mean 0 and standard deviation 1."""
        images = images.float().mul_(self.scale).add_(self.shift)
        return images.contiguous(memory_format=self.memory_format)  # last: arithmetic is slower on interleaved channels


class StreamingLoader:
    """timm's loader over a set that does not fit in memory, with timm's augmentation in training.

    Order and augmentation are functions of seed, epoch and image alone, as in `TrainingBatches`.
    """

    def __init__(
            self,
            dataset: Any,
            config: DataConfig,
            batch_size: int,
            device: torch.device,
            training: bool = False,
            seed: int = 0,
            num_workers: int = 4,
            world_size: int = 1,
            channels_last: bool = False,
    ) -> None:
        rows = None
        if isinstance(dataset, Subset):
            dataset, rows = dataset.dataset, dataset.indices
        self.images = ImageSet(dataset, config.input_size[0], rows=rows)
        self.num_images = len(self.images)
        self.device = device
        self.training = training
        self.seed = seed
        self.augmentation = 'randomly resized crops' if config.augmented else UNCHANGED
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.pinned = device.type == 'cuda'
        self.loader = create_loader(
            self.images,
            input_size=config.input_size,
            batch_size=batch_size,
            is_training=training,
            train_crop_mode=config.train_crop_mode,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            vflip=config.vflip,
            color_jitter=0.,
            re_prob=config.re_prob,
            re_mode=config.re_mode,
            re_count=config.re_count,
            interpolation=training and config.train_interpolation or config.interpolation,
            mean=config.mean,
            std=config.std,
            crop_pct=config.crop_pct,
            crop_mode=config.crop_mode,
            num_workers=min(num_workers, os.cpu_count() or 1),
            distributed=world_size > 1,
            device=device,
            pin_memory=self.pinned,
            use_prefetcher=False,  # its uint8 collation and side stream need CUDA
            persistent_workers=False,  # which would not see the seed of a new epoch
        )
        self.max_samples = None if training else evaluation_sample_limit(self.loader)
        self.loader.worker_init_fn = init_worker
        if training and not config.augmented:  # timm's no_aug would squash images of another shape
            self.loader.dataset.transform = create_transform(
                config.input_size, interpolation=config.interpolation, mean=config.mean, std=config.std,
                crop_pct=config.crop_pct, crop_mode=config.crop_mode)
        if training:
            if len(self.loader) == 0:
                raise InputError(say_too_few(self.num_images, batch_size, world_size))
            with refusing('This augmentation of single images'):
                policy = create_policy(config)
            if policy is not None:  # after crop and flip, as in timm
                steps: List[Any] = self.loader.dataset.transform.transforms
                steps.insert(next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor)), policy)

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if self.training:
            self.images.seed = mix_seed(self.seed, epoch)
        self.loader.generator = torch.Generator()  # of its own: the global one would advance
        sampler: Any = self.loader.sampler
        if hasattr(sampler, 'set_epoch'):
            sampler.seed = mix_seed(self.seed, epoch)  # which PyTorch adds: seeds would share orders
            sampler.set_epoch(0)
        elif hasattr(sampler, 'generator'):
            sampler.generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        loader: Any = skip_first_batches(self.loader, start) if start else self.loader
        for images, targets in read_batches(loader):
            yield (images.to(self.device, non_blocking=self.pinned, memory_format=self.memory_format),
                   targets.to(self.device, non_blocking=self.pinned))

