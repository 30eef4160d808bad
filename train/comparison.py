"""Differences of accuracies, and the networks that were trained alike with and without template matching."""
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple

import numpy as np

from train.config import NO_RECIPE, count_held_out, create_parser
from train.evidence import Evidence
from train.lineage import find_legs, list_names

MARGIN = 1.  # points of accuracy that networks as good as others may be below them
RUNS = 3  # of each setting before accuracies decide: as many as were planned, so that none stops when it pleases
HOLDS, FAILS, UNDECIDED = 'holds', 'does not hold', 'undecided'


@dataclass
class Difference:
    """Of two accuracies, or two gains, in points."""
    points: float
    error: float  # standard; nan if unknown
    errors: float = 2.  # how many of these decide
    decides: bool = True
    p: Optional[float] = None  # of no difference, where runs were compared

    @classmethod
    def of_runs(cls, better: List[List[float]], worse: List[List[float]]) -> 'Difference':
        """Sum of the means of some settings less that of others, by how much their runs differ: Welch's t-test at 5 %.

        All runs of a dataset are tested on the same images, which are what it speaks of. One run of a setting does not
        say how much another would differ, and fewer than RUNS decide nothing.
        """
        groups = [*better, *worse]
        points = sum(map(statistics.mean, better)) - sum(map(statistics.mean, worse))
        if min(map(len, groups)) < 2:
            return cls(points, math.nan, decides=False)
        from scipy.stats import t as student  # which cards, that import this file too, do without
        variances = [statistics.variance(runs) / len(runs) for runs in groups]
        error = math.sqrt(sum(variances))
        if not error:  # which no runs have, unless they are copies
            return cls(points, 0., decides=False)
        freedom = sum(variances) ** 2 / sum(v ** 2 / (len(runs) - 1) for v, runs in zip(variances, groups))
        return cls(
            points, error, float(student.ppf(0.975, freedom)), min(map(len, groups)) >= RUNS,
            float(2 * student.sf(abs(points) / error, freedom)))

    @classmethod
    def of_images(cls, ours: Dict[str, Any], theirs: Dict[str, Any]) -> 'Difference':
        """Of two evaluations on the same images: image by image if that can be told, else as of images of each."""
        n = ours['images']
        if are_paired(ours, theirs):
            a, b = (unpack(e['right'], n).astype(float) for e in (ours, theirs))
            variance = (a - b).var() / n
        else:
            variance = sum(p * (1 - p) for p in (ours['top1'] / 100, theirs['top1'] / 100)) / n
        return cls(ours['top1'] - theirs['top1'], 100 * math.sqrt(variance), decides=False)

    @property
    def verdict(self) -> str:
        """Of the claim that it is positive."""
        return self._decide(self.points)

    @property
    def verdict_within_margin(self) -> str:
        """Of the claim that it is no worse than MARGIN below zero."""
        return self._decide(self.points + MARGIN)

    def _decide(self, points: float) -> str:
        if not self.decides or abs(points) <= self.errors * self.error:
            return UNDECIDED
        return HOLDS if points > 0 else FAILS

    def __str__(self) -> str:
        return f'{self.points:+.2f}' if math.isnan(self.error) else f'{self.points:+.2f} ± {self.error:.2f}'


def are_paired(ours: Dict[str, Any], theirs: Dict[str, Any]) -> bool:
    """Whether it is known of both which images were right, in one order: copies of a set may differ in theirs."""
    known = all(key in e for e in (ours, theirs) for key in ('right', 'targets_sha256'))
    return known and ours['targets_sha256'] == theirs['targets_sha256']


def unpack(right: str, images: int) -> np.ndarray:
    """Which images were right, (N,) bool, of what train/evaluate.py writes."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(right), np.uint8), count=images).astype(bool)


@dataclass
class Comparison:
    """A network with template matching beside its baseline, trained alike."""
    tag: str
    baseline: str  # tag
    epochs: int
    difference: Difference
    pair: Tuple[str, str, str]  # network, dataset and seed; several of one pair are phases of their training
    by_image: bool  # whether the error is of what they answer for the same images
    taught: bool  # whether both had a teacher

    def __str__(self) -> str:
        return f'{self.difference} ({self.tag})'


def find_recipe(run: Dict[str, Any]) -> Dict[str, Any]:
    """What two runs of different networks must share to be compared."""
    settings = {**vars(create_parser().parse_args([])), **run['settings']}  # with flags that came after the run
    recipe = {key: value for key, value in settings.items() if key not in NO_RECIPE}
    recipe.update({key: list_names(recipe[key]) for key in ('kd_model_name', 'kd_checkpoint')})
    images = recipe.pop('batch_size') * recipe.pop('grad_accum_steps') * run.get('processes', 1)
    if settings['sched'] not in ('step', 'wsd', 'rsqrt'):
        del recipe['decay_epochs']  # which no other schedule heeds
    if settings['sched'] != 'multistep':
        del recipe['decay_milestones']
    if settings['lr_base'] is None:
        del recipe['lr_base_size'], recipe['lr_base_scale']
    return dict(recipe, images_an_update=images, held_out=count_held_out(settings))


def is_chosen_by(run: Dict[str, Any], split: str) -> bool:
    """Whether the images of a split chose the weights of a run."""
    def name_sources(splits: str) -> Set[str]:  # of 'train+test[:50%]', say
        return {part.partition('[')[0] for part in splits.split('+')}

    best = run.get('best')
    chosen = best is not None and best['epoch'] + 1 != run['epochs']
    return chosen and bool(name_sources(split) & name_sources(run['settings'].get('val_split') or ''))


def compare_others(evidence: Evidence) -> List[Comparison]:
    """Each network with template matching beside the baseline of the same recipe, other than the paper's.

    One run each, which decides nothing; pairs of longer training come later.
    """
    found = []
    known = {tag: legs for tag in evidence.evaluations if (legs := find_legs(tag, evidence.runs))}
    for tag, legs in known.items():
        for other, other_legs in known.items():
            ours, theirs = evidence.evaluations[tag], evidence.evaluations[other]
            model, baseline = (runs[-1]['model'].partition('.')[0] for runs in (legs, other_legs))
            if '_tm' not in model or baseline != model.partition('_tm')[0]:
                continue
            dataset, other_dataset = (Path(e['dataset']).name for e in (ours, theirs))
            if dataset != other_dataset or any(ours[key] != theirs[key] for key in ('split', 'images')):
                continue
            if any(is_chosen_by(run, ours['split']) for run in (*legs, *other_legs)):
                continue
            if [(run['epochs'], find_recipe(run)) for run in legs] != [
                    (run['epochs'], find_recipe(run)) for run in other_legs]:
                continue
            difference = Difference.of_images(ours, theirs)
            epochs = sum(run['epochs'] for run in legs)
            found.append(
                Comparison(
                    tag, other, epochs, difference, (model, dataset, str(legs[-1]['settings'].get('seed'))),
                    are_paired(ours, theirs), tag in evidence.taught))
    return sorted(found, key=lambda c: (c.pair, c.epochs, c.tag))


def find_last(comparisons: List[Comparison]) -> List[Comparison]:
    """The longest training of each pair without a teacher, which would be compared too."""
    return list({c.pair: c for c in comparisons if not c.taught}.values())
