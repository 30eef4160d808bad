#!/usr/bin/env python3
"""Write RESULTS.md, and a page on the regions of each network that was analysed, from the committed results.

    python train/report.py             # write
    python train/report.py --check     # write nothing, fail where a page is stale

The results are those of reproduce.py (train/results/paper/EXPERIMENT, as its --output train/results/paper writes
them), of ship.py (train/results/MODEL.TAG) and of train.analysis (train/results/MODEL.TAG/analysis).
"""
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

if __package__ in (None, ''):  # run as a script: find the checkout, not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import yaml

from timm_tmblock.errors import InputError, exiting_on_input_error
from train.claims import Evidence, judge
from train.config import SETTINGS, Parser
from train.files import write_text
from train.tables import TITLES, read_results, say_provenance, tabulate

ROOT = Path(__file__).resolve().parent.parent
ANALYSES = ('geometry', 'mosaic', 'words', 'trust')
TEST_IMAGES = dict(cifar10=12000, cifar100=12000, mini_imagenet=12000)  # 20 % of 60,000


def read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def find_tags(root: Path) -> List[str]:
    """Networks with results of their own, shipped or not."""
    return sorted(p.parent.name for p in (root / 'train' / 'results').glob('*/evaluation.json'))


def collect(root: Path) -> Evidence:
    results = root / 'train' / 'results'
    tags = find_tags(root)
    runs = {tag: read_json(results / tag / 'result.json') for tag in tags}
    for tag, run in runs.items():
        run['settings'] = yaml.safe_load((results / tag / SETTINGS).read_text())
    analysis = results / 'rn26_tm.cifar10' / 'analysis'
    return Evidence(
        scores={name: read_results(results / 'paper' / name)[1] for name in TITLES},
        test_images=TEST_IMAGES,
        evaluations={tag: read_json(results / tag / 'evaluation.json') for tag in tags},
        runs=runs,
        geometry=read_json(analysis / 'geometry.json'),
        mosaic=read_json(analysis / 'mosaic.json'),
        words=read_json(analysis / 'words.json'),
        maximizer=read_json(results / 'rn20.cifar10' / 'analysis' / 'maximizer.json'),
    )


def say_setting(result: Dict[str, Any]) -> str:
    versions = ', '.join(f'{k} {v}' for k, v in result['versions'].items() if k in ('torch', 'timm'))
    return f'{result["hardware"]}; {versions}'


