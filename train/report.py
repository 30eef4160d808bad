#!/usr/bin/env python3
"""Write RESULTS.md, the tables of the paper's experiments, and a page on the regions of each network that was analysed,
from the committed results.

    python train/report.py             # write
    python train/report.py --check     # write nothing, fail where a page is stale

The results are those of reproduce.py (train/results/paper/EXPERIMENT, as its --output train/results/paper writes
them), of ship.py (train/results/MODEL.TAG) and of train.analysis (train/results/MODEL.TAG/analysis).
"""
import sys
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Optional

import yaml

if __package__ in (None, ''):  # run as a script: find the checkout, not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from timm_tmblock.errors import InputError, exiting_on_input_error
from timm_tmblock.files import write_text
from train.analysis import FILLS, name_network
from train.claims import adds_values, judge
from train.comparison import RUNS, Comparison, compare_others, find_last
from train.config import Parser
from train.evidence import Evidence, collect, read_json
from train.lineage import count_epochs, count_taught_epochs, find_fillings, find_legs, find_teachers
from train.maps import compare_maps, say_fillings, say_leads
from train.paper import DATASET_NAMES, DATASETS, TABLE_1
from train.tables import (
    TITLES,
    Scores,
    is_of_copy,
    label,
    name_hub_sets,
    read_results,
    render_table,
    say_counts,
    say_provenance,
    tabulate,
)

ROOT = Path(__file__).resolve().parent.parent
ANALYSES = ('geometry', 'mosaic', 'words', 'trust', 'trust_blur', 'mixing')
TRUST = dict(trust='mean colour', trust_blur='blurred image')  # analyses, and what masks in them


def wrap(text: str) -> List[str]:
    return textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False)


def say_setting(result: Dict[str, Any]) -> str:
    versions = ', '.join(f'{k} {v}' for k, v in result['versions'].items() if k in ('torch', 'timm'))
    return f'{result["hardware"]}; {versions}'


SECTIONS = (
    'Trained weights, shipped and intermediate', 'With and without template matching', 'What the paper claims',
    'The experiments of the paper', 'What the regions show')


def to_anchor(title: str) -> str:
    return '#' + title.lower().replace(',', '').replace(' ', '-')


def render_results(root: Path, evidence: Evidence) -> str:
    """The page of all results."""
    analyses = {tag: found for tag in evidence.evaluations if (found := find_analyses(root, tag))}
    parts = (
        say_weights(root, evidence), say_comparisons(evidence), say_claims(evidence), say_experiments(root),
        say_regions(analyses) if analyses else [])
    lines = [
        '# Results', '',
        'Written by `python train/report.py` from the files in [train/results](train/results), which record the data,',
        'hardware and versions of each number, and the settings and seed of each run (`args.yaml` or command).',
        'Commands name the datasets on the Hub; the runs read copies with the images in another order. So the commands',
        "form other batches (except for the paper's experiments, which order images by their pixels), and analyses of",
        'part of a dataset use other images.', '',
        ' ·\n'.join(f'[{title}]({to_anchor(title)})' for title, part in zip(SECTIONS, parts) if part), '']
    for title, part in zip(SECTIONS, parts):
        lines += [f'## {title}', '', *part] if part else []
    return '\n'.join(lines)


