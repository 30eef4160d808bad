"""What a run of train.py measured of the weights it chose."""
import json
from pathlib import Path
from typing import Any, Dict, Optional

import yaml

from export.images import name_set
from train.config import SETTINGS


def read_run(weights: Optional[Path]) -> Optional[Dict[str, Any]]:
    """
    Args:
        weights: File in the folder of a run.

    Returns:
        `top1` and `top5` (%) on `images` images; `part`, which ones in words; `split` if it is the test split;
        `dataset` and `dataset_id`, its name on the Hub; `result`, all the run wrote down. None for weights that the
        folder tells no accuracy of.
    """
    if weights is None:
        return None
    folder = weights.parent
    if not all((folder / name).is_file() for name in ('result.json', SETTINGS)):
        return None
    result = json.loads((folder / 'result.json').read_text())
    settings = yaml.safe_load((folder / SETTINGS).read_text())
    test, best = result['test'], result['best']
    if weights.stem != ('best' if best else 'last') or not (test or best):
        return None
    split = settings['test_split'] if test else None
    if test:
        part = split or 'the part for tests'
    elif settings['val_split']:
        part = f'{settings["val_split"]}, which chose the weights too'
    else:
        part = f'held out of {settings["train_split"]}, which chose the weights too'
    name = name_set(settings['dataset'])
    return dict(
        top1=(test or best)['top1'], top5=(test or best)['top5'],
        images=result['images']['test' if test else 'validation'], part=part, split=split, dataset=name, result=result,
        dataset_id=name if settings['dataset'].startswith('hfds/') and '/' in name else None)
