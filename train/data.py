"""Image sets: opened by timm, and decoded once to a uint8 tensor where they fit in memory."""
import errno
import math
import os
import re
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.transforms_factory import create_transform
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from timm_tmblock.errors import InputError, first_line
from timm_tmblock.image import IMAGE_SUFFIXES, read_image
from train.augment import DataConfig, mix_seed, seeded
from train.signals import init_worker

# what timm's create_dataset does with the names of splits
HALVED = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist')
SPLIT_NAMES = ('train', 'training', 'test', 'val', 'valid', 'validation', 'eval', 'evaluation')
KINDS = ('torch', 'hfds', 'hfids', 'tfds', 'wds')  # what goes before a / in the name of a set
CHUNK = 256  # images that a process decodes at a time, at most
CHUNK_BYTES = 2 ** 22  # of these; processes hand them on in shared memory, of which a container has 64 MB
WORTH_A_PROCESS = 5e6  # pixels of images; fewer are decoded before another process has begun
MOST_CLASSES = 100_000  # a column of larger integers is none of labels
STRINGS = ('string', 'large_string')
INTEGERS = tuple(f'{sign}int{bits}' for sign in ('', 'u') for bits in (8, 16, 32, 64))
SAMPLE = Path(__file__).parent / 'sample'  # 2,000 images of CIFAR-10, see its README.md


@dataclass
class InMemorySet:
    """Decoded images."""
    images: torch.Tensor  # (N, C, H, W) uint8
    targets: torch.Tensor  # (N,) int64
    class_names: List[str]
    digests: Sequence[bytes] = ()  # of the images as they are stored, where they were asked for

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, index: torch.Tensor) -> 'InMemorySet':
        return InMemorySet(self.images[index], self.targets[index], self.class_names)


class UnreadableError(InputError):
    """An image of a set cannot be read."""


class ImageSet(Dataset):
    """The images of a timm or torchvision dataset, or those of some rows, none left out.

    timm's own datasets put another image in the place of one that cannot be read.
    """

    def __init__(
            self, dataset: Any, channels: int, labelled: bool = True, rows: Optional[Sequence[int]] = None) -> None:
        self.source = getattr(dataset, 'reader', dataset)
        self.rows = range(len(self.source)) if rows is None else rows  # errors name images by these
        self.mode = 'L' if channels == 1 else 'RGB'
        self.labelled = labelled
        self.transform: Any = None  # set by timm's create_loader
        self.seed: Optional[int] = None  # what the transform draws is a function of this and the row

    def __len__(self) -> int:
        return len(self.rows)

    def name_others(self, rows: Sequence[int]) -> str:
        """What to name in place of a split of an hfds/ set to leave out some rows; '' of a part, and of other sets."""
        split = str(getattr(self.source, 'split', '') if hasattr(self.source, 'dataset') else '')
        if not re.fullmatch(r'\w+', split) or not isinstance(self.rows, range) or len(self.rows) < len(self.source):
            return ''  # of a part there may be more in the rest
        ends = zip([0, *(row + 1 for row in rows)], [*rows, ''])
        return '+'.join(f'{split}[{first or ""}:{end}]' for first, end in ends if first != end)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        row = self.rows[index]
        try:
            image, target = self.source[row]
            image = read_image(image, self.mode)
        except (InputError, OSError, KeyError, TypeError, AssertionError) as e:
            reason = 'it is empty' if isinstance(e, (TypeError, AssertionError)) else str(e)
            raise UnreadableError(f'Image {row} of the dataset cannot be read, remove or replace it: {reason}') from e
        if isinstance(target, str):
            target = self.source.class_to_idx[target]
        target = -1 if target is None else target
        if self.labelled and target < 0:  # as in the test splits of competitions
            raise InputError(f'Image {row} of the dataset has no label ({target}); name a split that has.')
        if self.transform is not None:
            with nullcontext() if self.seed is None else seeded(mix_seed(self.seed, row)):
                image = self.transform(image)
        return image, int(target)