def say_weights(root: Path, evidence: Evidence) -> List[str]:
    """The table of all weights."""
    lines = [
        '| weights | data | epochs | parameters | top-1 | flip TTA | patch accuracy | ECE | recipe of the last phase '
        '| measured on |', '|---|---|---|---|---|---|---|---|---|---|',
    ]
    index = read_json(root / 'timm_tmblock' / 'weights' / 'index.json') or {}
    for tag, e in evidence.evaluations.items():
        run = evidence.runs[tag]
        regions = f'{e["patch_accuracy"]:.1f} %' if e.get('patch_accuracy') is not None else '–'
        epochs = count_epochs(tag, evidence.runs) or f'{run["epochs"]} more'
        taught = count_taught_epochs(tag, evidence.runs)
        if taught:
            teachers = 'a teacher' if len(find_teachers(tag, evidence.runs)) == 1 else 'teachers'
            epochs = f'{epochs}, {"" if taught == epochs else f"{taught} "}with {teachers}'
        size = say_size(run)
        name = f'`{tag}`' if tag in index else f'{tag} (not shipped)'
        lines.append(
            f'| [{name}](train/results/{tag}) | {Path(e["dataset"]).name} {e["split"]}, {e["images"]:,} images{size} '
            f'| {epochs} | {run["parameters"]:,} | {e["top1"]:.2f} % | {e["flip_top1"]:.2f} % | {regions} '
            f'| {100 * e["ece"]:.1f} % | {say_recipe(root, tag)} | {e["hardware"]} |')
    precisions = sorted({e['precision'] for e in evidence.evaluations.values()})
    return [*lines, '', *wrap(
        f'In {" and ".join(precisions)}, by `python train/evaluate.py --tta flip`, with '
        f'{say_versions(evidence.evaluations)}. Patch accuracy is the share of regions that match the class of their '
        f'image, ECE the expected calibration error (15 bins). One run each. Test images [influenced some '
        f'choices](train/README.md#the-shipped-weights): optimizer and learning rate were chosen from three '
        f'candidates for `rn26_tm`, by short runs that were scored on 2,000 test images of CIFAR-10; most later phases '
        f'were added when the test accuracy before them was known; the last teachers of `rn26_tm.dist_cifar10` were '
        f'chosen by their test accuracy.'), '']


def say_versions(evaluations: Dict[str, Dict[str, Any]]) -> str:
    """Versions that most weights were measured with, and those of the others."""
    by_version: Dict[str, List[str]] = {}
    for tag, e in evaluations.items():
        by_version.setdefault(', '.join(f'{k} {e["versions"][k]}' for k in ('torch', 'timm')), []).append(tag)
    (most, _), *others = sorted(by_version.items(), key=lambda item: -len(item[1]))
    return most + ''.join(f' ({", ".join(tags)}: {versions})' for versions, tags in others)


def say_claims(evidence: Evidence) -> List[str]:
    """The table of what the paper claims, and the evidence for each verdict."""
    claims = judge(evidence)
    return [
        *wrap(
            'Claims of [Feature Embedding by Template Matching as a ResNet Block](https://arxiv.org/abs/2210.00992). A '
            'verdict is about the networks and datasets that its evidence names. One about several holds if it holds '
            'for each, and does not hold if it fails for one; "mostly" means for more than half of the datasets. '
            '"(here: …)" is what we tested. A verdict says that there is a difference, not that it is large; '
            '"undecided" means tested, without a clear result.'), '',
        '| | claim | section | verdict |', '|---|---|---|---|',
        *(f'| {n} | {c.text} | {c.section} | **{c.verdict}** |' for n, c in enumerate(claims, 1)), '',
        *wrap(
            f'**Accuracies** decide a claim by Welch\'s t-test at 5 % over the runs of each setting (± is one standard '
            f'error), of which there must be {RUNS} or more, as was planned; fewer decide nothing. All are tested on '
            f'the same images, so a verdict is about these. A difference of half a point, as many of the paper\'s are, '
            f'takes more than three runs to see, if runs spread as ours do. There is no correction for '
            f'multiple comparisons, so one of many may be confirmed or refuted by chance. Claims that hold or do '
            f'not hold after fewer epochs than the protocol\'s say so; the epochs of all runs are below Table 1.'), '',
        *wrap(
            '**Claims about features** are judged on the shipped networks, trained once each by other recipes than the '
            "paper's: Figures 5 to 7 on `rn26_tm` for CIFAR-10, as the paper has them, the last claim on all. Those "
            'about Figures 5 and 6 are judged by the ten nearest neighbours of 8 regions of each of 80 images a class '
            '(2 where class scores are compared; of CIFAR-100 there are 12 images a class, 23 for its visual words): '
            'by how many of them, among regions of other images, are of the '
            'class, or, among regions of other classes, of the superclass, animals or vehicles. Silhouettes may '
            'differ, and are in the evidence; that of superclasses grows with the separation of classes too. A '
            'difference of two standard errors over images, paired by image, decides; these are rather too small, as '
            'all images are compared with the same regions. How much another run would '
            'differ is unknown, so these verdicts are about these networks only. Reported but not judged: `rn26_tm` '
            'for CIFAR-100, whose baseline had fewer epochs, and networks with a teacher, which the paper does not '
            'use; these differ much, and their baseline had no teacher and fewer epochs. The measures of claims 14 to '
            '16 were changed after their results were known: by those before, 15 and 16 were undecided. Claim 12 is '
            'judged on one run of RN20, by the protocol.'), '',
        *wrap(
            '-Ours: with the block (`*_tm`); -Ours-C: its values concatenated (`dn100_tm_cat`); -aux: without it, '
            'patches supervised alone; λ: weight of the patch loss; μ, η: margin and scale of a maximizer.'), '',
        'The evidence, where there is any:', '',
        *(line for n, c in enumerate(claims, 1) if c.evidence for line in (
            f'**{n}.** {c.text}: {c.verdict}.', '', *(f'- {part}' for part in c.evidence), ''))]


