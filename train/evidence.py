"""All results there are: of runs by the protocol of the paper, of pretrained tags and of their analyses."""
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple

import yaml

from train.config import SETTINGS
from train.lineage import count_taught_epochs, read_runs
from train.tables import TITLES, Scores, read_results

PROTOCOL = Path(__file__).parent / 'recipes' / 'paper.yaml'


@dataclass
class Evidence:
    """All results there are."""
    scores: Dict[str, Scores]  # by experiment of reproduce.py, accuracies (%) of each seed
    evaluations: Dict[str, Dict[str, Any]]  # of pretrained tags
    runs: Dict[str, Dict[str, Any]]  # the training runs they are from
    # train.analysis by tag: of the weights of rn26_tm, mixing of every network with template matching
    geometry: Dict[str, Dict[str, Any]] = field(default_factory=dict)  # beside rn26
    mosaic: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    mixing: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    taught: Set[str] = field(default_factory=set)  # tags trained with a teacher, of which the paper claims nothing
    elsewhere: Set[str] = field(default_factory=set)  # tags of other sets than CIFAR-10, which Figures 5 to 7 are of
    words: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    maximizer: Optional[Dict[str, Any]] = None
    # by experiment and set, epochs where runs had fewer than the protocol says
    short: Dict[Tuple[str, str], int] = field(default_factory=dict)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else None


def collect(root: Path) -> Evidence:
    results = root / 'train' / 'results'
    runs = read_runs(results)
    matching = [tag for tag, run in runs.items() if '_tm' in run['model']]
    tags = [tag for tag in matching if tag.startswith('rn26_tm.')]

    def read_analyses(name: str, tags: List[str] = tags) -> Dict[str, Any]:
        found = {tag: read_json(results / tag / 'analysis' / f'{name}.json') for tag in tags}
        return {tag: value for tag, value in found.items() if value}

    protocol = yaml.safe_load(PROTOCOL.read_text(encoding='utf-8'))
    rn20 = results / 'rn20.cifar10'
    maximizer = read_json(rn20 / 'analysis' / 'maximizer.json')
    if maximizer:
        settings = yaml.safe_load((rn20 / SETTINGS).read_text(encoding='utf-8'))
        maximizer.update(
            train_top1=(read_json(rn20 / 'result.json') or {})['last']['train_top1'],
            epochs=settings['epochs'], planned=protocol['epochs'], opt=settings['opt'],
            by_protocol=all(settings[key] == protocol[key] for key in protocol if key not in ('epochs', 'seed')))
    paper = {name: read_results(results / 'paper' / name) for name in TITLES}
    trained: Dict[Tuple[str, str], int] = {}
    for name, (found, _) in paper.items():
        for r in found:
            key = name, r['data']
            trained[key] = min(r['epochs'], trained.get(key, r['epochs']))
    return Evidence(
        scores={name: scores for name, (_, scores) in paper.items()},
        evaluations={tag: read_json(results / tag / 'evaluation.json') for tag in runs},
        runs=runs,
        geometry=read_analyses('geometry'),
        mosaic=read_analyses('mosaic'),
        mixing=read_analyses('mixing', matching),
        words=read_analyses('words'),
        maximizer=maximizer,
        taught={tag for tag in runs if count_taught_epochs(tag, runs)},
        elsewhere={tag for tag, run in runs.items() if Path(run['dataset']).name != 'cifar10'},
        short={key: epochs for key, epochs in trained.items() if epochs < protocol['epochs']},
    )
