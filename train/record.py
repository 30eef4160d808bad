"""The experiment folder: its name, the weights that deserve to be kept, and the table of epochs."""
import csv
import os
import time
import uuid
from argparse import Namespace
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import torch
from accelerate.utils import broadcast_object_list, gather_object

from timm_tmblock.checkpoint import save_weights
from timm_tmblock.errors import InputError
from timm_tmblock.files import check_writable, remove, writing
from train.checkpoint import TrainState, find_checkpoints
from train.config import SETTINGS


def create_folder_name(args: Namespace) -> Path:
    """The experiment folder, the same on every process; its name, where none was given, is written into the settings.

    Raises:
        InputError: If there is no run to resume, or there is one that was not to be resumed.
    """
    if len(set(gather_object([bool(args.resume)]))) > 1:  # of --resume auto
        raise InputError('Some machines have a run to resume and others none; name an --output that they share.')
    if args.resume:
        if not Path(args.resume).is_dir():
            raise InputError(f'There is no experiment folder {args.resume} to resume.')
        begun = (Path(args.resume) / SETTINGS).is_file() and not (Path(args.resume) / 'result.json').is_file()
        if begun and not args.eval_only and not any((Path(args.resume) / 'checkpoints').glob('*')):
            raise InputError(
                f'{args.resume} holds no checkpoint to resume from: that run ended before its first; begin it again '
                f'with the same command, adding --checkpoint-interval if an epoch is too long to lose.')
        return Path(args.resume)
    # several runs may begin in one second
    names = [args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{args.model}-{uuid.uuid4().hex[:4]}']
    args.experiment = broadcast_object_list(names)[0]
    folder = Path(args.output) / args.experiment
    if find_checkpoints(folder) or (folder / 'result.json').is_file():
        raise InputError(
            f'{folder} already holds a run; continue it with --resume {folder}, or choose another --experiment.')
    return folder


_held: List[int] = []


def _let_go() -> None:
    """Let go in a forked data-loading process, which would hold the folder for a moment after a killed run."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Keep other runs out of an experiment folder, where the system can; a run that is killed leaves it.

    Raises:
        InputError: If a run is in it, or nothing can be written there.
    """
    check_writable(folder / SETTINGS)  # or a tracker would be blamed
    if fcntl is None or not folder.is_dir():
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(handle)
        raise InputError(f'A run is in progress in {folder}; wait for it, or choose another --experiment.') from e
    except OSError:  # a file system without locks
        pass
    _held.append(handle)
    try:
        yield
    finally:
        _held.remove(handle)
        os.close(handle)


def check_shared(settings: Path, seconds: int = 60) -> None:
    """
    Args:
        settings: What the first process has written into the experiment folder.
        seconds: After which it is not seen; network file systems show new files late.

    Raises:
        InputError: If this machine does not see it.
    """
    for _ in range(seconds):
        if settings.is_file():
            return
        time.sleep(1)
    raise InputError(
        f'{settings.parent} is not the same folder on all machines; name an --output that they share.')


def describe_resumption(folder: Path) -> str:
    """What is left to continue from, for messages."""
    checkpoints = find_checkpoints(folder)
    if not checkpoints:
        return 'there was no checkpoint yet'
    return f'the last good checkpoint is {checkpoints[-1].name}, continue with --resume {folder}'


def keep_best(folder: Path, state: TrainState, rank: Tuple[float, ...], limit: int, weights: Dict[str, torch.Tensor],
              description: Dict[str, Any]) -> None:
    """Keep the weights of this epoch among those of the `limit` best, in history/; a higher `rank` is better."""
    own = {'epoch': state.epoch, 'score': rank[0], 'tie': rank[1]}
    ranked = sorted([*state.kept, own], key=lambda e: (-e['score'], -e.get('tie', 0.), e['epoch']))
    state.kept = ranked[:limit]
    if any(entry['epoch'] == state.epoch for entry in state.kept):
        save_weights(_epoch_path(folder, state.epoch), weights, description)
    for entry in ranked[limit:]:
        remove(_epoch_path(folder, entry['epoch']))


def _epoch_path(folder: Path, epoch: int) -> Path:
    return folder / 'history' / f'epoch-{epoch:04d}.safetensors'


def write_summary(folder: Path, history: List[Dict[str, Any]]) -> None:
    """One row an epoch. Written anew each time: a resumed run may repeat an epoch that is already in the file."""
    path = folder / 'summary.csv'
    columns = list(dict.fromkeys(key for row in history for key in row))  # epochs without validation have fewer
    with writing(path) as tmp:
        with tmp.open('w', encoding='utf-8', newline='') as f:
            writer = csv.DictWriter(f, fieldnames=columns)
            writer.writeheader()
            writer.writerows(history)
        os.replace(tmp, path)