def lower_kind(name: str) -> str:
    """The name of a set with what says its kind in lower case, as timm takes it in any."""
    kind, slash, rest = name.partition('/')
    return f'{kind.lower()}/{rest}' if slash and kind.lower() in KINDS else name


def open_dataset(
        name: str,
        split: str,
        root: Optional[str] = None,
        input_key: str = 'image',
        target_key: str = 'label',
        download: bool = False,
) -> Any:
    """Open an image set by timm's names: `torch/<name>`, `hfds/<hub id or folder>`, a folder of class folders, ...

    Raises:
        InputError: If there is no such set, split or column.
    """
    if name == 'sample':
        if root:
            raise InputError('The sample comes with the project; --dataset names a folder of images, not --data-dir.')
        name, input_key, target_key = f'hfds/{SAMPLE}', 'img', 'label'
    name = lower_kind(name)
    kind, _, rest = name.partition('/')
    kind = kind if rest and kind in KINDS else ''  # of a folder
    if kind in ('hfids', 'tfds', 'wds'):
        raise InputError(f'Dataset {name!r} is a stream, which has no order; open it as hfds/... or torch/....')
    kwargs = dict(root=root, split=split, download=download)
    if kind == 'hfds':
        kwargs.update(input_key=input_key, target_key=target_key)
    else:
        if root and Path(name).is_dir():
            raise InputError(f'The dataset {name!r} is a folder; leave out --data-dir.')
        if '[' in split:
            raise InputError(f'Only hfds/ sets can be sliced, as in {split!r}; name a whole split.')
        if kind != 'torch':
            kwargs['root'] = root or name
            if Path(root or name).is_dir():  # timm reads png and jpg unless told otherwise, and leaves out the rest
                kwargs['input_key'] = ';'.join(IMAGE_SUFFIXES)
                kwargs['search_split'] = not _is_class(Path(root or name) / split)
        elif rest.lower() in HALVED and split not in SPLIT_NAMES:
            raise InputError(f'Dataset {name!r} has the splits train and test, not {split!r}.')
        elif not root:
            raise InputError(f'torchvision reads {name} from a folder; name that folder with --data-dir.')
    try:
        dataset = create_dataset(name, **kwargs)
        size = len(dataset)
    except Exception as e:  # every kind of set has errors of its own
        raise InputError(f'Cannot open split {split!r} of dataset {name!r}: {_say_why_not_opened(e)}') from e
    if kind != 'hfds':
        _check_folder(dataset, name, split, Path(root or name))
        source = getattr(dataset, 'reader', dataset)
        if type(source) is ReaderImageFolder:
            _number_classes(source)
        elif isinstance(source, ImageFolder):
            source.loader = str  # a path; torchvision's own drops what is transparent before anybody sees it
        size = len(dataset)
    if size == 0:
        raise InputError(f'Split {split!r} of dataset {name!r} has no images; check the path and the split.')
    if kind == 'hfds':
        _number_labels(dataset.reader, name, input_key, target_key)
    return dataset


def _say_why_not_opened(e: Exception) -> str:
    reason = first_line(e)
    if reason == 'AssertionError':  # what timm says of it
        return 'there is no such folder; sets of the Hub are named hfds/USER/NAME'
    if reason.startswith('Found 0 images in subfolders of'):  # it names fewer kinds than were looked for
        return f'there are no images in it ({", ".join(IMAGE_SUFFIXES)})'
    if reason == 'Config name is missing.':
        return (
            f'it has several configurations, of which timm opens none ({shorten(str(e), 200)}); download the files of '
            f'one into a FOLDER and name hfds/FOLDER')
    if isinstance(e, OSError) and e.errno in (errno.EROFS, errno.EACCES):
        return f'{reason}; sets of the Hub and the sample are cached in HF_HOME; set that to a folder you can write to'
    return reason


