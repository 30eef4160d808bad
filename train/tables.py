"""The tables and figures of the paper's experiments, from the results of their runs."""
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

from timm_tmblock.files import write_text
from train.files import save_figure
from train.paper import DATASET_NAMES, DATASETS, TABLE_1

Scores = Dict[Tuple[str, str], List[float]]  # (setting, set) -> test accuracy of each seed, in %

TITLES = {
    'table1': 'Table 1: top-1 accuracy on the test part',
    'lambda': 'Figure 4: the weight λ of the patch loss, RN26-Ours',
    'depth': 'Section 4.1: two and three blocks a stage',
    'maximizers': 'Figure 3: soft maximizers in place of BN-ReLU, RN20',
}


def render(experiment: str, folder: Path) -> Path:
    """Write README.md and, for a figure of the paper, a PNG over the results in a folder; returns the table's path."""
    scores = read_results(folder)[1]
    if scores and experiment != 'table1':
        _draw(experiment, scores, folder / f'{experiment}.png')
    path = folder / 'README.md'
    write_text(path, name_hub_sets(render_table(experiment, folder)))
    return path


def render_table(experiment: str, folder: Path) -> str:
    """The page of the results in a folder."""
    results, scores = read_results(folder)
    lines = [f'# {TITLES[experiment]}', '', *tabulate(experiment, scores), '', *say_provenance(results)]
    if scores and experiment != 'table1':
        lines += ['', f'![{TITLES[experiment]}]({experiment}.png)']
    return '\n'.join(lines) + '\n'


def name_hub_sets(text: str) -> str:
    """With the Hub's names of the sets that the runs had copies of, which a reader does not have."""
    return re.sub(r'hfds/\.\./\S+/(cifar100?)\b', r'hfds/uoft-cs/\1', text)


def is_of_copy(dataset: str) -> bool:
    """Whether a set was read from a copy, which may be in another order than the Hub's."""
    return name_hub_sets(dataset) != dataset


def read_results(folder: Path) -> Tuple[List[Dict[str, Any]], Scores]:
    """The finished runs in a folder, and their scores."""
    results = [json.loads(path.read_text(encoding='utf-8')) for path in sorted(folder.glob('*/result.json'))]
    results = [result for result in results if 'setting' in result and result['test']]
    scores: Scores = defaultdict(list)
    for result in results:
        scores[result['setting'], result['data']].append(result['test']['top1'])
    return results, scores


def say_counts(counts: Iterable[int]) -> str:
    return ' or '.join(f'{count:,}' for count in sorted(set(counts)))


def format_scores(values: List[float]) -> str:
    """Mean ± sample standard deviation and number of runs; one or two as they are."""
    if not values:
        return '–'
    if len(values) < 3:
        return f'{", ".join(f"{value:.2f}" for value in values)} ({len(values)} run{"s"[:len(values) - 1]})'
    return f'{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)} runs)'


def label(setting: str) -> str:
    """A setting as the paper writes it."""
    if setting in TABLE_1:
        return TABLE_1[setting][0]
    if setting.startswith('lambda'):
        return f'λ = {setting.removeprefix("lambda")}'
    maximizer, batch_size = setting.split('.batch')
    names = dict(bn_relu='BN-ReLU', softmax='margin-augmented softmax', perturbed='perturbed maximizer')
    kind = maximizer.rstrip('0123456789')
    samples = maximizer.removeprefix(kind)
    return f'{names[kind]}{f" of {samples} samples" if samples else ""}, batch {batch_size}'


def paper_score(setting: str, dataset: str) -> Optional[float]:
    """What the paper's text says of a setting; its figures have no numbers."""
    if setting == 'lambda0.5' and dataset == 'cifar10':
        setting = 'rn26_tm'
    return TABLE_1[setting][1 + DATASETS.index(dataset)] if setting in TABLE_1 else None  # type: ignore[return-value]


def _order(settings: List[str]) -> List[str]:
    rows = list(TABLE_1)
    return sorted(
        settings, key=lambda s: (rows.index(s) if s in rows else len(rows), int(s.partition('.batch')[2] or 0), s))


