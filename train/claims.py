"""What the paper claims, and what the committed results say of it."""
import math
import statistics
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

from train.config import create_parser
from train.paper import DATASET_NAMES, DATASETS, TABLE_1
from train.tables import Scores

# settings that make a recipe, of those that train.py writes down
RECIPE = (
    'opt', 'lr', 'weight_decay', 'momentum', 'sched', 'epochs', 'warmup_epochs', 'batch_size', 'grad_accum_steps',
    'padding', 'padding_mode', 'hflip', 'aa', 'reprob', 'mixup', 'cutmix', 'smoothing', 'model_ema', 'mixed_precision')
HOLDS, FAILS, UNDECIDED, UNTESTED = 'holds', 'does not hold', 'undecided', 'not tested'


@dataclass
class Evidence:
    """All results there are."""
    scores: Dict[str, Scores]  # by experiment of reproduce.py, accuracies (%) of each seed
    test_images: Dict[str, int]  # of each set, in that protocol
    evaluations: Dict[str, Dict[str, Any]]  # of pretrained tags
    runs: Dict[str, Dict[str, Any]]  # the training runs they are from
    geometry: Optional[Dict[str, Any]] = None  # train.analysis of rn26_tm beside rn26, on CIFAR-10
    mosaic: Optional[Dict[str, Any]] = None
    words: Optional[Dict[str, Any]] = None
    maximizer: Optional[Dict[str, Any]] = None


@dataclass
class Claim:
    text: str
    section: str  # of the paper
    verdict: str
    evidence: str


@dataclass
class Difference:
    """Of two accuracies, in points."""
    points: float
    error: float  # standard

    @classmethod
    def of(cls, a: List[float], b: List[float], images: int) -> 'Difference':
        """From runs of several seeds by their spread, from single runs by the number of test images."""
        if min(len(a), len(b)) > 1:
            variance = sum(statistics.variance(runs) / len(runs) for runs in (a, b))
        else:
            variance = sum(mean * (100 - mean) / images for mean in map(statistics.mean, (a, b)))
        return cls(statistics.mean(a) - statistics.mean(b), math.sqrt(variance))

    @property
    def verdict(self) -> str:
        """Of the claim that it is positive: decided by two standard errors."""
        if abs(self.points) <= 2 * self.error:
            return UNDECIDED
        return HOLDS if self.points > 0 else FAILS

    def __str__(self) -> str:
        return f'{self.points:+.2f} ± {self.error:.2f}'


def combine(verdicts: List[str]) -> str:
    """Of several tests of one claim: it holds if all do, or some do and the others are undecided."""
    decided = [v for v in verdicts if v != UNDECIDED]
    if not verdicts:
        return UNTESTED
    return UNDECIDED if not decided else HOLDS if set(decided) == {HOLDS} else FAILS


def compare_rows(evidence: Evidence, experiment: str, pairs: List[Tuple[str, str]]) -> Tuple[str, List[str]]:
    """Whether the first setting of each pair beats the second, on each set where both were run."""
    scores, verdicts, lines = evidence.scores.get(experiment, {}), [], []
    for better, worse in pairs:
        for dataset in DATASETS:
            a, b = scores.get((better, dataset)), scores.get((worse, dataset))
            if a and b:
                difference = Difference.of(a, b, evidence.test_images[dataset])
                verdicts.append(difference.verdict)
                names = (TABLE_1[row][0] if row in TABLE_1 else row for row in (better, worse))
                runs = f'{len(a)} and {len(b)} runs' if len(a) + len(b) > 2 else 'one run each'
                lines.append(f'{" against ".join(names)}, {DATASET_NAMES[dataset]}: {difference} points ({runs})')
    return combine(verdicts), lines


def find_recipe(run: Dict[str, Any]) -> Tuple[Any, ...]:
    """What two runs of different networks must share to be compared."""
    settings = run['settings']
    defaults = create_parser()  # of flags that came after the run
    return (
        *(settings.get(key, defaults.get_default(key)) for key in RECIPE), settings.get('initial_checkpoint') is None)


def compare_others(evidence: Evidence) -> Tuple[str, List[str]]:
    """The same of networks that another recipe trained, the same for baseline and template matching."""
    verdicts, lines = [], []
    for tag, ours in evidence.evaluations.items():
        for other, theirs in evidence.evaluations.items():
            model, baseline = (name.partition('.')[0] for name in (tag, other))
            if '_tm' not in model or baseline != model.partition('_tm')[0]:
                continue
            run, other_run = evidence.runs[tag], evidence.runs[other]
            if ours['dataset'] != theirs['dataset'] or find_recipe(run) != find_recipe(other_run):
                continue
            difference = Difference.of([ours['top1']], [theirs['top1']], ours['images'])
            verdicts.append(difference.verdict)
            lines.append(f'{tag} against {other}: {difference} points (one run each, {run["epochs"]} epochs)')
    return combine(verdicts), lines


Judgement = Tuple[str, List[str]]


def judge_baselines(evidence: Evidence) -> Judgement:
    models = ('rn26', 'rn38', 'wrn16', 'dn100')
    verdict, lines = compare_rows(
        evidence, 'table1', [*((f'{m}_tm', m) for m in models), ('dn100_tm_cat', 'dn100')])
    if not lines:
        verdict, lines = compare_others(evidence)
        lines = [f"not run with the paper's protocol; {line}" for line in lines]
    return verdict, lines


