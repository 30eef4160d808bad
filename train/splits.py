"""Which images train the network, which choose among its weights, and which measure it at the end.

The set's own splits, with a part of the training images held out for the choice; or, as in the paper (section 4), all
images pooled and split 65/15/20.
"""
import hashlib
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Subset

from timm_tmblock.errors import InputError
from train.augment import DataConfig
from train.config import count_held_out, to_flag
from train.data import (
    ImageSet,
    InMemorySet,
    adopt_classes,
    decode,
    fits_in_memory,
    get_class_names,
    is_whole_folder,
    open_named,
    share_images,
)
from train.failure import advise_on_images, naming_failures
from train.processes import agreeing


@dataclass
class Parts:
    """The three parts of a set, in memory or as opened by timm."""
    train: Optional[Union[InMemorySet, Any]]  # None where the others are measured alone
    validation: Optional[Union[InMemorySet, Any]]  # chooses among weights; None: the last are kept
    test: Optional[Union[InMemorySet, Any]]  # measured once, at the end


def hash_pixels(pixels: np.ndarray, seed: int) -> bytes:
    """Digest of the pixels (C, H, W) of an image; another seed gives another one."""
    key = seed.to_bytes(8, 'little', signed=True)
    return hashlib.blake2b(pixels.tobytes(), digest_size=16, key=key).digest()


def stratify(dataset: InMemorySet, fractions: Sequence[float]) -> List[torch.Tensor]:
    """Divide a set so that every class is divided in the same proportions.

    Images are ordered by their digests: the parts depend on nothing else, neither on the order in which a copy of the
    set stores its images nor on a random number generator, and copies of an image lie side by side.

    Args:
        dataset: Set to divide, with `hash_pixels` of each image as it is stored for digests, so that networks of all
            input sizes, and of grey images too, have the same parts.
        fractions: Size of each part relative to their sum.

    Returns:
        Indices of the images of each part.
    """
    order = sorted(range(len(dataset)), key=dataset.digests.__getitem__)
    ends = [total / sum(fractions) for total in accumulate(fractions)]
    parts: List[List[int]] = [[] for _ in fractions]
    sizes = torch.bincount(dataset.targets, minlength=len(dataset.class_names)).tolist()
    seen = [0] * len(sizes)
    for i in order:
        label = int(dataset.targets[i])
        part = next(p for p, end in enumerate(ends) if seen[label] < round(end * sizes[label]))
        parts[part].append(i)
        seen[label] += 1
    return [torch.tensor(part, dtype=torch.int64) for part in parts]


def _name_splits(args: Namespace) -> Dict[str, str]:
    """The names of the splits for 'train', 'validation' and 'test', of those the settings ask for.

    Raises:
        InputError: If there is none to train on, one serves two purposes, or the settings contradict each other.
    """
    if args.pool and args.pool[0] == 0:
        raise InputError('The first size of --pool, the training part, is 0; give it one above 0, as in 65 15 20.')
    names = {'train': args.train_split, 'validation': args.val_split, 'test': args.test_split}
    names = {part: name for part, name in names.items() if name}
    if 'train' not in names:
        raise InputError('There are no images to train on; name a --train-split.')
    for part in ('train', 'validation'):
        if 'test' in names and names.get(part) == names['test']:
            raise InputError(
                f'Split {names["test"]!r} is named for {part} and for test; what measures the network must not take '
                f'part in its training or choice.')
    begun = args.pretrained or args.initial_checkpoint
    named = args.val_split or args.test_split or args.pool or args.val_fraction
    if args.eval_only and begun and not (args.resume or named):
        raise InputError(
            'The weights may have seen all training images, so none are measured; name a split with --test-split, or '
            'the --val-fraction that was held out.')
    none = args.val_split == '' and args.val_fraction and not args.resume
    if none or args.val_fraction is not None and (args.val_split or args.pool):
        raise InputError(
            f'{"--pool" if args.pool else "--val-split"} says which images validate; leave out --val-fraction.')
    return names