def say_experiments(root: Path) -> List[str]:
    """The tables of the experiments of the paper, and what has no run yet."""
    lines = [
        'By its protocol, as far as section 4 tells it: a split of 65, 15 and 20 % for training, validation and test,',
        'Adam with a learning rate of 0.001 and a weight decay of 0.0001, batches of 32, λ 0.5. The rest is our',
        'reading or choice, in [paper.yaml](train/recipes/paper.yaml): that all 60,000 images of a set are pooled, in',
        'one stratified split for all runs; crops from a padding of 4 pixels of the mean colour and mirror images, as',
        "in the work it cites for augmentation, normalised and padded by CIFAR-10's mean on CIFAR-100 too;",
        'weight decay as an L2 term on every parameter; a constant learning rate for 100 epochs, or as many as a table',
        'says; that the weights that are best on the 15 % are tested; that an incomplete last batch of an epoch is',
        'dropped; that templates are initialized as PyTorch does a convolution, all other convolutions by',
        "Kaiming's normal distribution (fan-out). Widths, strides and value dimensions, which the text leaves open,",
        'were chosen to give the parameter counts of Table 1; the count for each class agrees exactly, and the',
        'constant part to the two decimals printed there, but for DN100-Ours and DN100-Ours-C, where it is 0.5 and',
        '0.7 % lower.',
        'Patches of an even size reach one position further right and down; at borders only what is inside the map is',
        'averaged. Runs that still misclassify many training images have not converged: they do not reproduce the',
        'level of Table 1, and are no evidence against it.',
        '']
    empty = []
    for name, title in TITLES.items():
        results, scores = read_results(root / 'train' / 'results' / 'paper' / name)
        if results:
            lines += [f'### {title}', '', *tabulate(name, scores), '', *say_provenance(results), '']
        else:
            empty.append(f'- {title}: `python train/reproduce.py {name} --output train/results/paper`')
        if name == 'table1' and results:
            empty += say_missing(scores)
    return [*lines, 'Not run yet:', '', *empty, ''] if empty else lines


def say_missing(scores: Scores) -> List[str]:
    """What of Table 1 has no run."""
    missing = {DATASET_NAMES[d]: [label(row) for row in TABLE_1 if not scores.get((row, d))] for d in DATASETS}
    parts = [
        f'{name} ({"all rows" if len(rows) == len(TABLE_1) else ", ".join(rows)})'
        for name, rows in missing.items() if rows]
    return [
        f'- Table 1: {"; ".join(parts)}; [the command](train/README.md#reproduce-the-paper) with `--rows`, '
        f'`--datasets` and `--data`'] if parts else []


