"""Augmentation of small images: random crop and flip of whole batches, and policies image by image.

timm's transforms have no crop of a padded image, which is the standard for 32x32; it is here. Policies (AutoAugment,
RandAugment, AugMix, TrivialAugment) are timm's and torchvision's.
"""
import random
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Tuple

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import NAME_TO_OP
from timm.data.transforms_factory import transforms_imagenet_train
from torchvision.transforms import Compose, InterpolationMode, TrivialAugmentWide

Policy = Callable[[Image.Image], Image.Image]
PREPROCESSING = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    return image if bits >= 8 else ImageOps.posterize(image, max(bits, 1))


# timm's strongest levels ask for 0 bits, which newer versions of Pillow refuse
NAME_TO_OP.update({name: _posterize for name in ('Posterize', 'PosterizeOriginal', 'PosterizeIncreasing')})


@dataclass
class DataConfig:
    """What a network expects of its input, as in timm's pretrained_cfg, and how training images are augmented."""
    input_size: Tuple[int, int, int]
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    interpolation: str = 'bicubic'
    crop_pct: float = 1.0
    crop_mode: str = 'center'  # or 'squash', 'border'
    padding: int = 4  # random crop of the image padded by this many pixels on each side
    padding_mode: str = 'reflect'
    hflip: float = 0.5
    vflip: float = 0.
    # of randomly resized crops, which sets that stream have: share of the area, aspect ratio, kind; timm's if None
    scale: Optional[Tuple[float, ...]] = None
    ratio: Optional[Tuple[float, ...]] = None
    train_crop_mode: Optional[str] = None
    train_interpolation: Optional[str] = None  # `interpolation` if None
    augmented: bool = True  # False of such a set: the centre, as in evaluation
    policy: Optional[str] = None  # 'trivial', or a configuration of timm's auto_augment
    color_jitter: Optional[Tuple[float, ...]] = None  # of brightness, contrast, saturation, perhaps hue
    color_jitter_prob: Optional[float] = None  # 1 if None
    grayscale_prob: float = 0.
    gaussian_blur_prob: float = 0.
    re_prob: float = 0.  # random erasing, by timm
    re_mode: str = 'const'
    re_count: int = 1

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> 'DataConfig':
        """The preprocessing of a pretrained_cfg, or of an exported file."""
        given: Dict[str, Any] = {
            key: tuple(cfg[key]) if isinstance(cfg[key], list) else cfg[key] for key in PREPROCESSING if key in cfg}
        return cls(**given)

    @property
    def fill(self) -> Tuple[int, ...]:
        """The mean colour, in [0, 255]."""
        return tuple(min(255, round(255 * m)) for m in self.mean)


@dataclass
class Crops:
    """Where each image of a batch is cropped, and whether it is flipped."""
    top: torch.Tensor  # (B,) int64, in the padded image
    left: torch.Tensor  # (B,)
    hflip: torch.Tensor  # (B,) bool
    vflip: torch.Tensor  # (B,) bool

    @classmethod
    def draw(cls, batch_size: int, config: DataConfig, generator: torch.Generator) -> 'Crops':
        top, left = torch.randint(0, 2 * config.padding + 1, (2, batch_size), generator=generator)
        hflip, vflip = (torch.rand(batch_size, generator=generator) < p for p in (config.hflip, config.vflip))
        return cls(top, left, hflip, vflip)


def pad(images: torch.Tensor, config: DataConfig) -> torch.Tensor:
    """Pad images (N, C, H, W) by `config.padding` on each side: by reflection, or with the mean colour."""
    p = config.padding
    if p == 0:
        return images
    n, c, h, w = images.shape
    out = np.empty((n, c, h + 2 * p, w + 2 * p), dtype=np.uint8)
    for channel, fill in enumerate(config.fill):
        source, width = images[:, channel].numpy(), ((0, 0), (p, p), (p, p))
        if config.padding_mode == 'constant':
            out[:, channel] = np.pad(source, width, constant_values=fill)
        else:
            out[:, channel] = np.pad(source, width, mode='reflect')
    return torch.from_numpy(out)


