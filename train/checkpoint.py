"""Checkpoints to continue a run from, each written whole or not at all.

An experiment folder holds, beside weights and records,

    checkpoints/update-00001234/    Accelerate's state, the EMA weights and state.json; the newest two
"""
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from timm_tmblock.checkpoint import remove, writing
from timm_tmblock.errors import InputError

KEEP = 2  # a checkpoint cut short must leave another one


@dataclass
class TrainState:
    """Where a run stands, beyond what Accelerate saves."""
    epoch: int = 0  # epoch in progress
    batch: int = 0  # batches of it already used
    update: int = 0  # optimizer updates in all
    seconds: float = 0.  # time in all, validation included
    best: Optional[Dict[str, Any]] = None  # epoch and metrics of best.safetensors
    history: List[Dict[str, Any]] = field(default_factory=list)  # metrics of each epoch
    running: Dict[str, float] = field(default_factory=dict)  # sums over the epoch in progress


def save_checkpoint(folder: Path, accelerator: Accelerator, state: TrainState, ema: Optional[torch.nn.Module]) -> None:
    """Write a checkpoint into an experiment folder and drop all but the newest. All processes call this.

    Raises:
        InputError: If it cannot be written.
    """
    path = folder / 'checkpoints' / f'update-{state.update:08d}'
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
        accelerator.wait_for_everyone()  # nobody cleans up before the rename
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
