"""What a run of train.py measured of the weights it chose."""
import json
import re
from pathlib import Path
from typing import Any, Dict, Optional

import yaml

from export.images import name_set
from train.config import SETTINGS
from train.lineage import name_teachers


def read_run(weights: Optional[Path]) -> Optional[Dict[str, Any]]:
    """
    Args:
        weights: File in the folder of a run.

    Returns:
        `top1` and `top5` (%) on `images` images; `part`, which ones in words; `split` if it is the test split;
        `dataset`, `dataset_id`, its name on the Hub, and `dataset_type` for the metadata of a card; `started_from` and
        `teachers`, names of weights; `result`, all the run wrote down. None for weights that the folder tells no
        accuracy of.
    """
    if weights is None:
        return None
    folder = weights.parent
    if not all((folder / name).is_file() for name in ('result.json', SETTINGS)):
        return None
    result = json.loads((folder / 'result.json').read_text(encoding='utf-8'))
    settings = yaml.safe_load((folder / SETTINGS).read_text(encoding='utf-8'))
    test, best, pooled = result.get('test'), result.get('best'), settings.get('pool')
    if weights.stem != ('best' if best else 'last') or not (test or best):
        return None
    split = settings.get('test_split') if test and not pooled else None
    if test:
        part = split or 'a part divided off for tests'
    elif pooled:
        part = 'a part divided off to choose the weights'
    elif settings['val_split']:
        part = f'{settings["val_split"]}, which chose the weights too'
    else:
        part = f'held out of {settings["train_split"]}, which chose the weights too'
    name = name_set(settings['dataset'])
    on_hub = re.fullmatch(r'hfds/(\w[\w.-]*(?:/\w[\w.-]*)?)', settings['dataset'])
    dataset = name if on_hub else Path(name).name
    dataset_id = on_hub[1] if on_hub and not Path(on_hub[1]).exists() else None
    start = settings.get('initial_checkpoint') or (settings['model'] if settings.get('pretrained') else None)
    teachers = name_teachers(dict(settings=settings))
    return dict(
        top1=(test or best)['top1'], top5=(test or best)['top5'],
        images=result['images']['test' if test else 'validation'], part=part, split=split,
        dataset=dataset, dataset_id=dataset_id,
        dataset_type=dataset_id or (dataset if re.match('torch/|sample$', settings['dataset']) else 'imagefolder'),
        started_from=start and f'the weights `{_name_weights(start)}`',
        teachers=[f'`{_name_weights(teacher)}`' for teacher in teachers], result=result)


def _name_weights(source: str) -> str:
    """Weights without the place on this machine: of a file of training the name of the run too."""
    path = Path(source.removeprefix('local-dir:'))
    if path.suffix == '.safetensors':
        return '/'.join(path.parts[-2:])
    is_here = source.startswith('local-dir:') or path.is_absolute() or path.suffix in ('.pth', '.pt', '.tar', '.bin')
    return path.name if is_here else source
