"""Real images an export is calibrated and checked on."""
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Optional, Sequence

import numpy as np
import torch
from timm.data.model_config import resolve_input_data_config

from export.metadata import check_preprocessing
from timm_tmblock.errors import InputError
from timm_tmblock.models._labels import list_class_names
from train.augment import DataConfig
from train.config import positive
from train.data import KINDS, add_set_options, adopt_classes, check_classes, decode, open_named, share_images


@dataclass
class Images:
    """Images of a set, in two parts that share none."""
    calibration: np.ndarray  # (N, C, H, W) uint8, sets the ranges of int8
    held_out: np.ndarray  # (M, C, H, W) uint8, what the file is checked on
    targets: Optional[np.ndarray]  # (M,) class indices of those, if the set's classes are the network's
    source: str  # set and split of the held-out part
    calibration_source: str = ''
    rows: Sequence[int] = ()  # of the held-out images in their split, all from the first on if empty

    def name(self, index: int) -> str:
        """What to call a held-out image, by its number in the split."""
        return f'image {self.rows[index] if self.rows else index} of {self.source}'


def add_image_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group('images for comparison with PyTorch, and for the calibration of int8')
    add_set_options(group)
    group.add_argument('--calibration-split', default='train', help='split used for calibration (default: train)')
    group.add_argument('--check-split', default='test', help='split used for comparison (default: test)')
    group.add_argument('--calibration-images', type=positive, default=512, help=(
        'images for calibration, at most (default: 512)'))
    group.add_argument('--check-images', type=positive, default=512, help=(
        'images for comparison, at most (default: 512)'))


def load_images(args: Namespace, model: Any, calibrate: bool) -> Images:
    """The images that the options of `add_image_options` name, resized to the network's input.

    Args:
        args: Options.
        model: Network with timm's pretrained_cfg.
        calibrate: Load calibration images too.

    Raises:
        InputError: If they cannot be read, the parts share images, or their classes cannot be the network's.
    """
    resolved = resolve_input_data_config(model, pretrained_cfg=model.pretrained_cfg)
    check_preprocessing(resolved)
    config = DataConfig.of(resolved)
    check, calibration = open_named(args, args.check_split), None
    if calibrate:
        train = open_named(args, args.calibration_split)
        if share_images(train, check):
            raise InputError(
                f'The splits {args.calibration_split!r} for calibration and {args.check_split!r} for the check have '
                f'images in common; name two splits that share none (in a folder, two subfolders; of an hfds/ set '
                f'slices, as train[:90%] and train[90%:]), or leave int8 out.')
        rows = _choose_rows(train, args.calibration_images)
        calibration = decode(train, config, progress=len(rows) > 2000, labelled=False, rows=rows).images.numpy()
    labels = list_class_names(model.pretrained_cfg)
    names = adopt_classes(check, labels)
    rows = _choose_rows(check, args.check_images)
    held_out = decode(check, config, progress=len(rows) > 2000, rows=rows)
    if args.dataset != 'sample' and len(names) != model.num_classes:
        raise InputError(
            f'{args.dataset} has {len(names)} classes and the network {model.num_classes}; name its own '
            f'set with --dataset.')
    if len(labels) == len(names) and (args.dataset != 'sample' or set(labels) == set(names)):
        check_classes('The network', labels, args.dataset, names)
    if calibrate and args.dataset == 'sample' and (names != labels if labels else len(names) != model.num_classes):
        raise InputError(
            'int8 is calibrated on images of the dataset the network is for, and the sample is of CIFAR-10; name yours '
            'with --dataset, or leave int8 out.')
    same = names == labels if labels or args.dataset == 'sample' else len(names) == model.num_classes
    return Images(
        calibration=held_out.images[:0].numpy() if calibration is None else calibration,
        held_out=held_out.images.numpy(),
        targets=held_out.targets.numpy() if same else None,
        source=f'{name_set(args.dataset)} {args.check_split}',
        rows=rows,
        calibration_source=f'{name_set(args.dataset)} {args.calibration_split}',
    )


def name_set(dataset: str) -> str:
    """Without the place on this machine, as it goes into files."""
    kind, _, rest = dataset.partition('/')
    name = rest if rest and kind in KINDS else dataset
    return Path(name).resolve().name if Path(name).exists() or Path(name).is_absolute() else name


def _choose_rows(dataset: Any, limit: int) -> List[int]:
    """Spread over the whole set, and so over all classes where it is sorted by them."""
    size = len(dataset)
    return torch.linspace(0, size - 1, min(limit, size)).long().tolist()
