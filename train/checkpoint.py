"""Weights for use and checkpoints to continue from, each written whole or not at all.

An experiment folder holds

    best.safetensors, last.safetensors   weights with a description of the model in their metadata
    checkpoints/update-00001234/         Accelerate's state, the EMA weights and state.json; the newest two
"""
import errno
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from timm_tmblock.errors import InputError

KEEP = 2  # a checkpoint cut short must leave another one


@dataclass
class TrainState:
    """Where a run stands, beyond what Accelerate saves."""
    epoch: int = 0  # epoch in progress
    batch: int = 0  # batches of it already used
    update: int = 0  # optimizer updates in all
    seconds: float = 0.  # training time in all, validation included
    best: Optional[Dict[str, Any]] = None  # epoch and metrics of best.safetensors
    history: List[Dict[str, Any]] = field(default_factory=list)  # a row of metrics each epoch
    running: Dict[str, float] = field(default_factory=dict)  # sums over the epoch in progress


def staging(path: Path) -> Path:
    """The temporary name `path` is written under."""
    return path.with_name(f'.{path.name}.tmp')


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Say in one sentence why `path` could not be written, and leave nothing half-written.

    Yields:
        The temporary name to write to; renaming it is the caller's last step.

    Raises:
        InputError: If the disk is full or not writable.
    """
    tmp = staging(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
    except (OSError, SafetensorError, RuntimeError) as e:  # torch.save raises RuntimeError on a full disk
        remove(tmp)
        raise InputError(f'Cannot write {path}: {_reason(e)}; earlier checkpoints are intact.') from e
    except BaseException:
        remove(tmp)
        raise


def _reason(error: Exception) -> str:
    text = str(error)
    if getattr(error, 'errno', None) == errno.ENOSPC or 'No space left' in text or 'PytorchStreamWriter' in text:
        return 'the disk is full, free some space'
    return getattr(error, 'strerror', None) or text.split('\n')[0]


def remove(path: Path) -> None:
    """Remove a file or folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def save_weights(path: Path, state_dict: Dict[str, torch.Tensor], description: Dict[str, Any]) -> None:
    """Write weights that `timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=path))` loads.

    Args:
        path: File to write.
        state_dict: Weights.
        description: What the model is, JSON-serialisable; `read_description` returns it.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in state_dict.items()}
    with writing(path) as tmp:
        save_file(tensors, tmp, metadata={'format': 'pt', 'timm_tmblock': json.dumps(description)})
        os.replace(tmp, path)


def save_checkpoint(folder: Path, accelerator: Accelerator, state: TrainState, ema: Optional[torch.nn.Module]) -> None:
    """Write a checkpoint into an experiment folder and drop all but the newest. All processes call this."""
    path = folder / 'checkpoints' / f'update-{state.update:08d}'
    if accelerator.is_main_process:
        remove(staging(path))
    accelerator.wait_for_everyone()
    with writing(path) as tmp:
        accelerator.save_state(str(tmp))
        if accelerator.is_main_process:
            if ema is not None:
                save_file({k: v.contiguous() for k, v in ema.state_dict().items()}, tmp / 'ema.safetensors')
            (tmp / 'state.json').write_text(json.dumps(asdict(state)))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            remove(path)
            os.replace(tmp, path)
    if accelerator.is_main_process:
        for old in find_checkpoints(folder)[:-KEEP]:
            remove(old)


def find_checkpoints(folder: Path) -> List[Path]:
    """Complete checkpoints of an experiment folder, oldest first."""
    return sorted(p.parent for p in folder.glob('checkpoints/update-*/state.json'))


def load_checkpoint(folder: Path, accelerator: Accelerator, ema: Optional[torch.nn.Module]) -> TrainState:
    """Restore the newest checkpoint of an experiment folder.

    Raises:
        InputError: If there is none, or it is of another model.
    """
    checkpoints = find_checkpoints(folder)
    if not checkpoints:
        raise InputError(f'{folder} holds no checkpoint to resume from; give the folder of an earlier run.')
    path = checkpoints[-1]
    try:
        accelerator.load_state(str(path))
        if ema is not None:
            ema.load_state_dict(load_file(path / 'ema.safetensors'))
        return TrainState(**json.loads((path / 'state.json').read_text()))
    except (RuntimeError, ValueError, KeyError, OSError) as e:
        reason = str(e).strip().split('\n')[0]
        raise InputError(f'Checkpoint {path} does not fit this run ({reason}); resume with the same settings.') from e


def read_description(path: Path) -> Dict[str, Any]:
    """Description of the model that `save_weights` put into a file, empty for a file of another origin.

    Raises:
        InputError: If the file is missing or not a safetensors file.
    """
    try:
        with safe_open(path, framework='pt') as f:
            return json.loads((f.metadata() or {}).get('timm_tmblock', '{}'))
    except FileNotFoundError as e:
        raise InputError(f'There is no checkpoint {path}.') from e
    except (SafetensorError, OSError) as e:
        raise InputError(f'{path} is not a safetensors file ({e}); give a best.safetensors or last.safetensors.') from e