def open_splits(args: Namespace, accelerator: Accelerator) -> Dict[str, Any]:
    """Open the splits the settings name, as 'train', 'validation' and 'test'; their classes agree.

    Raises:
        InputError: If a split is missing, serves two purposes, or differs from the others in its classes.
    """
    names = _name_splits(args)
    splits = {}
    for part, name in names.items():
        failure = None
        with accelerator.local_main_process_first():  # one process of each machine fills its cache
            try:
                splits[part] = open_named(args, name)
            except Exception as e:  # to be raised where the others do not wait for this process
                failure = e
        with agreeing(accelerator):
            if failure:
                raise failure
    with agreeing(accelerator):
        _check_apart(args, names, splits)
        classes = _check_classes(args, names, splits)
    if accelerator.num_processes > 1:
        found = gather_object([(classes, {part: len(split) for part, split in splits.items()})])
        if any(other != found[0] for other in found):
            raise InputError(
                f'Dataset {args.dataset!r} has other images or classes on some machines; give all of them the same.')
    return splits


def _check_apart(args: Namespace, names: Dict[str, str], splits: Dict[str, Any]) -> None:
    """Refuse splits that have images in common."""
    for other, part in combinations(splits, 2):
        if share_images(splits[other], splits[part]):
            folder = Path(args.data_dir or args.dataset)
            whole = all(is_whole_folder(splits[p], folder) for p in (other, part))
            if whole and names[other] != names[part]:
                raise InputError(
                    f'{folder} has no folders for {names[other]!r} and {names[part]!r}, so each would be all of '
                    f'its images; make them, or leave out --{"val" if part == "validation" else part}-split.')
            raise InputError(
                f'Splits {names[other]!r} and {names[part]!r} of dataset {args.dataset!r} have images in common; name '
                f'others for {other} and {part}.')


def _check_classes(args: Namespace, names: Dict[str, str], splits: Dict[str, Any]) -> List[str]:
    """Give all splits the classes of the training split and return them, or refuse those that differ."""
    classes = {'train': get_class_names(splits['train'])}
    classes.update({part: adopt_classes(split, classes['train']) for part, split in splits.items() if part != 'train'})
    for part in classes:
        unknown = sorted(set(classes[part]) - set(classes['train']))
        if unknown:
            raise InputError(
                f'Split {names[part]!r} has a class {unknown[0]!r} that {names["train"]!r} lacks; add images of it '
                f'there, or remove those. Slices of a set that is sorted by class differ so: divide it by --pool.')
        if classes[part] != classes['train']:
            one = next(iter(sorted(set(classes['train']) ^ set(classes[part]))), None)
            which = ' in their order' if one is None else f' ({one!r} is in only one of them)'
            raise InputError(
                f'The classes of splits {names["train"]!r} and {names[part]!r} differ{which}; they must be the same.')
    if len(classes['train']) < 2:
        raise InputError(
            f'Dataset {args.dataset!r} has only one class, {classes["train"][0]!r}; put the images of each class into '
            f'a folder of its name.')
    return classes['train']


