"""Checkpoints to continue a run from, each written whole or not at all.

An experiment folder holds, beside weights and records,

    checkpoints/update-00001234/    Accelerate's state, the EMA weights, the best so far and state.json; the newest two
"""
import json
import os
import shutil
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors.torch import load_file, save_file
from torch.distributed import DistError

from timm_tmblock.checkpoint import copy_tensors
from timm_tmblock.errors import InputError, say_why_not_loaded
from timm_tmblock.files import remove, writing
from train.processes import agreeing

BEST = 'best.safetensors'
KEEP = 2  # a checkpoint cut short must leave another one


@dataclass
class TrainState:
    """Where a run stands, beyond what Accelerate saves."""
    epoch: int = 0  # epoch in progress
    batch: int = 0  # batches of it already used
    update: int = 0  # optimizer updates in all
    seconds: float = 0.  # time in all, validation included
    epoch_seconds: List[float] = field(default_factory=list)  # of training, by epoch
    best: Optional[Dict[str, Any]] = None  # epoch and metrics of best.safetensors
    kept: List[Dict[str, Any]] = field(default_factory=list)  # epoch and score of history/, the best first
    history: List[Dict[str, Any]] = field(default_factory=list)  # metrics of each epoch
    running: List[Dict[str, float]] = field(default_factory=list)  # sums over the epoch in progress, by process
    running_seconds: float = 0.  # of training in it
    layout: Dict[str, int] = field(default_factory=dict)  # what a batch number means
    run_id: str = ''  # the run's name among trackers
    hardware: List[str] = field(default_factory=list)  # that it was on so far, each named once
    versions: List[Dict[str, str]] = field(default_factory=list)  # likewise
    commits: List[str] = field(default_factory=list)  # likewise
    sharding: str = ''  # by which of FSDP and DeepSpeed a checkpoint is divided
    tracker_offset: int = 0  # of what trackers count, which take no step below an earlier one

    @property
    def tracker_step(self) -> int:
        return self.update + self.tracker_offset

    def rescale(self, update: int, layout: Dict[str, int]) -> None:
        """Go on with updates of another size, of which as many as have been made are `update`."""
        self.tracker_offset = max(0, self.tracker_step - update)
        self.update, self.layout = update, layout


def store_plain_names(accelerator: Accelerator) -> None:
    """Let checkpoints hold the weights' own names, whatever distributes or compiles the model.

    FSDP and DeepSpeed, which show hooks no weights, keep their own format.
    """
    def on_save(models: List[torch.nn.Module], weights: List[Dict[str, torch.Tensor]], folder: str) -> None:
        if weights:
            plain = (accelerator.unwrap_model(model, keep_torch_compile=False) for model in models)
            weights[:] = [copy_tensors(model.state_dict(), 'cpu') for model in plain]

    def on_load(models: List[torch.nn.Module], folder: str) -> None:
        if models:
            model = accelerator.unwrap_model(models.pop(), keep_torch_compile=False)
            model.load_state_dict(load_file(Path(folder) / 'model.safetensors'))

    accelerator.register_save_state_pre_hook(on_save)
    accelerator.register_load_state_pre_hook(on_load)


def save_checkpoint(folder: Path, accelerator: Accelerator, state: TrainState, ema: Optional[torch.nn.Module]) -> None:
    """Write a checkpoint into an experiment folder and drop all but the newest two. All processes call this.

    Raises:
        InputError: If it cannot be written.
    """
    path = folder / 'checkpoints' / f'update-{state.update:08d}'
    # a network file system may show others the old name for a while after the rename
    with writing(path, cleanup=accelerator.is_main_process) as tmp:
        accelerator.save_state(str(tmp))
        if accelerator.is_main_process and ema is not None:
            save_file(copy_tensors(ema.state_dict(), 'cpu'), tmp / 'ema.safetensors')
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            # after a crash the folder may have the best of an epoch that is in no checkpoint
            if state.best is not None and (folder / BEST).is_file():
                _link(folder / BEST, tmp / BEST)
            (tmp / 'state.json').write_text(json.dumps(dict(asdict(state), files=_measure(tmp))))
            for file in tmp.rglob('*'):
                if file.is_file() and file.name != BEST:  # which may be somebody else's, and has the mode already
                    shutil.copymode(tmp / 'state.json', file)  # safetensors' are their owner's alone
                _flush(file)  # the name must not reach the disk before the content
            remove(path)
            os.replace(tmp, path)
            _flush(path.parent)
        accelerator.wait_for_everyone()  # nobody cleans up before the rename
    if accelerator.is_main_process:
        kept = find_checkpoints(folder)[-KEEP:]
        for other in (*path.parent.glob('update-*'), *path.parent.glob('.update-*.tmp')):
            if other not in (path, *kept):  # an older one, or what a killed run has left
                with suppress(OSError):
                    remove(other)