def say_recipe(root: Path, tag: str) -> str:
    """Link to the recipe that the card of shipped weights names; its header has the commands of all phases."""
    path = root / 'hub_cards' / 'models' / f'{tag}.yaml'
    if not path.is_file():
        return '–'
    recipe = yaml.safe_load(path.read_text(encoding='utf-8'))['recipe']
    return f'[{Path(recipe).name}]({recipe})'


def say_size(run: Dict[str, Any]) -> str:
    size = run['settings'].get('img_size')
    if size in (None, 32):
        return ''
    height, width = size if isinstance(size, list) else (size, size)
    return f' at {height}×{width}'


def say_comparisons(evidence: Evidence) -> List[str]:
    """The table of networks with template matching and their baselines."""
    found = compare_others(evidence)
    if not found:
        return []
    lines = [
        '| network | data | epochs | top-1 | baseline | top-1 | difference |', '|---|---|---|---|---|---|---|']
    for c in found:
        run, ours, theirs = evidence.runs[c.tag], evidence.evaluations[c.tag], evidence.evaluations[c.baseline]
        lines.append(
            f'| [{c.tag}](train/results/{c.tag}) | {Path(ours["dataset"]).name}{say_size(run)} | {c.epochs} '
            f'| {ours["top1"]:.2f} % | [{c.baseline}](train/results/{c.baseline}) | {theirs["top1"]:.2f} % '
            f'| {c.difference}{"" if c.by_image else " ‡"}{" †" if ran_elsewhere(c, evidence) else ""}'
            f'{" §" if c.taught else ""} |')
    last = find_last(found)
    beyond = [c.difference.points > 0 for c in last if abs(c.difference.points) > 2 * c.difference.error]
    text = (
        f'Network and baseline were trained by the same recipes, one run each. These are {len(last)} pairs: rows with '
        'the same network and dataset are phases of one training run; those at 24×24 are first phases, whose learning '
        'rate had not been annealed yet. A baseline shared by two networks was trained once. Top-1 is on the test '
        f'images; ± is one standard error of the difference, paired by image. Of the {len(last)} differences '
        f'after the last phase without a teacher, {sum(beyond)} are more than two such errors above zero and '
        f'{len(beyond) - sum(beyond)} more than two below it. These errors leave out how much two runs of one network '
        'differ, so no difference says which of the two is better. Optimizer and learning rate were chosen for '
        '`rn26_tm`, by short runs that were scored on test images.')
    if not all(c.by_image for c in found):
        text += (
            ' ‡: unpaired, which makes the error larger: these weights were not kept, so their predictions per image '
            'are unknown.')
    if any(ran_elsewhere(c, evidence) for c in found):
        text += ' †: parts of the two trainings ran on different hardware or versions of torch.'
    if any(c.taught for c in found):
        text += ' §: the last phase of both had the same teacher.'
    return [*lines, '', *wrap(text), '']


def ran_elsewhere(comparison: Comparison, evidence: Evidence) -> bool:
    """Whether network and baseline were trained on different hardware or versions."""
    ours, theirs = ([
        ([machine.partition(',')[0] for machine in run['hardware'].split(', then ')],
         [version.partition('+')[0] for version in run['versions']['torch'].split(', then ')])
        for run in find_legs(tag, evidence.runs) or []] for tag in (comparison.tag, comparison.baseline))
    return ours != theirs


MAPS = ('random', "another image's class map", 'occlusion', 'Grad-CAM', 'CAM probabilities')


