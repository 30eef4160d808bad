"""Regions of images as the layers around template matching see them."""
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F

from timm_tmblock.errors import InputError
from timm_tmblock.layers import PatchMean
from train.data import InMemorySet


@dataclass
class Sample:
    """Images of every class, and the regions of each to look at."""
    images: np.ndarray  # (I, H, W, C) uint8
    targets: np.ndarray  # (I,)
    class_names: List[str]
    grid: Tuple[int, int]  # height and width of the feature map
    places: np.ndarray  # (I, P) regions of each image, row · width + column

    @property
    def image_index(self) -> np.ndarray:
        """Image of each region, (I · P,)."""
        return np.repeat(np.arange(len(self.targets)), self.places.shape[1])

    @property
    def region_targets(self) -> np.ndarray:
        """Class of each region's image, (I · P,)."""
        return np.repeat(self.targets, self.places.shape[1])


def draw_sample(
        data: InMemorySet,
        grid: Tuple[int, int],
        images_per_class: int,
        regions_per_image: int,
        seed: int,
        max_regions: int = 2 ** 31,
) -> Sample:
    """Draw images of each class and regions of each image, the same for every network with this grid.

    Args:
        data: Images.
        grid: Height and width of the feature map.
        images_per_class: Of each class, or as many as the smallest has.
        regions_per_image: Of each image.
        seed: Of the draw.
        max_regions: In all; fewer images of each class are drawn where there would be more.

    Raises:
        InputError: If a class has no images, an image fewer regions than asked for, or the regions of one image of each
            class are too many.
    """
    rng = np.random.default_rng(seed)
    targets = data.targets.numpy()
    counts = np.bincount(targets, minlength=len(data.class_names))
    if counts.min() == 0:
        raise InputError(f'The set has no image of {data.class_names[counts.argmin()]}; name a split that has.')
    images_per_class = min(images_per_class, counts.min())
    size = grid[0] * grid[1]
    if not 0 < regions_per_image <= size:
        raise InputError(f'Ask for 1 to {size} regions of an image, not {regions_per_image}.')
    images_per_class = min(images_per_class, max_regions // (len(counts) * regions_per_image))
    if not images_per_class:
        raise InputError(
            f'{regions_per_image} regions of one image of each of {len(counts)} classes are more than {max_regions}; '
            f'take fewer --regions.')
    index = np.concatenate([
        rng.permutation(np.flatnonzero(targets == k))[:images_per_class] for k in range(len(counts))])
    places = np.stack([rng.permutation(size)[:regions_per_image] for _ in index])
    images = data.images[torch.from_numpy(index)].permute(0, 2, 3, 1).numpy()
    return Sample(images, targets[index], data.class_names, grid, places)


@torch.inference_mode()
def map_size(model: Any, size: Sequence[int]) -> Tuple[int, int]:
    """Height and width of the map that patches of images of this height and width are matched on."""
    image = next(model.parameters()).new_zeros(1, model.in_chans, *size)
    height, width = model._forward_trunk(image).shape[2:]
    return height, width


def normalize(model: Any, images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, C, H, W) as the network takes it, on its device."""
    like = next(model.parameters())
    mean, std = (like.new_tensor(model.pretrained_cfg[key]).view(1, -1, 1, 1) for key in ('mean', 'std'))
    return ((images.to(like.device) / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


LAYERS = ('stage 3', 'patch mean', 'shortcut', 'values', 'block output', 'scores')


@torch.inference_mode()
def embed_regions(
        model: Any,
        sample: Sample,
        layers: Sequence[str] = LAYERS,
        patch_size: Optional[int] = None,
        batch_size: int = 200,
) -> Dict[str, np.ndarray]:
    """What layers around template matching make of the regions of a sample.

    Args:
        model: Network of this project, in evaluation mode.
        sample: Regions of its feature map.
        layers: Of LAYERS: the input f of the block, its mean over the patch around each region (x_g of section 3.3),
            the two summands of the output, which are the projected f and the values f', the output of the block, which
            stage 4 takes, and the class probabilities of the patches.
        patch_size: Of the mean over patches, the network's own if None.
        batch_size: Images at once.

    Returns:
        (N, D) by layer, of those that the network has; a baseline has 'stage 3' and its mean over patches, and where
        values are concatenated there is no 'shortcut'.
    """
    patch_mean = PatchMean(patch_size or model.patch_size)
    parts: Dict[str, List[np.ndarray]] = {}
    for first in range(0, len(sample.images), batch_size):
        batch = slice(first, first + batch_size)
        f = model._forward_trunk(normalize(model, torch.from_numpy(sample.images[batch]).permute(0, 3, 1, 2)))
        maps = {'stage 3': f, 'patch mean': patch_mean(f)}
        if model.has_template_matching:
            logits = model.tm.patch_logits(f)
            if model.tm.shortcut is not None:
                maps['shortcut'] = model.tm.shortcut(f)
            maps['values'] = model.tm.value(model.tm.mix(logits))
            maps['block output'] = model.tm.embed(f, logits)
            maps['scores'] = F.softmax(logits, dim=1)
        places = torch.from_numpy(sample.places[batch]).to(f.device)
        for name in (name for name in maps if name in layers):
            x = maps[name].float().flatten(2).transpose(1, 2)  # (B, H · W, D)
            x = x.gather(1, places[:, :, None].expand(-1, -1, x.shape[2]))
            parts.setdefault(name, []).append(x.flatten(0, 1).cpu().numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def crop_patches(sample: Sample, patch_size: int, stride: int) -> np.ndarray:
    """The pixels of the patch around each region, padded with grey where it leaves the image.

    Args:
        sample: Regions.
        patch_size: Side of the patches, in pixels of the feature map; where it is even, they reach one further down
            and to the right, as the mean over them does.
        stride: Pixels of the image to one of the feature map.

    Returns:
        (N, S, S, C) uint8, S = patch_size · stride.
    """
    before, side = (patch_size - 1) // 2 * stride, patch_size * stride
    padding = ((0, 0), (before, side), (before, side), (0, 0))
    padded = np.pad(sample.images, padding, constant_values=128)
    rows, columns = (part * stride for part in np.divmod(sample.places.ravel(), sample.grid[1]))
    return np.stack([
        padded[i, top:top + side, left:left + side] for i, top, left in zip(sample.image_index, rows, columns)])
