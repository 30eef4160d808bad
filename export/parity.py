"""Whether a file gives what PyTorch gives: always asked, on real images and random input, batch by batch.

The report is a JSON object:

batch_sizes, images (how many and of what set), random_inputs.
outputs: for each its largest difference from PyTorch relative to PyTorch's largest value, on images and on random
    input; the share of images (of regions, for patch scores) with the same best class; and the same share of those that
    PyTorch decides by more than the format can resolve.
top1: accuracy in percent of PyTorch and of the file, where the labels are known.
failed: what a file that is kept all the same fails in, else absent.
"""
import math
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from export.images import Images
from timm_tmblock.errors import InputError
from train.metrics import softmax

BATCH_SIZES = (1, 2, 7, 64)
ANY_BATCH = ((1, max(BATCH_SIZES)),)  # ranges of batch sizes that a file with a dynamic one takes
BLOCK = 32  # images that are compared at a time
Run = Callable[[np.ndarray], List[np.ndarray]]


@dataclass(frozen=True)
class Limits:
    """What a precision must keep to.

    Two scores closer than `resolution` of the largest are a tie as far as the format can tell: bfloat16 and int8 keep 8
    bits of each number, so no file in them can order those reliably. Such images do not count towards `decided`; the
    more classes there are, the more of them.
    """
    difference: Optional[float]  # relative
    same: float  # share of images with the same best class
    decided: float  # the same, of images that are no tie
    resolution: float
    same_regions: float
    decided_regions: float
    top1: float = 0.5  # percentage points
    sampled: bool = False  # asked of the set the images are drawn from: see `allow`

    def allow(self, images: int) -> float:
        """How far a share of so many images may fall below the limit by chance, where sampled: two standard errors of
        a share of `decided`.
        """
        return 2 * math.sqrt(self.decided * (1 - self.decided) / images) if self.sampled else 0.


LIMITS = {
    'fp32': Limits(1e-4, same=1., decided=1., resolution=1e-5, same_regions=0.999, decided_regions=1.),
    'fp16': Limits(2e-2, same=0.99, decided=0.999, resolution=2 ** -9, same_regions=0.98, decided_regions=0.999),
    'bf16': Limits(1e-1, same=0.99, decided=0.999, resolution=2 ** -6, same_regions=0.95, decided_regions=0.99),
    'int8': Limits(
        None, same=0.95, decided=0.99, resolution=2 ** -6, same_regions=0.9, decided_regions=0.9, sampled=True),
}


class ParityError(InputError):
    """The file does not give what PyTorch gives."""


@dataclass
class _Comparison:
    """One output, on some inputs."""
    difference: float
    inputs: int
    worst: int  # input with the largest difference
    same: float
    decided: float
    flipped: int  # first input of another class that is no tie, or of another class at all


def compare_output(got: np.ndarray, expected: np.ndarray, scores: np.ndarray, resolution: float) -> _Comparison:
    """Compare an output (N, K, ...) with PyTorch's, given the scores before any softmax."""
    largest, tie = (max(y.max(), -y.min()) for y in (expected, scores))
    differences, gaps = [], []
    for i in range(0, len(got), BLOCK):  # copies of all would take several times the outputs' memory
        block = slice(i, i + BLOCK)
        difference = np.abs(got[block].astype(np.float64) - expected[block])
        differences.append(difference.reshape(len(difference), -1).max(axis=1))
        best = np.sort(scores[block], axis=1)[:, -2:]
        gaps.append(best[:, -1] - best[:, 0])
    errors = np.concatenate(differences) / largest
    errors = np.where(np.isfinite(errors), errors, np.inf)
    clear = np.concatenate(gaps) > resolution * tie
    same = got.argmax(axis=1) == scores.argmax(axis=1)
    wrong = (clear & ~same).reshape(len(got), -1).any(axis=1)
    return _Comparison(
        difference=float(errors.max()),
        inputs=len(got),
        worst=int(errors.argmax()),
        same=float(same.mean()),
        decided=float(same[clear].mean()) if clear.any() else 1.,
        flipped=int((wrong if wrong.any() else ~same.reshape(len(got), -1).all(axis=1)).argmax()),
    )