def say_regions(analyses: Dict[str, Dict[str, Any]]) -> List[str]:
    """The table of all networks' class maps beside other maps."""
    lines = [
        *wrap(
            'Does a network lose the class when the regions that its class map ranks highest are masked? By four '
            'measures (areas under deletion and insertion curves, accuracy without the higher- and the lower-ranked '
            'half) the class map is compared with other maps of the same network: 3+ 1− means that it is better on '
            'three measures and worse on one, paired by image: in an area by more than two standard errors, in an '
            "accuracy by McNemar's exact test at 5 %. Of so many "
            'comparisons a few differ so much by chance, so that a single + or − says little; 150 images show less '
            'than 600. Another image\'s class map and a random one are the controls. Grad-CAM is what `method="cam"` '
            'shows, CAM probabilities are the same after a softmax over the classes. Occlusion hides windows as large '
            "as the patches with the row's mask, in fewer positions, as all lie inside the image; the blur is a "
            'Gaussian of 11×11 pixels, σ = 5, as in RISE, whose images were larger. Insertion starts from the blurred '
            'image whatever the mask, so it counts only in the second row of a network (three measures in the first). '
            'In the DenseNets the class map scores a region two pixels right of and below what is masked, which puts '
            'it at a disadvantage. In the ResNets that is half a pixel, while CAM scores it 1.5 pixels left of and '
            'above what is masked, which puts CAM at a disadvantage. A random map masks regions that are scattered, '
            "which takes more from an image than as many that lie together: another image's map is the fairer "
            'control.'), '',
        *wrap(
            f'Last columns, of {say_counts(f["mixing"]["images"] for f in analyses.values() if "mixing" in f)} images: '
            'the share of regions whose best match has the largest weight in what the block mixes; the '
            'share of that weight in the sum of all; the standard deviation of the mixture over the regions, relative '
            'to that of what it is added to. Where that ratio is small, the block adds little, whatever it matched; a '
            'concatenated mixture is normalised next, so its scale says nothing. Where the scale of the norm of a '
            'class is positive, its weight rises with its score, so that some agreement is built in.'), '',
        f'| network | masked by | images | {" | ".join(MAPS)} | best match mixed most | its share | mixture |',
        '|---|---|---|' + '---|' * len(MAPS) + '---|---|---|']
    for tag, found in analyses.items():
        mixed = '– | – | –'
        if 'mixing' in found:
            shares = [f'{100 * found["mixing"][key]:.0f} %' for key in ('agreement', 'matched_share')]
            mixed = ' | '.join([*shares, f'{found["mixing"]["value_spread"]:.2f}' if adds_values(tag) else '–'])
        link = f'[{tag}](train/results/{tag}/analysis/README.md)'
        rows = [(fill, found[name]) for name, fill in TRUST.items() if name in found]
        for fill, trust in rows:
            found_maps = [compare_maps(trust, other) for other in MAPS]
            cells = [f'{len(c["better"])}+ {len(c["worse"])}−' for c in found_maps]
            lines.append(f'| {link} | {fill} | {trust["images"]} | {" | ".join(cells)} | {mixed} |')
        if not rows:
            lines.append(f'| {link} | – | – | {"– | " * len(MAPS)}{mixed} |')
    return [*lines, '']


def find_analyses(root: Path, tag: str) -> Dict[str, Any]:
    folder = root / 'train' / 'results' / tag / 'analysis'
    found = {name: read_json(folder / f'{name}.json') for name in ANALYSES}
    return {name: value for name, value in found.items() if value}


MOSAIC = (
    'Each cell is a patch, framed in the colour of the class of its image; neighbours in the grid are alike by class '
    'scores (left) or by the mixture (right).')
WORDS = "Centres that k-means finds among the patches' class scores (bars), with the 16 nearest patches."