def _number_labels(reader: Any, name: str, input_key: str, target_key: str) -> None:
    """Number the classes of an hfds/ set whose labels are integers, or names.

    Raises:
        InputError: If it has no such columns.
    """
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    table = reader.dataset.data
    # timm casts the image column, which adds an empty one where there was none
    columns = [c for c in table.column_names if table.column(c).null_count < len(table)]
    for key, option in ((input_key, '--input-key'), (target_key, '--target-key')):
        if key not in columns:
            raise InputError(
                f'Dataset {name!r} has no column {key!r}, it has {", ".join(columns)}; name one with {option}.')
    if not reader.class_to_idx and str(table.schema.field(target_key).type) in INTEGERS:
        largest = pc.max(table.column(target_key)).as_py()
        if largest < MOST_CLASSES:
            reader.class_to_idx = {str(i): i for i in range(largest + 1)}
    elif _has_names_for_labels(reader):
        names = pc.unique(table.column(target_key).drop_null()).to_pylist()
        if len(names) < MOST_CLASSES:
            reader.class_to_idx = _number(names)


def _has_names_for_labels(source: Any) -> bool:
    """Whether a reader is of an hfds/ set whose label column holds the names of classes."""
    features = getattr(getattr(source, 'dataset', None), 'features', None) or {}
    return getattr(features.get(getattr(source, 'label_key', None)), 'dtype', None) in STRINGS


def _is_class(folder: Path) -> bool:
    """Whether a folder named as a split is one of images, as of a class of trains."""
    return folder.is_dir() and not any(path.is_dir() and path.name[0] != '.' for path in folder.iterdir())


def _number(names: Iterable[str]) -> Dict[str, int]:
    """Classes in the order of their names."""
    return {name: i for i, name in enumerate(sorted(names, key=lambda name: (natural_key(name), name)))}


def _number_classes(source: Any, names: Optional[Sequence[str]] = None) -> None:
    """Number the classes of a folder: in the order of their names, or that of others which include them.

    timm takes hidden folders for classes too, and macOS's hidden files for images, and leaves the order of 'a' and 'A',
    or '1' and '01', to chance.

    Raises:
        InputError: If an image lies beside the class folders.

    Args:
        source: timm's reader of a folder, or torchvision's ImageFolder.
        names: Of another split.
    """
    def is_hidden(path: str) -> bool:
        return any(part.startswith('.') for part in Path(os.path.relpath(path, source.root)).parts)

    old = {index: name for name, index in source.class_to_idx.items()}
    samples = sorted(
        ((path, old[index]) for path, index in source.samples if not is_hidden(path)),
        key=lambda sample: (natural_key(sample[0]), sample[0]))
    loose = next((path for path, name in samples if not name), None)
    if loose is not None:
        raise InputError(f'{loose} is not in a class folder; move it into one, or remove it.')
    if names is None:
        source.class_to_idx = _number({name for _, name in samples})
    else:
        source.class_to_idx = {name: index for index, name in enumerate(names)}
    source.samples = [(path, source.class_to_idx[name]) for path, name in samples]


def is_whole_folder(dataset: Any, root: Path) -> bool:
    """Whether a split is all images under the root, which timm takes where it finds no folder of the split."""
    source = getattr(dataset, 'reader', dataset)
    kinds = ReaderImageFolder, ImageFolder  # not those derived from it: ImageNet has splits under its root
    return type(source) in kinds and Path(source.root) == root