def load_parts(splits: Dict[str, Any], args: Namespace, config: DataConfig, accelerator: Accelerator) -> Parts:
    """Decode what fits in memory, and divide it as the settings say.

    Raises:
        InputError: If an image cannot be read, or a set is to be divided that does not fit in memory.
    """
    pooled = [len(split) for split in splits.values()]
    fits = {
        part: fits_in_memory(sum(pooled) if args.pool else len(split), config, args.memory_limit)
        for part, split in splits.items()
    }
    # of weights that may have seen all of them, nothing is measured unless it is asked for
    begun = args.eval_only and (args.pretrained or args.initial_checkpoint) and not args.resume
    fraction = 0. if begun and args.val_fraction is None else count_held_out(vars(args))
    if args.pool and not fits['train']:
        raise InputError(
            f'The pooled images take more than --memory-limit {args.memory_limit:g} GB, so they cannot be divided; '
            f'raise it.')
    for name in ('scale', 'ratio', 'train_crop_mode', 'train_interpolation'):
        if fits['train'] and getattr(config, name):
            raise InputError(
                f'{to_flag(name)} only applies to images that are randomly resized and cropped, as those of sets above '
                f'--memory-limit are; leave it out, or set --memory-limit 0.')
    progress = accelerator.is_main_process
    divided = list(splits) if args.pool else ['train'] if fraction else []
    if args.eval_only and 'train' not in divided:
        splits = {part: split for part, split in splits.items() if part != 'train'}
    for part, split in splits.items():
        if not fits[part]:
            ImageSet(split, 3)[0]  # a split without labels is told before the training, not after it
    digest = partial(hash_pixels, seed=args.split_seed)

    def load(part: str) -> InMemorySet:
        return decode(
            splits[part], config, progress, digest if part in divided else None, num_workers=args.workers)

    if fraction and not fits['train']:
        test = load('test') if fits.get('test') else splits.get('test')
        return Parts(*_divide_stream(splits['train'], config, fraction, digest, args, accelerator), test)
    loaded = {part: load(part) if fits[part] else split for part, split in splits.items()}
    if args.pool:
        images, targets = (torch.cat([getattr(part, k) for part in loaded.values()]) for k in ('images', 'targets'))
        digests = [digest for part in loaded.values() for digest in part.digests]
        whole = InMemorySet(images, targets, loaded['train'].class_names, digests)
        train, validation, test = map(whole.subset, stratify(whole, args.pool))
        return Parts(train, validation if len(validation) else None, test if len(test) else None)
    if fraction:
        train, validation = map(loaded['train'].subset, _hold_out(loaded['train'], fraction))
        return Parts(train, validation, loaded.get('test'))
    return Parts(loaded.get('train'), loaded.get('validation'), loaded.get('test'))


def find_missing_classes(train: Any, class_names: List[str]) -> List[str]:
    """Classes of which a set in memory has no image."""
    if not isinstance(train, InMemorySet):
        return []
    counts = torch.bincount(train.targets, minlength=len(class_names)).tolist()
    return [name for name, count in zip(class_names, counts) if not count]


def _hold_out(dataset: InMemorySet, fraction: float) -> List[torch.Tensor]:
    """Indices of the images to train on and of those held out."""
    parts = stratify(dataset, [1 - fraction, fraction])
    if len(parts[1]) == 0:
        raise InputError(
            f'--val-fraction {fraction:g} of so few images holds none out; use a larger one, or 0 for none.')
    return parts


def _divide_stream(
        split: Any,
        config: DataConfig,
        fraction: float,
        digest: Callable[[np.ndarray], bytes],
        args: Namespace,
        accelerator: Accelerator,
) -> Tuple[Subset, Union[InMemorySet, Subset]]:
    """The same parts as of a set in memory, for which the processes read every image once, each its share."""
    progress = accelerator.is_main_process
    # the pixels are not needed, and every image has a square of one
    tiny = replace(config, input_size=(config.input_size[0], 1, 1), crop_pct=1., crop_mode='squash')
    size, world_size = len(ImageSet(split, 3)), accelerator.num_processes
    with agreeing(accelerator), naming_failures(advise_on_images(args)):
        share = decode(
            split, tiny, progress, digest, num_workers=args.workers, desc='Dividing',
            rows=range(accelerator.process_index, size, world_size))
    targets, digests = torch.empty(size, dtype=torch.int64), [b''] * size
    told = [(share.targets, share.digests)]
    for rank, (its_targets, its_digests) in enumerate(gather_object(told) if world_size > 1 else told):
        targets[rank::world_size], digests[rank::world_size] = its_targets, its_digests
    whole = InMemorySet(torch.empty(0), targets, share.class_names, digests)
    rows, held_out = (part.tolist() for part in _hold_out(whole, fraction))
    validation: Union[InMemorySet, Subset] = Subset(split, held_out)
    if fits_in_memory(len(held_out), config, args.memory_limit):
        validation = decode(split, config, progress, num_workers=args.workers, rows=held_out)
    return Subset(split, rows), validation