def tabulate(experiment: str, scores: Scores) -> List[str]:
    datasets = [d for d in DATASETS if any(dataset == d for _, dataset in scores)]
    settings = list(TABLE_1) if experiment == 'table1' else _order(sorted({s for s, _ in scores}))
    head = '| | ' + ' | '.join(f'{DATASET_NAMES[d]} | paper' for d in datasets) + ' |'
    lines = [head, '|---|' + '---|---|' * len(datasets)]
    for setting in settings:
        cells = []
        for dataset in datasets:
            reported = paper_score(setting, dataset)
            cells += [format_scores(scores.get((setting, dataset), [])), '–' if reported is None else f'{reported:.2f}']
        lines.append(f'| {label(setting)} | ' + ' | '.join(cells) + ' |')
    return lines if datasets else ['No run is finished yet.']


def say_provenance(results: List[Dict[str, Any]]) -> List[str]:
    """How the numbers came about, said once where all runs agree."""
    lines = []
    if len({r['seed'] for r in results}) > 2:
        lines.append('- ±: standard deviation over the runs, where there are more than two')
    lines += _say_of_sets('Epochs', results, lambda found: ', '.join(dict.fromkeys(str(r['epochs']) for r in found)))
    lines += _say_of_sets('Seeds', results, lambda found: ', '.join(dict.fromkeys(str(r['seed']) for r in found)))
    for key, title in (('images', 'Images'), ('hardware', 'Hardware'),
                       ('mixed_precision', 'Mixed precision, in training and test'), ('versions', 'Versions')):
        found = list(dict.fromkeys(_say(r[key]) for r in results))
        if found:
            lines.append(f'- {title}: {"; ".join(found)}')
    lines += _say_of_sets(
        'Training images, cropped and mirrored, that were right in the last epoch',
        [r for r in results if 'last' in r], _say_shares)
    commands: Dict[str, List[str]] = {}  # of one seed, and the seeds of the runs that differ in theirs alone
    for result in results:
        alike = re.sub(r' --seed \d+', '', result['command'])
        commands.setdefault(alike, [result['command']]).append(str(result['seed']))
    return lines + [
        f'- `python train/{command}`' + (f', also with --seed {", ".join(others)}' if others else '')
        for command, _, *others in commands.values()]


def _say_of_sets(title: str, results: List[Dict[str, Any]], say: Callable[[List[Dict[str, Any]]], str]) -> List[str]:
    """What is to be said of the runs on each set, once where it is the same."""
    said = {DATASET_NAMES[d]: say(found) for d in DATASETS if (found := [r for r in results if r['data'] == d])}
    if len(set(said.values())) > 1:
        return [f'- {title}: {"; ".join(f"{text} ({name})" for name, text in said.items())}']
    return [f'- {title}: {text}' for text in set(said.values())]


def _say_shares(results: List[Dict[str, Any]]) -> str:
    shares: Dict[str, List[float]] = defaultdict(list)
    for r in results:
        shares[r['setting']].append(r['last']['train_top1'])
    return ', '.join(
        f'{label(setting)} {" to ".join(dict.fromkeys(f"{end(shares[setting]):.1f}" for end in (min, max)))} %'
        for setting in _order(list(shares)))


def _say(value: Any) -> str:
    return ', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else str(value)


def _draw(experiment: str, scores: Scores, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    order = _order(sorted({s for s, _ in scores}))
    places = {s: float(s.removeprefix('lambda')) if experiment == 'lambda' else float(i) for i, s in enumerate(order)}
    if experiment == 'lambda':
        order.sort(key=places.__getitem__)
    else:
        axes.set_xticks(list(places.values()), [label(s).replace(', ', '\n') for s in order])
    for dataset in dict.fromkeys(d for _, d in scores):
        runs = {s: scores[s, dataset] for s in order if (s, dataset) in scores}
        axes.errorbar(
            [places[s] for s in runs], [statistics.mean(v) for v in runs.values()],
            [statistics.stdev(v) if len(v) > 1 else 0. for v in runs.values()],
            fmt='o-' if experiment == 'lambda' else 'o', capsize=3, label=DATASET_NAMES[dataset])
    axes.set(ylabel='top-1 (%)', title=TITLES[experiment], xlabel='λ' if experiment == 'lambda' else '')
    axes.tick_params(axis='x', labelsize=8)
    axes.grid(axis='y', alpha=0.3)
    axes.legend()
    save_figure(figure, path)
