"""Runs in train/results, and how long their weights were trained in all, where one began with those of another."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

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
        runs[tag] = json.loads((results / tag / 'result.json').read_text(encoding='utf-8'))
        runs[tag]['settings'] = yaml.safe_load((results / tag / SETTINGS).read_text(encoding='utf-8'))
    return runs


def find_legs(tag: str, runs: Dict[str, Dict[str, Any]]) -> Optional[List[Dict[str, Any]]]:
    """A run and those it continues, the first one first; None if it began with weights of which there is no record.

    The run before is the one of that network and dataset whose experiment folder the first weights lay in, or whose tag
    they ship as.
    """
    run = runs[tag]
    start = run['settings'].get('initial_checkpoint')
    if start is None:
        return None if run['settings'].get('pretrained') else [run]
    others = {k: v for k, v in runs.items() if k != tag}
    for other, earlier in others.items():
        if _identify(earlier) == _identify(run) and is_of(start, other, earlier['settings']):
            before = find_legs(other, others)
            return None if before is None else [*before, run]
    return None


def is_of(weights: str, tag: str, settings: Dict[str, Any]) -> bool:
    """Whether a file is the weights of a run: it lies in its experiment folder, or ships as its tag."""
    folder = Path(weights).parent
    folder = folder.parent if folder.name == 'history' else folder  # of --checkpoint-hist
    return folder.name == settings.get('experiment') or Path(weights).stem == tag


def _identify(run: Dict[str, Any]) -> Tuple[str, str]:
    """Network and dataset, wherever that lay."""
    return run['model'], Path(run['dataset']).name


def find_fillings(tag: str, runs: Dict[str, Dict[str, Any]]) -> Optional[List[str]]:
    """What put the mean colour into training images; None if a run it continues has no record."""
    legs = find_legs(tag, runs)
    if legs is None:
        return None
    settings = [leg['settings'] for leg in legs if leg['settings'].get('aug', True)]
    fillings = ['random erasing' for s in settings if s.get('reprob') and s.get('remode', 'const') == 'const']
    fillings += ['TrivialAugment' if s['aa'] == 'trivial' else s['aa'] for s in settings if s.get('aa')]
    fillings += ['the padding' for s in settings if s.get('padding_mode') == 'constant' and s.get('padding')]
    return list(dict.fromkeys(fillings))


def name_teachers(run: Dict[str, Any]) -> List[str]:
    """Files or names of the networks whose soft targets a run learnt from; files are weights of the names."""
    return list_names(run['settings'].get('kd_checkpoint') or run['settings'].get('kd_model_name'))


def list_names(named: Union[None, str, List[str]]) -> List[str]:
    """As settings have them, which once had one name alone."""
    return [named] if isinstance(named, str) else list(named or [])


def find_teachers(tag: str, runs: Dict[str, Dict[str, Any]]) -> List[str]:
    """Those of a run and of the runs it continues."""
    return list(dict.fromkeys(name for run in find_legs(tag, runs) or [runs[tag]] for name in name_teachers(run)))


def count_epochs(tag: str, runs: Dict[str, Dict[str, Any]]) -> Optional[int]:
    """Epochs of a run and of those it continues; None if it began with weights of which there is no record."""
    legs = find_legs(tag, runs)
    return None if legs is None else sum(int(run['epochs']) for run in legs)


def count_taught_epochs(tag: str, runs: Dict[str, Dict[str, Any]]) -> int:
    """How many of them were with a teacher."""
    return sum(int(run['epochs']) for run in find_legs(tag, runs) or [runs[tag]] if name_teachers(run))