def render_results(root: Path, evidence: Evidence) -> str:
    """The page of all results."""
    lines = [
        '# Results', '',
        'Written by `python train/report.py` from the files in [train/results](train/results), which have command,',
        'data, seed, hardware and versions of each number.', '',
        '## What the paper claims', '',
        'Claims of [Feature Embedding by Template Matching as a ResNet Block](https://arxiv.org/abs/2210.00992). A',
        'difference of accuracies decides where it exceeds two standard errors, over seeds or, with one run of each,',
        'over test images.', '',
        '| claim | section | verdict | evidence |', '|---|---|---|---|',
    ]
    lines += [f'| {c.text} | {c.section} | **{c.verdict}** | {c.evidence} |' for c in judge(evidence)]
    lines += ['', '## The experiments of the paper', '']
    empty = []
    for name, title in TITLES.items():
        results, scores = read_results(root / 'train' / 'results' / 'paper' / name)
        if results:
            lines += [f'### {title}', '', *tabulate(name, scores), '', *say_provenance(results), '']
        else:
            empty.append(f'- {title}: `python train/reproduce.py {name} --output train/results/paper`')
    if empty:
        lines += ['Not run yet:', '', *empty, '']
    lines += [
        '## Pretrained weights', '',
        '| weights | data | epochs | parameters | top-1 | with the mirrored image | regions right | calibration error '
        '| measured on |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    index = read_json(root / 'timm_tmblock' / 'weights' / 'index.json') or {}
    for tag, e in evidence.evaluations.items():
        run = evidence.runs[tag]
        regions = f'{e["patch_accuracy"]:.1f} %' if e.get('patch_accuracy') is not None else '–'
        epochs = f'{run["epochs"]}{" more" if run["settings"].get("initial_checkpoint") else ""}'
        name = f'`{tag}`' if tag in index else f'{tag} (not shipped)'
        lines.append(
            f'| [{name}](train/results/{tag}) | {Path(e["dataset"]).name} {e["split"]}, {e["images"]:,} images '
            f'| {epochs} | {run["parameters"]:,} | {e["top1"]:.2f} % | {e["flip_top1"]:.2f} % | {regions} '
            f'| {100 * e["ece"]:.1f} % | {say_setting(e)} |')
    lines += ['', 'In float32, by `python train/evaluate.py`. One run each.', '']
    analysed = [tag for tag in evidence.evaluations if (root / 'train' / 'results' / tag / 'analysis').is_dir()]
    analysed = [tag for tag in analysed if read_json(root / f'train/results/{tag}/analysis/trust.json')]
    if analysed:
        lines += ['## What the regions show', '']
        lines += [f'- [{tag}](train/results/{tag}/analysis/README.md)' for tag in analysed] + ['']
    return '\n'.join(lines)


def render_analysis(tag: str, found: Dict[str, Any]) -> str:
    """The page on the regions of one network."""
    lines = [f'# {tag}, region by region', '', f'Measured on {say_setting(next(iter(found.values())))}.', '']
    if 'trust' in found:
        lines += ['## Does the class map show the evidence?', '', *say_trust(found['trust']), '',
                  '![Deletion and insertion curves](trust.png)', '', f'`{found["trust"]["command"]}`', '']
    if 'geometry' in found:
        lines += [
            '## Features by class', '',
            '| features | silhouette, classes | neighbours of the class | silhouette, superclasses '
            '| neighbours of the superclass |', '|---|---|---|---|---|',
            *(say_space(name, values) for name, values in found['geometry']['spaces'].items()), '',
            'Each region with its 10 nearest of other images, in the space itself.', '',
            '![t-SNE of the features](geometry.png)', '', f'`{found["geometry"]["command"]}`', '']
    if 'mosaic' in found:
        lines += ['## Patches by class scores and by value embeddings', '', '![Patches](mosaic.png)', '',
                  f'`{found["mosaic"]["command"]}`', '']
    if 'words' in found:
        lines += ['## Visual words', '', '![Visual words](words.png)', '', f'`{found["words"]["command"]}`', '']
    return '\n'.join(lines)


def say_space(name: str, values: Dict[str, Optional[float]]) -> str:
    cells = []
    for key in ('class', 'superclass'):
        silhouette, rate = values[f'{key}_silhouette'], values[f'{key}_neighbour_rate']
        cells += ['–' if silhouette is None else f'{silhouette:.3f}', '–' if rate is None else f'{100 * rate:.1f} %']
    return f'| {name} | ' + ' | '.join(cells) + ' |'


def say_trust(trust: Dict[str, Any]) -> List[str]:
    """The table of the masking experiment, and what follows from it."""
    def cell(row: Dict[str, float], key: str, digits: int) -> str:
        return f'{row[key]:.{digits}f} ± {row[f"{key}_error"]:.{digits}f}'

    lines = [
        f'{trust["images"]:,} images, top-1 {trust["top1"]:.1f} %. {trust["patch_accuracy"]:.1f} % of the regions '
        f'match the class of their image, {trust["patch_agreement"]:.1f} % the class that is predicted.', '',
        '| map | area under deletion (less is better) | area under insertion (more is better) '
        '| accuracy without the more evident half | without the less evident half |', '|---|---|---|---|---|']
    for name, row in trust['maps'].items():
        lines.append(
            f'| {name} | {cell(row, "deletion", 3)} | {cell(row, "insertion", 3)} '
            f'| {cell(row, "without_most", 1)} % | {cell(row, "without_least", 1)} % |')
    lines += ['', 'Means with standard errors over images.', '']
    signs = dict(deletion=-1, insertion=1)
    for name, row in list(trust['maps'].items())[1:]:
        words = []
        for key, sign in signs.items():
            lead, error = sign * row[f'{key}_lead'], row[f'{key}_lead_error']
            verdict = 'no better and no worse' if abs(lead) <= 2 * error else 'better' if lead > 0 else 'worse'
            words.append(f'{verdict} by {key} ({lead:+.3f} ± {error:.3f})')
        lines.append(f'- Against {name}, the class map is {" and ".join(words)}.')
    return lines


def render_pages(root: Path) -> Dict[Path, str]:
    """All pages by their path."""
    evidence = collect(root)
    pages = {root / 'RESULTS.md': render_results(root, evidence)}
    for tag in evidence.evaluations:
        folder = root / 'train' / 'results' / tag / 'analysis'
        found = {name: read_json(folder / f'{name}.json') for name in ANALYSES}
        found = {name: value for name, value in found.items() if value}
        if found:
            pages[folder / 'README.md'] = render_analysis(tag, found)
    return pages


def main(argv: Optional[List[str]] = None) -> None:
    """
    Raises:
        InputError: With --check, where a page is stale.
    """
    parser = Parser(prog='report.py', description='Write the pages of results.', allow_abbrev=False)
    parser.add_argument('--check', action='store_true', help='write nothing, fail where a page is stale')
    args = parser.parse_args(argv)
    for path, text in render_pages(ROOT).items():
        if not args.check:
            write_text(path, text)
        elif not path.is_file() or path.read_text() != text:
            raise InputError(f'{path.relative_to(ROOT)} is stale; run python train/report.py and commit it.')


if __name__ == '__main__':
    with exiting_on_input_error():
        main()