def _check_folder(dataset: Any, name: str, split: str, root: Path) -> None:
    source = getattr(dataset, 'reader', dataset)
    if is_whole_folder(dataset, root):
        folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != '.')
        if len(folders) > 1 and all(path.name.lower() in SPLIT_NAMES and _is_class(path) for path in folders):
            raise InputError(
                f'{root} has images in {" and ".join(path.name for path in folders)} without class folders; put those '
                f'of each class into a folder of its name, such as {folders[0].name}/CLASS.')
        classes = Counter(
            path.name for folder in folders for path in folder.iterdir() if path.is_dir() and path.name[0] != '.')
        # parts with the same classes, whatever they are called; torchvision takes the outer folders for classes
        repeated = isinstance(source, ReaderImageFolder) and any(count > 1 for count in classes.values())
        splits = [
            path.name for path in folders
            if not _is_class(path) and (repeated or path.name.lower() in SPLIT_NAMES)]
        if splits:
            raise InputError(
                f'Dataset {name!r} has no split {split!r}, it has {", ".join(splits)}; name one of these with the flag '
                f'for it (--train-split, --val-split or --test-split in training, --split of evaluate.py, '
                f'--check-split of exports).')


def share_images(a: Any, b: Any) -> bool:
    """Whether two opened splits of one set are the same images by two names, or have some in common."""
    if _identify(a) == _identify(b):
        return True
    return any(
        name == other and max(first, other_first) < min(end, other_end)
        for name, first, end in _find_rows(a) for other, other_first, other_end in _find_rows(b))


def _identify(dataset: Any) -> Tuple[str, ...]:
    source = getattr(dataset, 'reader', dataset)
    return tuple(str(getattr(source, name, None)) for name in ('root', 'train', 'split', 'version'))


def _find_rows(dataset: Any) -> List[Tuple[str, int, int]]:
    """Split, first and end row of each part of an hfds/ set, as 'train[:10%]+test' has two."""
    table = getattr(getattr(dataset, 'reader', None), 'dataset', None)
    info = getattr(table, 'info', None)
    if info is None or not info.splits:
        return []
    from datasets import ReadInstruction
    sizes = {name: split.num_examples for name, split in info.splits.items()}
    parts = ReadInstruction.from_spec(str(table.split)).to_absolute(sizes)  # type: ignore[union-attr]
    return [(part.splitname, part.from_, part.to) for part in parts]


def add_set_options(parser: Any) -> None:
    """Flags that name a labelled set."""
    parser.add_argument('--dataset', default='sample', type=lower_kind, help=(
        "'sample' (2,000 CIFAR-10 images included in this repository), torch/<name>, hfds/<Hub id or local folder>, or "
        'an image folder with a folder per split, each with one subfolder per class'))
    parser.add_argument('--data-dir', help='root folder of a torch/ dataset, cache folder of an hfds/ dataset')
    parser.add_argument(
        '--dataset-download', action=BooleanOptionalAction, default=False, help='let torchvision download the dataset')
    parser.add_argument('--input-key', default='image', help='image column of an hfds/ dataset')
    parser.add_argument('--target-key', default='label', help='label column of an hfds/ dataset')


def to_set_flags(args: Namespace) -> List[str]:
    """The flags of `add_set_options` that give these values."""
    return [
        '--dataset', args.dataset, '--input-key', args.input_key, '--target-key', args.target_key,
        *(['--data-dir', args.data_dir] if args.data_dir else []),
        *(['--dataset-download'] if args.dataset_download else [])]


def add_data_options(parser: ArgumentParser) -> None:
    """Flags that name a labelled split, for what measures a network on one."""
    add_set_options(parser)
    parser.add_argument('--split', default='test', help='split to use (default: test)')


def open_named(args: Namespace, split: str) -> Any:
    """A split of the set that the flags name.

    Raises:
        InputError: If there is no such set, split or column.
    """
    return open_dataset(
        args.dataset, split, args.data_dir, args.input_key, args.target_key, args.dataset_download)


def tell_whole_folder(args: Namespace, dataset: Any) -> None:
    """Say so where a folder without one for the split is taken whole."""
    root = Path(args.data_dir or args.dataset)
    if is_whole_folder(dataset, root):
        print(
            f'{root} has no folder {args.split}; images are taken from all of it, also any that were trained on.',
            file=sys.stderr)