def crop_and_flip(padded: torch.Tensor, index: torch.Tensor, crops: Crops, size: Tuple[int, int]) -> torch.Tensor:
    """A batch of crops.

    Args:
        padded: Images (N, C, H + 2p, W + 2p).
        index: Images to take (B,).
        crops: Where to crop them.
        size: H and W.

    Returns:
        (B, C, H, W), of the type and on the device of `padded`.
    """
    # a GPU is best kept busy with one large gather, a CPU with contiguous copies: 40 times as fast there
    return (_crop_by_copy if padded.device.type == 'cpu' else _crop_by_gather)(padded, index, crops, size)


def _crop_by_copy(padded: torch.Tensor, index: torch.Tensor, crops: Crops, size: Tuple[int, int]) -> torch.Tensor:
    h, w = size
    source = padded.numpy()
    out = np.empty((len(index), source.shape[1], h, w), dtype=source.dtype)
    places = zip(index.tolist(), crops.top.tolist(), crops.left.tolist(), crops.hflip.tolist(), crops.vflip.tolist())
    for i, (image, top, left, hflip, vflip) in enumerate(places):
        window = source[image, :, top:top + h, left:left + w]
        out[i] = window[:, ::-1 if vflip else 1, ::-1 if hflip else 1]
    return torch.from_numpy(out)


def _crop_by_gather(padded: torch.Tensor, index: torch.Tensor, crops: Crops, size: Tuple[int, int]) -> torch.Tensor:
    h, w = size
    device = padded.device
    # a copy that is waited for would wait for all that was queued before, the last step of training; MPS may read the
    # source when it is gone (pytorch/pytorch#189690)
    index, top, left, hflip, vflip = (
        t.to(device, non_blocking=device.type == 'cuda')
        for t in (index, crops.top, crops.left, crops.hflip, crops.vflip))
    rows = torch.arange(h, device=device) + top[:, None]  # (B, H)
    rows = torch.where(vflip[:, None], rows.flip(1), rows)
    cols = torch.arange(w, device=device) + left[:, None]  # (B, W)
    cols = torch.where(hflip[:, None], cols.flip(1), cols)
    channels = torch.arange(padded.shape[1], device=device)[None, :, None, None]
    return padded[index[:, None, None, None], channels, rows[:, None, :, None], cols[:, None, None, :]]


def create_policy(config: DataConfig) -> Optional[Policy]:
    """What is done to single images after crop and flip, by timm: the policy that `config.policy` names, 'trivial'
    (TrivialAugment Wide), 'rand-...', 'augmix-...', 'original', ..., then jittered colours, grey images, and blur.

    Raises:
        AssertionError, ValueError: If timm knows none of this name.
    """
    trivial = config.policy == 'trivial'
    _, rest, _ = transforms_imagenet_train(
        config.input_size[1:], auto_augment=None if trivial else config.policy, color_jitter=config.color_jitter,
        color_jitter_prob=config.color_jitter_prob, force_color_jitter=True, grayscale_prob=config.grayscale_prob,
        gaussian_blur_prob=config.gaussian_blur_prob, mean=config.mean, std=config.std, separate=True)
    steps = rest.transforms
    if trivial:
        steps = [TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR, fill=list(config.fill)), *steps]
    return Compose(steps) if steps else None


def apply_policy(images: torch.Tensor, policy: Policy, seed: int) -> torch.Tensor:
    """Apply a policy to each image of a batch (B, C, H, W) uint8, as a function of the seed alone."""
    out = np.empty(images.shape, dtype=np.uint8)
    with seeded(seed):
        for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):  # (H, W, C)
            changed = np.asarray(policy(Image.fromarray(image if image.shape[2] > 1 else image[..., 0])))
            out[i] = changed.reshape(image.shape).transpose(2, 0, 1)
    return torch.from_numpy(out)


def mix_seed(*key: int) -> int:
    """A seed of 63 bits for a place in a run, such as (seed, epoch, batch)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators that policies draw from, and put them back afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone; dropout draws from a GPU's
        np.random.seed(seed % 2 ** 32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