def check(
        run: Run,
        reference: Run,
        names: Sequence[str],
        precision: str,
        images: Images,
        prepare: Callable[[np.ndarray], np.ndarray],
        random_input: Callable[[int], np.ndarray],
        ranges: Sequence[Tuple[int, int]] = ANY_BATCH,
) -> Tuple[Dict[str, Any], Optional[ParityError]]:
    """Compare a file with PyTorch, at each size of `choose_batch_sizes` once, then at the largest for the other images.

    Args:
        run: The file: input to outputs, in the order of `names`.
        reference: PyTorch in float32: the same input to the class scores (and patch scores) before any softmax.
        names: Outputs. Those called probabilities are compared after a softmax of the reference.
        precision: Key of LIMITS.
        images: Their held-out part is compared.
        prepare: Makes an input of uint8 images (N, C, H, W).
        random_input: A batch of so many random inputs.
        ranges: Smallest and largest batch that the file takes; the last images are left out if they are too few for it.

    Returns:
        The report, and what the file fails in, if it does.

    Raises:
        InputError: If there are too few images for a batch.
    """
    limits = LIMITS[precision]
    pixels = images.held_out
    batch_sizes = choose_batch_sizes(ranges)
    sizes = [*batch_sizes, *[batch_sizes[-1]] * (len(pixels) // batch_sizes[-1])]
    parts = np.split(pixels, np.cumsum(sizes))
    batches = [part for part in parts if any(low <= len(part) <= high for low, high in ranges)]
    if not batches:
        raise InputError(
            f'The file takes no batch of the {len(pixels)} images of {images.source}; give more, with --check-images '
            f'or a larger --dataset.')
    real, *scores = _compare(run, reference, names, batches, limits, prepare)
    noise = _of_noise(limits)
    random, *_ = _compare(run, reference, names, [random_input(n) for n in batch_sizes], noise)
    compared = sum(map(len, batches))

    outputs, failure = {}, None
    for name in names:
        r, g = real[name], random[name]
        outputs[name] = dict(
            max_relative_difference=_round(r.difference),
            max_relative_difference_random=_round(g.difference),
            same_class=round(r.same, 5),
            same_class_decided=round(r.decided, 5),
        )
        failure = failure or _judge(name, r, limits, images.name)
        failure = failure or _judge(name, g, noise, 'random input {}'.format)
    report: Dict[str, Any] = dict(
        batch_sizes=batch_sizes, images=compared, images_of=images.source, random_inputs=sum(batch_sizes),
        outputs=outputs)
    if images.targets is not None:
        targets = images.targets[:compared]
        right = [100 * float((y.argmax(1) == targets).mean()) for y in scores]
        report['top1'] = dict(pytorch=round(right[0], 3), exported=round(right[1], 3))
        lost = limits.top1 + 100 * limits.allow(compared)
        if right[0] - right[1] > lost:
            failure = failure or ParityError(
                f'{names[0]}: top-1 accuracy on {compared} images of {images.source} is {right[1]:.2f} %, PyTorch '
                f'has {right[0]:.2f} %; at most {lost:.4g} points may be lost.')
    return report, failure


def choose_batch_sizes(ranges: Sequence[Tuple[int, int]]) -> List[int]:
    """Those of BATCH_SIZES that lie in one of the ranges, or the closest that do, rising."""
    def closest(size: int) -> int:
        return min((min(max(size, low), high) for low, high in ranges), key=lambda n: abs(n - size))
    return sorted(set(map(closest, BATCH_SIZES)))


def check_batch(
        run: Run, reference: Run, names: Sequence[str], precision: str, batch: np.ndarray) -> Optional[ParityError]:
    """What a file fails in on one more random batch, of another size for example."""
    limits = _of_noise(LIMITS[precision])
    comparisons, *_ = _compare(run, reference, names, [batch], limits)
    call = 'random input {} of ' + ' x '.join(map(str, batch.shape[1:]))
    return next((e for e in (_judge(name, c, limits, call.format) for name, c in comparisons.items()) if e), None)


def _of_noise(limits: Limits) -> Limits:
    """Limits for random input, of which networks are often undecided: scores of a rounded format are a tie where they
    lie closer than the difference that it may make.
    """
    noise = replace(limits, same=0., same_regions=0.)
    if limits.difference is None:
        return replace(noise, decided=0., decided_regions=0.)
    return noise if limits.same == 1 else replace(noise, resolution=limits.difference)


def _compare(
        run: Run,
        reference: Run,
        names: Sequence[str],
        batches: List[np.ndarray],
        limits: Limits,
        prepare: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> Tuple[Dict[str, _Comparison], np.ndarray, np.ndarray]:
    """Each output, and the class scores of PyTorch and of the file."""
    got, scores = (  # prepared twice, as all of them in floating point would take four times the images' memory
        [np.concatenate(parts) for parts in zip(*(call(prepare(batch)) for batch in batches))]
        for call in (run, reference))
    comparisons = {}
    for name, y, s in zip(names, got, scores):
        expected = softmax(s) if name.endswith('probabilities') else s
        comparisons[name] = compare_output(y, expected, s, limits.resolution)
    return comparisons, scores[0], got[0]


def _judge(name: str, c: _Comparison, limits: Limits, call: Callable[[int], str]) -> Optional[ParityError]:
    if not np.isfinite(c.difference):
        return ParityError(f'{name} is not finite for {call(c.worst)}; the network leaves the range of the format.')
    if limits.difference is not None and c.difference > limits.difference:
        return ParityError(
            f'{name} differs from PyTorch by {c.difference:.2g} of its largest value, worst for {call(c.worst)}; at '
            f'most {limits.difference:g} is allowed.')
    regions = name.startswith('patch')
    same, decided = (
        (limits.same_regions, limits.decided_regions) if regions else (limits.same, limits.decided))
    same, decided = (share - limits.allow(c.inputs) for share in (same, decided))
    if c.same < same or c.decided < decided:
        share, limit = (c.decided, decided) if c.decided < decided else (c.same, same)
        return ParityError(
            f'{name} has the same class as PyTorch for {100 * share:.2f} % of the '
            f'{"regions" if regions else "inputs"}, and at least {100 * limit:.4g} % are required; '
            f'{call(c.flipped)} changes its class, {call(c.worst)} differs most.')
    return None


def _round(x: float) -> float:
    """Two digits: more would differ from machine to machine."""
    return float(f'{x:.1e}')