def render_analysis(
        tag: str,
        found: Dict[str, Any],
        shipped: bool = True,
        fillings: Optional[List[str]] = None,
) -> str:
    """The page on the regions of one network, into whose training images `fillings` put the mean colour."""
    settings = list(dict.fromkeys(map(say_setting, found.values())))
    measured = f'Measured on {" and on ".join(settings)}.'
    if any(is_of_copy(analysis['settings']['dataset']) for analysis in found.values()):
        measured += (" Images were taken from a shuffled copy of the set; from the Hub's, in its own order, the same "
                     'commands take others.')
    lines = [f'# {tag}, region by region', '', measured, '']
    if not shipped:
        lines += ['Of weights that do not ship any more; the commands measure those that do.', '']
    curves = 'Deletion and insertion curves'
    for name, title, picture, say in (
            ('trust', 'Does the class map show the evidence?', curves,
             lambda a: [*say_trust(a), '', say_fillings(fillings)]),
            ('trust_blur', 'The same, masked by a blurred image', curves, lambda a: say_trust(a, 'trust' in found)),
            ('mixing', 'Does the block mix what the class map shows?', '', lambda a: say_mixing(a, adds_values(tag))),
            ('geometry', 'Features by class', 't-SNE of the features', say_geometry),
            ('mosaic', 'Patches by class scores and by value embeddings', 'Patches', lambda a: [MOSAIC]),
            ('words', 'Visual words', 'Visual words', lambda a: [WORDS])):
        if name in found:
            lines += [
                f'## {title}', '', *say(found[name]), '', *([f'![{picture}]({name}.png)', ''] if picture else []),
                f'`{found[name]["command"]}`', '']
    return '\n'.join(lines)


def say_geometry(geometry: Dict[str, Any]) -> List[str]:
    """The table of how regions lie in each space, and what its columns are."""
    return [
        '| features | silhouette, classes | neighbours of the class | silhouette, superclasses '
        '| neighbours of other classes, of the superclass |', '|---|---|---|---|---|',
        *(say_space(name, values) for name, values in geometry['spaces'].items()), '',
        'Stage 3 is the input of the block, patch mean the same averaged over patches, shortcut its 1×1 projection, '
        'values the mixture that is added, block output their sum. The silhouette is from −1 to 1, higher where points '
        'of one label lie closer together than to others; it is of all regions, those of the same image too. '
        'Neighbours are the 10 nearest in the space itself, among regions of other images; for superclasses, among '
        'regions of other classes. Standard errors are over images, given the others, so rather too small. '
        f'{say_chance(geometry["chance"])}']


def say_space(name: str, values: Dict[str, Optional[float]]) -> str:
    cells = []
    for key in ('class', 'superclass'):
        for measure, factor, digits, unit in (('silhouette', 1, 3, ''), ('neighbour_rate', 100, 1, ' %')):
            value, error = values[f'{key}_{measure}'], values[f'{key}_{measure}_error']
            cells.append('–' if value is None or error is None else (
                f'{factor * value:.{digits}f} ± {factor * error:.{digits}f}{unit}'))
    return f'| {name} | ' + ' | '.join(cells) + ' |'


def say_trust(trust: Dict[str, Any], is_second: bool = False) -> List[str]:
    """The table of the masking experiment, and what follows from it; of a second one without what stands above."""
    def cell(row: Dict[str, float], key: str, digits: int) -> str:
        return f'{row[key]:.{digits}f} ± {row[f"{key}_error"]:.{digits}f}'

    lines = [
        f'Parts are masked by {FILLS[trust["fill"]]}; insertion uncovers a blurred image. '
        f'{trust["images"]:,} images, top-1 {trust["top1"]:.1f} %. '
        f'{trust["patch_accuracy"]:.1f} % of the regions match the class of their image, '
        f'{trust["patch_agreement"]:.1f} % the class that is predicted.', '',
        '| map | area under deletion (less is better) | area under insertion (more is better) '
        '| accuracy without the higher-ranked half (less is better) | without the lower-ranked half (more is better) |',
        '|---|---|---|---|---|']
    for name, row in trust['maps'].items():
        lines.append(
            f'| {name} | {cell(row, "deletion", 3)} | {cell(row, "insertion", 3)} '
            f'| {cell(row, "without_most", 1)} % | {cell(row, "without_least", 1)} % |')
    lines += ['', *wrap(
        'Occlusion hides by the blurred image here; all else is as above.' if is_second else
        "Means with standard errors over images. Another image's class map is as smooth and as central as the image's "
        'own, but of another picture (which may show the same class). Grad-CAM is CAM here, as the network ends in '
        'average pooling and a linear layer, and needs no backward pass; its ReLU is left out, which would leave '
        'cells without an order. '
        "`method='cam'` of `timm_tmblock.explain` shows the same scores, clipped at 0. CAM probabilities are the same "
        'after a softmax over the classes. Occlusion hides windows of '
        f'{trust["occlusion_window"]}×{trust["occlusion_window"]} pixels by {FILLS[trust["fill"]]}, and is of '
        'log-odds, as the class map is. ' + say_shift(trust['settings']['model'])), '']
    if trust['fill'] == 'mean':
        lines += [
            'Insertion starts from the blurred image whatever the mask, so it is compared only where that is the mask.',
            '']
    return [*lines, 'Differences above zero favour the class map:', '', *(f'- {said}' for said in say_leads(trust))]