def _link(source: Path, target: Path) -> None:
    """Let `target` be the same file, which stays when another takes the place of `source`; a copy where it cannot."""
    target.unlink(missing_ok=True)  # of a run that was killed
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _measure(path: Path) -> Dict[str, int]:
    return {str(p.relative_to(path)): p.stat().st_size for p in sorted(path.rglob('*')) if p.is_file()}


def _flush(path: Path) -> None:
    if os.name == 'nt':  # Windows flushes no file that is open for reading, nor a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_complete(path: Path) -> bool:
    try:
        files = json.loads((path / 'state.json').read_text(encoding='utf-8'))['files']
        found = _measure(path)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return False
    return all(found.get(name) == size for name, size in files.items())


def find_checkpoints(folder: Path) -> List[Path]:
    """Complete checkpoints of an experiment folder, oldest first."""
    complete = [path for path in folder.glob('checkpoints/update-*') if _is_complete(path)]
    return sorted(complete, key=_place)


def _place(path: Path) -> Tuple[int, int, str]:
    """Where in training a checkpoint is; its number is no measure where the size of an update has changed."""
    state = json.loads((path / 'state.json').read_text(encoding='utf-8'))
    return state['epoch'], state['batch'], path.name


def load_checkpoint(
        folder: Path,
        accelerator: Accelerator,
        ema: Optional[torch.nn.Module],
        layout: Dict[str, int],
) -> Tuple[TrainState, Path]:
    """Restore the newest checkpoint of an experiment folder, and return its state and which it is.

    Args:
        folder: Experiment folder.
        accelerator: What was prepared is restored.
        ema: Its weights are restored, if there are any.
        layout: Processes and batch size of this run, which decide what a batch number means.

    Raises:
        InputError: If there is none, it is of another model, or lies within an epoch divided otherwise.
    """
    checkpoints = find_checkpoints(folder)
    newest = broadcast_object_list([checkpoints[-1].name if checkpoints else ''])[0]  # the first process's
    if not newest:
        raise InputError(f'{folder} holds no checkpoint to resume from; give the folder of an earlier run.')
    path = folder / 'checkpoints' / newest
    with agreeing(accelerator):
        if path not in checkpoints:
            raise InputError(f'{path} is not on all machines; name an experiment folder that they share.')
        with _naming(path):
            state = _read_state(path, name_sharding(accelerator), layout, checkpoints[:-1])
    with _naming(path):
        accelerator.load_state(str(path))
        if ema is not None:
            ema.load_state_dict(load_file(path / 'ema.safetensors'))
    return state, path


def restore_best(folder: Path, path: Path) -> None:
    """Put back the best weights of the checkpoint a run goes on from, which may have ended before it recorded others.

    Raises:
        InputError: If there is a newer checkpoint by now.
    """
    if find_checkpoints(folder)[-1:] != [path]:
        raise InputError(f'Another run went on in {folder} meanwhile; run the same command again.')
    if (path / BEST).is_file():
        with writing(folder / BEST) as tmp:
            _link(path / BEST, tmp)
            os.replace(tmp, folder / BEST)


def _read_state(path: Path, sharding: str, layout: Dict[str, int], earlier: Sequence[Path]) -> TrainState:
    """The state of a checkpoint, unless this run cannot go on from it; from one of the earlier ones it may."""
    content = json.loads((path / 'state.json').read_text(encoding='utf-8'))
    content.pop('files')
    state = TrainState(**content)
    if state.sharding != sharding:
        raise InputError(
            f'Checkpoint {path} was written with {state.sharding or "whole weights"}, and this run has '
            f'{sharding or "whole weights"}; launch as before.')
    if state.sharding == 'DEEPSPEED' and state.layout['processes'] != layout['processes']:
        raise InputError(
            f'Checkpoint {path} is of {state.layout["processes"]} processes, and DeepSpeed needs the same number; '
            f'launch as many.')
    if state.layout != layout and state.batch:
        changed = ', '.join(f'{k} {v} (now {layout.get(k)})' for k, v in state.layout.items() if layout.get(k) != v)
        between = next((other.name for other in reversed(earlier) if not _place(other)[1]), None)
        raise InputError(
            f'Checkpoint {path} lies within an epoch of {changed}; resume with the earlier values' + (
                f', or remove it to go on from {between}, the end of an epoch.' if between else '.'))
    return state


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say of which checkpoint an error is."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError, DistError):  # the latter two are no fault of the checkpoint
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as e:
        raise InputError(
            f'Checkpoint {path} does not fit this run ({say_why_not_loaded(e)}); resume with the same settings.') from e


def name_sharding(accelerator: Accelerator) -> str:
    """'FSDP' or 'DEEPSPEED', which divide the weights among the processes; otherwise nothing."""
    kind = accelerator.distributed_type
    return kind.value if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) else ''