def get_class_names(dataset: Any) -> List[str]:
    """Class names in the order of their indices."""
    reader = getattr(dataset, 'reader', dataset)
    class_to_idx = getattr(reader, 'class_to_idx', None)
    if not class_to_idx:
        raise InputError(
            'The dataset does not say its classes; in an hfds/ set make the label column names, integers or a '
            'datasets.ClassLabel; from any other source, such as a .tar file, put the images into a folder per class.')
    names: Dict[int, str] = {}
    for name, index in class_to_idx.items():
        names.setdefault(index, str(name))  # of ImageNet's several the first
    return [names[index] for index in sorted(names)]


def adopt_classes(dataset: Any, names: Sequence[str]) -> List[str]:
    """Number the classes of a set as `names`, where these include them: a small split may lack some.

    Returns:
        The names of the set's classes, in order.
    """
    found = get_class_names(dataset)
    source: Any = getattr(dataset, 'reader', dataset)
    numbered = {name: index for index, name in enumerate(names)}
    if _has_names_for_labels(source) and set(found) <= set(names):
        source.class_to_idx = numbered
    elif set(found) < set(names):
        if type(source) in (ReaderImageFolder, ImageFolder):
            _number_classes(source, names)
        elif found == list(names[:len(found)]):  # of labels that are integers
            source.class_to_idx = numbered
    return get_class_names(dataset)


def check_classes(name: str, known: Sequence[str], dataset: str, found: Sequence[str]) -> None:
    """
    Raises:
        InputError: If the numbers of classes differ, or a class name they share has a different index in each.
    """
    if len(known) != len(found):
        raise InputError(
            f'{name} has {len(known)} classes and {dataset} has {len(found)}; name the set it is for with --dataset.')
    for i, (ours, theirs) in enumerate(zip(known, found)):
        if ours != theirs and (ours in found or theirs in known):
            raise InputError(
                f'{name} and {dataset} have classes in another order (class {i} is {ours!r} in the one and {theirs!r} '
                f'in the other); renumber the labels of the set in the order of the network.')


def tell_other_names(name: str, known: Sequence[str], dataset: str, found: Sequence[str]) -> None:
    """Say so where `check_classes` lets other names pass, which may be of another language or of another set."""
    for i, (ours, theirs) in enumerate(zip(known, found)):
        if ours != theirs:
            print(
                f'{name} and {dataset} have other names for their classes (class {i} is {ours!r} in the one and '
                f'{theirs!r} in the other); they are compared by number.', file=sys.stderr)
            return


def fits_in_memory(size: int, config: DataConfig, limit_gb: float) -> bool:
    """Whether this many decoded images take at most `limit_gb` GB."""
    return size * math.prod(config.input_size) <= limit_gb * 1e9


