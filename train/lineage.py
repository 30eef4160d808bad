"""Runs in train/results, and how long their weights were trained in all, where one began with those of another."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml

from timm_tmblock.errors import InputError
from train.config import SETTINGS


def read_runs(results: Path) -> Dict[str, Dict[str, Any]]:
    """What result.json says of each network that was evaluated, shipped or not, and its `settings`, by tag.

    Raises:
        InputError: If one of them has no record of its run.
    """
    runs = {}
    for tag in sorted(path.parent.name for path in results.glob('*/evaluation.json')):
        missing = [name for name in ('result.json', SETTINGS) if not (results / tag / name).is_file()]
        if missing:
            raise InputError(f'train/results/{tag} has no {missing[0]}; train/ship.py writes it.')
        runs[tag] = json.loads((results / tag / 'result.json').read_text())
        runs[tag]['settings'] = yaml.safe_load((results / tag / SETTINGS).read_text())
    return runs


def find_legs(tag: str, runs: Dict[str, Dict[str, Any]]) -> Optional[List[Dict[str, Any]]]:
    """A run and those it continues, the first one first; None if it began with weights of which there is no record.

    The run before is the one of that network and dataset whose experiment folder the first weights lay in.
    """
    run = runs[tag]
    start = run['settings'].get('initial_checkpoint')
    if start is None:
        return [run]
    others = {k: v for k, v in runs.items() if k != tag}
    for other, earlier in others.items():
        experiment = earlier['settings'].get('experiment')
        if (*_identify(earlier), experiment) == (*_identify(run), Path(start).parent.name):
            before = find_legs(other, others)
            return None if before is None else [*before, run]
    return None


def _identify(run: Dict[str, Any]) -> Tuple[str, str]:
    """Network and dataset, wherever that lay."""
    return run['model'], Path(run['dataset']).name


def uses_erasing(tag: str, runs: Dict[str, Dict[str, Any]]) -> bool:
    """Whether a run, or one it continues, was trained with random erasing."""
    return any((leg['settings'].get('reprob') or 0) > 0 for leg in find_legs(tag, runs) or [runs[tag]])


def has_teacher(run: Dict[str, Any]) -> bool:
    """Whether the network learnt from the soft targets of another."""
    return bool(run['settings'].get('kd_checkpoint') or run['settings'].get('kd_model_name'))


def count_epochs(tag: str, runs: Dict[str, Dict[str, Any]]) -> Optional[int]:
    """Epochs of a run and of those it continues; None if it began with weights of which there is no record."""
    legs = find_legs(tag, runs)
    return None if legs is None else sum(int(run['epochs']) for run in legs)