def say_shift(model: str) -> str:
    """How far what is masked lies from what is scored: even patches reach further right and down than left and up."""
    if name_network(model).startswith('dn'):
        return ('The class map scores each region two pixels right of and below what is masked, which puts it at a '
                'disadvantage.')
    return ('The class map scores each region half a pixel right of and below what is masked, CAM 1.5 pixels left of '
            'and above it, which favours the class map a little.')


def say_mixing(mixing: Dict[str, float], added: bool = True) -> List[str]:
    """How far the mixing coefficients follow the patch logits."""
    shares = {key: f'{100 * mixing[key]:.1f} ± {100 * mixing[f"{key}_error"]:.1f} %' for key in (
        'agreement', 'matched_share', 'matched_off')}
    return [
        'The class map shows the patch logits, which the patch loss trains, after a softmax over the classes. The',
        f'block mixes value vectors by weights ReLU(BN(patch logits)), with a scale and a shift of each class. In '
        f'{shares["agreement"]} of the regions',
        f'of {mixing["images"]:,} images the class that matches best has the largest weight too; it has '
        f'{shares["matched_share"]} of the sum',
        f'of the weights, and in {shares["matched_off"]} of the regions its weight is 0.',
        *([f'Over the regions the mixture varies {mixing["value_spread"]:.2f} times as much as what it is added to.']
          if added else ['The mixture is concatenated, and a norm follows, so that its scale says nothing.'])]


def say_chance(chance: Dict[str, Optional[float]]) -> str:
    rates = [f'{100 * rate:.1f} %' for rate in chance.values() if rate is not None]
    return f'By chance {rates[0]} would be of the class' + (
        f' and {rates[1]} of the superclass.' if len(rates) > 1 else '.')


def render_pages(root: Path) -> Dict[Path, str]:
    """All pages by their path."""
    evidence = collect(root)
    pages = {root / 'RESULTS.md': render_results(root, evidence)}
    index = read_json(root / 'timm_tmblock' / 'weights' / 'index.json') or {}
    for tag in evidence.evaluations:
        found = find_analyses(root, tag)
        if found:
            pages[root / 'train' / 'results' / tag / 'analysis' / 'README.md'] = render_analysis(
                tag, found, tag in index, find_fillings(tag, evidence.runs))
    for name in TITLES:
        folder = root / 'train' / 'results' / 'paper' / name
        if (folder / 'README.md').is_file():
            pages[folder / 'README.md'] = render_table(name, folder)
    return {path: name_hub_sets(text) for path, text in pages.items()}


def main(argv: Optional[List[str]] = None) -> None:
    """
    Raises:
        InputError: With --check, where a page is stale.
    """
    parser = Parser(prog='report.py', description='Write the pages of results.')
    parser.add_argument('--check', action='store_true', help='write nothing, but fail if a page is out of date')
    args = parser.parse_args(argv)
    for path, text in render_pages(ROOT).items():
        if not args.check:
            write_text(path, text)
        elif not path.is_file() or path.read_text(encoding='utf-8') != text:
            raise InputError(f'{path.relative_to(ROOT)} is stale; run python train/report.py and commit it.')


if __name__ == '__main__':
    with exiting_on_input_error():
        main()