class _Chunks(Dataset):
    """Images as they are kept, `size` at a time: pixels (N, C, H, W) uint8, targets (N,), digests, and errors."""

    def __init__(
            self,
            source: ImageSet,
            config: DataConfig,
            digest: Optional[Callable[[np.ndarray], bytes]],
            workers: int,
    ) -> None:
        self.source = source
        # of few large images, each process is to have some
        self.size = max(1, min(
            CHUNK, CHUNK_BYTES // math.prod(config.input_size), len(source) // (8 * max(workers, 1))))
        self.config = config
        self.digest = digest
        self.resize = create_transform(
            config.input_size, interpolation=config.interpolation, crop_pct=config.crop_pct,
            crop_mode=config.crop_mode, mean=config.mean, std=config.std, normalize=False)

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.size)

    def __getitem__(self, number: int) -> Tuple[torch.Tensor, torch.Tensor, List[bytes], List[Tuple[int, str]]]:
        rows = range(number * self.size, min((number + 1) * self.size, len(self.source)))
        images = torch.empty(len(rows), *self.config.input_size, dtype=torch.uint8)
        targets = torch.empty(len(rows), dtype=torch.int64)
        digests, failures = [], []
        _, height, width = self.config.input_size
        for i, row in enumerate(rows):
            try:
                image, targets[i] = self.source[row]
            except UnreadableError as e:
                failures.append((self.source.rows[row], str(e)))
                continue
            if self.digest is not None:
                digests.append(self.digest(_to_pixels(image)))
            if self.config.input_size[0] == 1:
                image = image.convert('L')
            fits = image.size == (width, height) and self.config.crop_pct == 1.
            images[i] = torch.from_numpy(_to_pixels(image)) if fits else self.resize(image)
        return images, targets, digests, failures


def decode(
        dataset: Any,
        config: DataConfig,
        progress: bool = True,
        digest: Optional[Callable[[np.ndarray], bytes]] = None,
        labelled: bool = True,
        num_workers: int = 0,
        rows: Optional[Sequence[int]] = None,
        desc: str = 'Decoding',
) -> InMemorySet:
    """Decode every image once, resized as for evaluation where its size differs from the network's input.

    Args:
        dataset: Split as opened by timm.
        config: What the network takes.
        progress: Show a bar.
        digest: What is kept of the pixels (3, H, W) of each image beside them, in the size it is stored in and, for
            grey networks too, in colour.
        labelled: Refuse images without a label.
        num_workers: Most processes to share the work with, of a set that is large enough.
        rows: Images to decode, all if None.
        desc: What the bar says.

    Raises:
        InputError: If images cannot be read, once all have been tried, or have no label; if a process read it, the
            sentence is the last line.
    """
    class_names = get_class_names(dataset)
    source = ImageSet(dataset, 3, labelled, rows)
    workers = 0
    if num_workers and len(source):
        pixels = len(source) * math.prod(source[0][0].size)
        workers = min(num_workers, os.cpu_count() or 1, int(pixels / WORTH_A_PROCESS))
    images = torch.empty(len(source), *config.input_size, dtype=torch.uint8)
    targets = torch.empty(len(source), dtype=torch.int64)
    digests: List[bytes] = []
    failures: List[Tuple[int, str]] = []
    chunks = _Chunks(source, config, digest, workers)
    loader = DataLoader(
        chunks, batch_size=None, num_workers=workers, collate_fn=share_batch, worker_init_fn=init_worker,
        generator=torch.Generator())  # of its own, or the global one would advance
    with tqdm(desc=desc, total=len(source), unit='img', disable=not progress, leave=False) as bar:
        for number, (pixels, labels, names, failed) in enumerate(read_batches(loader)):
            part = slice(number * chunks.size, (number + 1) * chunks.size)
            images[part], targets[part] = pixels, labels
            digests += names
            failures += failed
            bar.update(len(labels))
    if failures:
        rest = len(failures) - 10
        others = source.name_others([row for row, _ in failures])
        raise InputError(
            '; '.join(text for _, text in failures[:10]) + (f'; and {rest} more' if rest > 0 else '') +
            (f'; or name the split {others}' if others and rest <= 0 else ''))
    return InMemorySet(images, targets, class_names, digests)


def share_batch(batch: Any) -> Any:
    """Move the tensors of a batch into shared memory, in the process that made it, which can tell where there is none.

    The queue to the trainer would do so too, in a thread that loses the batch then, and the trainer would wait for it.
    """
    if get_worker_info() is not None:
        for x in batch:
            if isinstance(x, torch.Tensor):
                x.share_memory_()
    return batch


def read_batches(loader: DataLoader) -> Iterator[Any]:
    """The batches of a DataLoader, whose workers end with them, also where one fails or the reader leaves.

    PyTorch's iterators leave that to the garbage collector, which waits 10 seconds for each worker.
    """
    batches: Any = iter(loader)
    try:
        yield from batches
    finally:
        if loader.num_workers:
            batches._shutdown_workers()


def _to_pixels(image: Image.Image) -> np.ndarray:
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
