"""What the network is given, as the settings of a run say: preprocessing, batches and mixtures of them."""
from argparse import Namespace
from typing import Any, Dict, Optional, Sequence, Tuple

import timm
from accelerate import Accelerator
from timm.data import Mixup
from timm.models import PretrainedCfg

from timm_tmblock.errors import InputError
from train.augment import DataConfig
from train.config import refusing
from train.data import InMemorySet
from train.loader import InMemoryLoader, Loader, StreamingLoader
from train.model import resolve_img_size


def create_data_config(args: Namespace) -> DataConfig:
    """Preprocessing and augmentation: what the settings say, else what the model's pretrained config does.

    Raises:
        InputError: For channels that images are not decoded to, or values that do not fit them.
    """
    cfg = timm.get_pretrained_cfg(args.model) or PretrainedCfg()
    channels = args.model_kwargs.get('in_chans', cfg.input_size[0])

    def fit(values: Sequence[float]) -> Tuple[float, ...]:
        """One averaged value for grey images, one a channel otherwise."""
        return (round(sum(values) / len(values), 4),) if channels == 1 else tuple(values)

    config = DataConfig(
        input_size=(channels, *resolve_img_size(args, cfg)),
        mean=tuple(args.mean or fit(cfg.mean)),
        std=tuple(args.std or fit(cfg.std)),
        interpolation=args.interpolation or cfg.interpolation,
        crop_pct=args.crop_pct or cfg.crop_pct,
        crop_mode=args.crop_mode or cfg.crop_mode,
        **_collect_augmentation(args),
    )
    if config.input_size[0] not in (1, 3):
        raise InputError(f'in_chans={config.input_size[0]} cannot be used; images are decoded to 1 channel or 3.')
    if not len(config.mean) == len(config.std) == config.input_size[0]:
        raise InputError(f'--mean and --std need {config.input_size[0]} values each, one per input channel.')
    if config.color_jitter and len(config.color_jitter) not in (3, 4):
        raise InputError(f'--color-jitter takes one factor, three or four, not {len(config.color_jitter)}.')
    for name, span in (('--scale', config.scale), ('--ratio', config.ratio)):
        if span and span[0] > span[1]:
            raise InputError(f'{name} takes the smallest value and the largest, not {span[0]:g} {span[1]:g}.')
    return config


def _collect_augmentation(args: Namespace) -> Dict[str, Any]:
    if not args.aug:
        return dict(augmented=False, padding=0, hflip=0.)
    jitter = args.color_jitter or []
    return dict(
        padding=args.padding,
        padding_mode=args.padding_mode,
        hflip=args.hflip,
        vflip=args.vflip,
        scale=args.scale and tuple(args.scale),
        ratio=args.ratio and tuple(args.ratio),
        train_crop_mode=args.train_crop_mode,
        train_interpolation=args.train_interpolation,
        policy=args.aa,
        color_jitter=tuple(3 * jitter if len(jitter) == 1 else jitter) if any(jitter) else None,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
    )


def create_loader(
        part: Any,
        config: DataConfig,
        args: Namespace,
        accelerator: Accelerator,
        training: bool = False,
) -> Loader:
    """Batches of one part of the data, this process's share of them."""
    kwargs: Dict[str, Any] = dict(
        batch_size=args.batch_size if training else args.val_batch_size, device=accelerator.device, training=training,
        seed=args.seed, world_size=accelerator.num_processes, num_workers=args.workers,
        channels_last=args.channels_last)
    if isinstance(part, InMemorySet):
        return InMemoryLoader(part, config, rank=accelerator.process_index, **kwargs)
    return StreamingLoader(part, config, **kwargs)


def create_mixup(args: Namespace, side: int, num_classes: int) -> Optional[Mixup]:
    """timm's mixup and cutmix, None where neither is asked for.

    Args:
        args: Settings of the run.
        side: The shorter side of the images.
        num_classes: Number of classes.

    Raises:
        InputError: For settings it cannot have, or batches of which one image has no other to be mixed with.
    """
    if args.cutmix_minmax and not args.cutmix:  # timm would switch cutmix on
        raise InputError('--cutmix-minmax only applies with --cutmix; add it.')
    if not (args.mixup > 0 or args.cutmix > 0):
        return None
    low, high = args.cutmix_minmax or (0., 1.)
    if args.batch_size % 2:
        raise InputError('--mixup and --cutmix mix the images of a batch in pairs; use an even --batch-size.')
    if not 0 <= int(low * side) < int(high * side) <= side:
        raise InputError(f'--cutmix-minmax takes two rising fractions of the image, not {low:g} {high:g}.')
    with refusing('These settings of mixup'):
        return Mixup(
            args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
            label_smoothing=args.smoothing, num_classes=num_classes)