def judge_depth(evidence: Evidence) -> Judgement:
    experiment = 'depth' if evidence.scores.get('depth') else 'table1'
    return compare_rows(evidence, experiment, [('rn38_tm', 'rn26_tm')])


def judge_weight(evidence: Evidence) -> Judgement:
    others = sorted({setting for setting, _ in evidence.scores.get('lambda', {})} - {'lambda0.5'})
    return compare_rows(evidence, 'lambda', [('lambda0.5', other) for other in others])


def judge_soft_maximizers(evidence: Evidence) -> Judgement:
    """They are as good unless one is clearly worse."""
    pairs = [(f'{kind}.batch{n}', f'bn_relu.batch{n}') for kind in ('softmax', 'perturbed') for n in (8, 32)]
    verdicts, lines = zip(*(compare_rows(evidence, 'maximizers', [pair]) for pair in pairs))
    if set(verdicts) == {UNTESTED}:
        return UNTESTED, []
    return FAILS if FAILS in verdicts else HOLDS, [line for found in lines for line in found]


def judge_constants(evidence: Evidence) -> Judgement:
    measured = evidence.maximizer
    if measured is None:
        return UNTESTED, []
    near = all(abs(measured[key] / measured['paper'][key] - 1) <= 0.25 for key in ('mu', 'eta'))
    return HOLDS if near else FAILS, [
        f'μ = {measured["mu"]:.2f}, η = {measured["eta"]:.1f}, a quarter more or less would pass; '
        f'the network was trained by another recipe than the paper\'s']


def judge_block_output(evidence: Evidence) -> Judgement:
    spaces = (evidence.geometry or {}).get('spaces', {})
    names = {'rn26_tm: block output': "at the block's output", 'rn26_tm: stage 3': 'at its input',
             'rn26: stage 3': 'in the baseline'}
    if not set(names) <= set(spaces):
        return UNTESTED, []
    ours, *others = (spaces[name] for name in names)
    better = all(ours[key] > other[key] for other in others for key in ours)
    clusters = ours['class_neighbour_rate'] > 0.5 > max(other['class_neighbour_rate'] for other in others)
    lines = [
        f'{100 * spaces[name]["class_neighbour_rate"]:.0f} % of the neighbours are of the class {where} '
        f'({100 * spaces[name]["superclass_neighbour_rate"]:.0f} % of the superclass; silhouettes '
        f'{spaces[name]["class_silhouette"]:.2f} and {spaces[name]["superclass_silhouette"]:.2f})'
        for name, where in names.items()]
    lines.append(
        'more than half there alone, and all four higher, would pass, a rule set after the numbers were seen: by '
        'silhouettes alone there are no clusters')
    return HOLDS if better and clusters else FAILS, lines


def judge_values(evidence: Evidence) -> Judgement:
    spaces = (evidence.mosaic or {}).get('spaces')
    if not spaces:
        return UNTESTED, []
    values, scores = (spaces[name]['superclass_silhouette'] for name in ('value embeddings', 'class scores'))
    return HOLDS if values > scores else FAILS, [
        f'silhouette of the superclasses {values:.2f} by values, {scores:.2f} by scores']


def judge_words(evidence: Evidence) -> Judgement:
    if evidence.words is None:
        return UNTESTED, []
    return UNTESTED, [
        f'{100 * evidence.words["mixed_words"]:.0f} % of {evidence.words["settings"]["words"]} visual words are '
        f'combinations; what they show has not been labelled']


def judge(evidence: Evidence) -> List[Claim]:
    """Every claim of the paper with its verdict."""
    def rows(better: str, worse: str) -> Judgement:
        return compare_rows(evidence, 'table1', [(better, worse)])

    found = [
        ('Template matching improves the baselines (here: those named)', '4.2, Table 1', judge_baselines(evidence)),
        ('It does more than auxiliary supervision alone', '4.2, Table 1', rows('rn26_tm', 'rn26_aux')),
        ('With it two blocks a stage are mostly above three without', '4.2, Table 1', rows('rn26_tm', 'rn38')),
        ('In DenseNet, concatenation is marginally above addition', '4.2, Table 1', rows('dn100_tm_cat', 'dn100_tm')),
        ('It gains from depth', '4.1', judge_depth(evidence)),
        ('λ = 0.5 is best', '4.1, Figure 4', judge_weight(evidence)),
        ('Soft maximizers do as well as BN-ReLU', '4.1, Figure 3', judge_soft_maximizers(evidence)),
        ('A trained RN20 has μ = 2.5 and η = 17', '4.1', judge_constants(evidence)),
        ("Features are clustered by what they mean at the block's output, not before it nor in the baseline",
         '4.3, Figure 5', judge_block_output(evidence)),
        ('Value embeddings bring patches of like meaning together that class scores keep apart',
         '4.3, Figure 6', judge_values(evidence)),
        ('Combinations of classes stand for new things, such as wings and tyres', '4.3, Figure 7',
         judge_words(evidence)),
    ]
    return [Claim(text, section, verdict, '; '.join(lines) or '–') for text, section, (verdict, lines) in found]
