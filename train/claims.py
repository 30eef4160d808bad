"""What the paper claims, and what the committed results say of it."""
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Sequence, Tuple

from train.analysis import name_network
from train.comparison import FAILS, HOLDS, MARGIN, UNDECIDED, Comparison, Difference, compare_others, find_last
from train.evidence import Evidence
from train.paper import DATASET_NAMES, DATASETS, TABLE_1
from train.tables import label, say_counts

TABLE = '#with-and-without-template-matching'  # of RESULTS.md, where train/report.py writes it
TAUGHT = 'with a teacher, so not judged'
ELSEWHERE = 'on another set than the figure, so not judged'
UNTESTED = 'not tested'
NEAREST = {
    'class': 'nearest neighbours of the class',
    'superclass': 'nearest neighbours of other classes that are of the superclass'}


@dataclass
class Claim:
    text: str
    section: str  # of the paper
    verdict: str
    evidence: List[str]


def combine_all(verdicts: List[str]) -> str:
    """Of a claim that says the same of several networks, sets or settings, and is one only if it holds of each."""
    if not verdicts:
        return UNTESTED
    return FAILS if FAILS in verdicts else HOLDS if set(verdicts) == {HOLDS} else UNDECIDED


def combine_most(verdicts: List[str]) -> str:
    """Of a claim that says what is mostly so."""
    if not verdicts:
        return UNTESTED
    for verdict in (HOLDS, FAILS):
        if verdicts.count(verdict) > len(verdicts) / 2:
            return verdict
    return UNDECIDED


def compare_rows(
        evidence: Evidence,
        experiment: str,
        pairs: List[Tuple[str, str]],
        combined: Callable[[List[str]], str] = combine_all,
        within_margin: bool = False,
) -> Tuple[str, List[str], List[str]]:
    """Whether the first setting of each pair beats the second, or is at most MARGIN below it, on each set both have.

    Returns:
        The verdict, what it rests on, and the sets of that.
    """
    scores, verdicts, lines, sets = evidence.scores.get(experiment, {}), [], [], []
    for better, worse in pairs:
        for dataset in DATASETS:
            a, b = scores.get((better, dataset)), scores.get((worse, dataset))
            if a and b:
                difference = Difference.of_runs([a], [b])
                verdicts.append(difference.verdict_within_margin if within_margin else difference.verdict)
                sets.append(dataset)
                names = (label(row) for row in (better, worse))
                runs = f'{len(a)} and {len(b)} runs' if len(a) + len(b) > 2 else 'one run each'
                runs += '' if within_margin else say_p(difference)
                lines.append(f'{" against ".join(names)}, {DATASET_NAMES[dataset]}: {difference} points ({runs})')
    if len(lines) > 1:
        lines = [
            f'{line}, by itself: {say_epochs(verdict, evidence, experiment, [dataset])}'
            for line, verdict, dataset in zip(lines, verdicts, sets)]
    return combined(verdicts), lines, sets


def say_p(difference: Difference) -> str:
    if difference.p is None:
        return ''
    return f', p = {difference.p:.2f}' if difference.p >= 0.1 else f', p = {difference.p:.2g}'


def find_exceptions(pairs: List[Tuple[str, str]], margin: float = 0.) -> List[str]:
    """Where the paper's own table has the second row of a pair above the first, by more than a margin."""
    found = []
    for better, worse in pairs:
        (_, *a), (_, *b) = TABLE_1[better], TABLE_1[worse]
        found += [
            f'{label(better)} against {label(worse)}, {DATASET_NAMES[dataset]} ({x - y:+.2f})'
            for dataset, x, y in zip(DATASETS, a, b) if x < y - margin]
    return tell_exceptions(found)


def tell_exceptions(found: List[str]) -> List[str]:
    return [f'exceptions in the paper\'s own table: {"; ".join(found)}'] if found else []


def summarize(comparisons: List[Comparison]) -> List[str]:
    """How far apart the differences lie; the table has all of them."""
    def say_range(found: List[Comparison]) -> str:
        ordered = sorted(found, key=lambda c: c.difference.points)
        return ' to '.join(dict.fromkeys(map(str, (ordered[0], ordered[-1]))))

    last = find_last(comparisons)
    alone, taught = ([c for c in comparisons if c.taught == has_teacher] for has_teacher in (False, True))
    told = []
    if last:
        told.append(f'{say_range(last)} points, {len(last)} in all')
    if len(alone) > len(last):
        told.append(f'{say_range(alone)} points with earlier phases, {len(alone)} in all')
    if taught:
        told.append(f'{say_range(taught)} points where both had a teacher')
    what = 'with other recipes, one run each, ± over test images'
    return [f'{what}: {"; ".join(told)} ([table]({TABLE}))'] if told else []


Judgement = Tuple[str, List[str]]


def introduce(what: str, lines: List[str]) -> List[str]:
    """Put what all lines are of before the first."""
    return [f'{what}: {lines[0]}', *lines[1:]] if lines else []


def say_epochs(verdict: str, evidence: Evidence, experiment: str, datasets: Sequence[str]) -> str:
    """A verdict, with the fewest epochs of runs that the protocol would have gone on with."""
    epochs = [evidence.short[experiment, d] for d in datasets if (experiment, d) in evidence.short]
    return f'{verdict} after {min(epochs)} epochs' if epochs and verdict in (HOLDS, FAILS) else verdict


def judge_rows(
        evidence: Evidence,
        experiment: str,
        pairs: List[Tuple[str, str]],
        combined: Callable[[List[str]], str] = combine_all,
        within_margin: bool = False,
) -> Judgement:
    """What `compare_rows` finds, with the epochs it was found after."""
    verdict, lines, sets = compare_rows(evidence, experiment, pairs, combined, within_margin)
    return say_epochs(verdict, evidence, experiment, sets), lines


def judge_baselines(evidence: Evidence) -> Judgement:
    models = ('rn26', 'rn38', 'wrn16', 'dn100')
    pairs = [*((f'{m}_tm', m) for m in models), ('dn100_tm_cat', 'dn100')]
    verdict, lines = judge_rows(evidence, 'table1', pairs)
    others, exceptions = compare_others(evidence), find_exceptions(pairs)
    if not lines and not others:
        return UNTESTED, exceptions
    if not lines:
        return UNDECIDED, ["not run with the paper's protocol", *summarize(others), *exceptions]
    return verdict, [*lines, *summarize(others), *exceptions]


def judge_supervision(evidence: Evidence) -> Judgement:
    """Beside it, what the supervision alone does for the baseline."""
    verdict, lines = judge_rows(evidence, 'table1', [('rn26_tm', 'rn26_aux')])
    alone, more = judge_rows(evidence, 'table1', [('rn26_aux', 'rn26')])
    if len(more) == 1:  # of several each has its own
        more = [f'{more[0]}, by itself: {alone}']
    return verdict, [*lines, *more]


def judge_shallow(evidence: Evidence) -> Judgement:
    """By how much more two blocks a stage gain than three."""
    scores, verdicts, lines, sets = evidence.scores.get('table1', {}), [], [], []
    for dataset in DATASETS:
        rows = [scores.get((model, dataset), []) for model in ('rn26_tm', 'rn26', 'rn38_tm', 'rn38')]
        if all(rows):
            ours, baseline, deep, deep_baseline = rows
            gain = Difference.of_runs([ours, deep_baseline], [baseline, deep])
            sets.append(dataset)
            verdicts.append(gain.verdict)
            lines.append(f'{DATASET_NAMES[dataset]}: {gain} points{say_p(gain)}')
    gains = zip(DATASETS, *(
        [a - b for a, b in zip(TABLE_1[f'{model}_tm'][1:], TABLE_1[model][1:])] for model in ('rn26', 'rn38')))
    exceptions = [
        f'{DATASET_NAMES[dataset]} ({shallow:+.2f} and {deep:+.2f})'
        for dataset, shallow, deep in gains if shallow <= deep]
    return say_epochs(combine_all(verdicts), evidence, 'table1', sets), [*lines, *tell_exceptions(exceptions)]


def judge_depth(evidence: Evidence, better: str, worse: str, within_margin: bool = False) -> Judgement:
    def count_runs(experiment: str) -> int:
        scores = evidence.scores.get(experiment, {})
        return sum(len(scores.get((row, dataset), ())) for row in (better, worse) for dataset in DATASETS)

    experiment = max(('table1', 'depth'), key=count_runs)  # both have these rows, by one protocol
    verdict, lines = judge_rows(evidence, experiment, [(better, worse)], within_margin=within_margin)
    return verdict, [*lines, *find_exceptions([(better, worse)], MARGIN if within_margin else 0.)]


def judge_weight(evidence: Evidence, others: Sequence[str]) -> Judgement:
    return judge_rows(evidence, 'lambda', [('lambda0.5', other) for other in others])


def judge_soft_maximizers(evidence: Evidence) -> Judgement:
    """Softmax at both batch sizes and the perturbed one at 8, no more than MARGIN below; the paper has none at 32."""
    pairs = [(f'{kind}.batch{n}', f'bn_relu.batch{n}') for kind, n in (
        ('softmax', 8), ('softmax', 32), ('perturbed', 8))]
    verdict, lines, sets = compare_rows(evidence, 'maximizers', pairs, within_margin=True)
    scores = evidence.scores.get('maximizers', {})
    complete = all(any({(a, d), (b, d)} <= set(scores) for d in DATASETS) for a, b in pairs)
    if verdict == HOLDS and not complete:
        verdict = UNDECIDED
    return say_epochs(verdict, evidence, 'maximizers', sets), lines


def judge_constants(evidence: Evidence) -> Judgement:
    """Of one network, which must be trained by the protocol: another recipe gives others."""
    measured = evidence.maximizer
    if measured is None:
        return UNTESTED, []
    near = {key: abs(measured[key] / measured['paper'][key] - 1) <= 0.25 for key in ('mu', 'eta')}
    words = ', and '.join(
        f'{symbol} = {measured[key]:.{digits}f}, {"" if near[key] else "not "}within 25 % of the claimed value'
        for key, symbol, digits in (('mu', 'μ', 2), ('eta', 'η', 1)))
    if not measured['by_protocol']:
        return UNTESTED, [
            f"these are numbers of one network, and none was trained by the paper's recipe; one after "
            f'{measured["epochs"]} epochs of {measured["opt"].capitalize()} has {words}']
    early = f', after {measured["epochs"]} epochs' if measured['epochs'] < measured['planned'] else ''
    verdict = f'{HOLDS if all(near.values()) else FAILS} (one network tested{early})'
    mu, eta = (sorted(measured[f'layer_{key}'].values()) for key in ('mu', 'eta'))
    return verdict, [
        f'one network after {measured["epochs"]} epochs by the protocol as we read it, on '
        f'{measured["images"]:,} images, most of which it was trained on, has {words}; in its layers μ is {mu[0]:.2f} '
        f'to {mu[-1]:.2f} and η {eta[0]:.1f} to {eta[-1]:.1f}; in the last epoch {measured["train_top1"]:.1f} % of its '
        f'training images were right']


def say_of(verdict: str, networks: int) -> str:
    """A verdict with the number of networks it rests on, each trained once."""
    if networks == 1 and verdict in (HOLDS, FAILS):
        return f'{verdict} (one network tested)'
    return f'{verdict} ({networks} networks tested)' if verdict == HOLDS else verdict


def name_layers(analysis: Dict[str, Any]) -> Dict[str, str]:
    """The name of each embedding by that without the network's; of a baseline 'baseline NAME'."""
    found = {}
    baseline = str(analysis['settings'].get('baseline'))
    networks = (baseline, name_network(baseline))
    for name in analysis['spaces']:
        network, _, layer = name.rpartition(': ')
        found[f'baseline {layer}' if network and network in networks else layer] = name
    return found


def compare_spaces(analysis: Dict[str, Any], ours: str, other: str, key: str) -> Difference:
    """Of a measure of two embeddings, paired by image."""
    leads = analysis['leads']
    sign, lead = (1, leads[ours][other]) if other in leads.get(ours, {}) else (-1, leads[other][ours])
    return Difference(sign * lead[key], lead[f'{key}_error'])


def judge_spaces(
        evidence: Evidence,
        analyses: Dict[str, Dict[str, Any]],
        key: str,
        pairs: List[Tuple[str, str]],
        told: Dict[str, str],
        chance: str = '',
) -> Judgement:
    """Whether embeddings of the regions have more of a measure than others, in each network without a teacher, on the
    set of the paper's figures; others are told and not judged.

    Args:
        evidence: Says which these are.
        analyses: By tag, as train.analysis writes them.
        key: Of the measure.
        pairs: An embedding that is to have more, and one that is to have less.
        told: What to say of each embedding.
        chance: Label whose share by chance is told too.
    """
    verdicts: List[str] = []
    lines: Dict[str, List[str]] = {'': [], ELSEWHERE: [], TAUGHT: []}
    for tag, analysis in analyses.items():
        names = name_layers(analysis)
        if not set(told) <= set(names):
            continue
        found = {layer: analysis['spaces'][name] for layer, name in names.items()}
        if any(found[layer][key] is None for layer in told):  # a set without superclasses
            continue
        factor, digits, unit = (100, 1, ' %') if key.endswith('rate') else (1, 3, '')
        shares = [
            f'{factor * found[layer][key]:.{digits}f} ± {factor * found[layer][f"{key}_error"]:.{digits}f}{unit}{what}'
            for layer, what in told.items()]
        if chance:
            shares.append(f'{100 * analysis["chance"][chance]:.0f} % by chance')
        why = TAUGHT if tag in evidence.taught else ELSEWHERE if tag in evidence.elsewhere else ''
        lines[why].append(f'{tag}: {", ".join(shares)}')
        if not why:
            verdicts += [compare_spaces(analysis, names[a], names[b], key).verdict for a, b in pairs]
    judged = lines.pop('')
    return say_of(combine_all(verdicts), len(judged)), [
        *judged, *(line for why, others in lines.items() for line in introduce(why, others))]


def qualify(verdict: str, beside: str, control: str) -> str:
    """A verdict, and whether a control does as well: `beside` says whether it does less."""
    if not verdict.startswith(HOLDS) or beside.startswith(HOLDS):
        return verdict
    return f'{verdict}, but {control} {"does more" if beside.startswith(FAILS) else "may do as much"}'


OUTPUT = 'block output'
BEFORE = {
    OUTPUT: '', 'stage 3': ' at its input', 'baseline stage 3': ' in the baseline',
    'patch mean': ' at its input averaged over patches', 'baseline patch mean': ' in the baseline so averaged'}


def select_judged(evidence: Evidence, analyses: Dict[str, Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """Of networks without a teacher, on the set of the paper's figures."""
    return {tag: found for tag, found in analyses.items() if tag not in evidence.taught | evidence.elsewhere}


def judge_block_output(evidence: Evidence, label: str = 'class') -> Judgement:
    """By the neighbours of regions that have their class, at the output, its input and in the baseline."""
    def judge_against(*others: str) -> Judgement:
        pairs = [(OUTPUT, other) for other in others]
        return judge_spaces(evidence, analyses, f'{label}_neighbour_rate', pairs, BEFORE, label)

    analyses = {  # superclasses are animals and vehicles in CIFAR-10 alone
        tag: found for tag, found in evidence.geometry.items() if label == 'class' or tag not in evidence.elsewhere}

    verdict, lines = judge_against('stage 3', 'baseline stage 3')
    averages = [judge_against(other)[0] for other in ('patch mean', 'baseline patch mean')]
    if not averages[1].startswith(HOLDS):
        verdict = qualify(verdict, averages[1], 'averaging over patches alone, even in the baseline,')
    else:
        verdict = qualify(verdict, averages[0], 'averaging over patches alone')
    silhouettes = judge_spaces(evidence, select_judged(evidence, analyses), f'{label}_silhouette', [], BEFORE)[1]
    return verdict, [
        *introduce(f'{NEAREST[label]}, at the output', lines),
        *introduce(f'silhouettes of the {label}es, at the output', silhouettes)]


def judge_value_vectors(evidence: Evidence) -> Judgement:
    """By what the output has without them, and what they have beside the patch mean; class scores are a control."""
    analyses = {
        tag: dict(found, **{key: {**found[key], **evidence.mosaic[tag][key]} for key in ('spaces', 'leads')})
        for tag, found in evidence.geometry.items() if tag in evidence.mosaic}
    told = {
        OUTPUT: '',
        'shortcut': ' without them (in the projected input)',
        'values': ' in the mixture of value vectors alone',
        'patch mean': ' in the mean of the input over patches (no template)',
        'value embeddings': ' in the mixture at 2 regions of an image (as in our Figure 6)',
        'class scores': ' in the class scores there'}

    def judge_pairs(*pairs: Tuple[str, str]) -> Judgement:
        return judge_spaces(evidence, analyses, 'class_neighbour_rate', [*pairs], told)

    verdict, lines = judge_pairs((OUTPUT, 'shortcut'), ('values', 'patch mean'))
    verdict = qualify(verdict, judge_pairs(('value embeddings', 'class scores'))[0], 'comparing class scores alone')
    silhouettes = judge_spaces(evidence, select_judged(evidence, analyses), 'class_silhouette', [], told)[1]
    return verdict, [
        *introduce(f'{NEAREST["class"]}, at the output', lines),
        *introduce('silhouettes of the classes, at the output', silhouettes)]


def judge_values(evidence: Evidence) -> Judgement:
    """By the neighbours of other classes; the silhouette of superclasses grows with the separation of classes too."""
    told = {'value embeddings': '', 'class scores': ' by scores'}
    verdict, lines = judge_spaces(
        evidence, evidence.mosaic, 'superclass_neighbour_rate', [('value embeddings', 'class scores')], told,
        'superclass')
    silhouettes = judge_spaces(
        evidence, select_judged(evidence, evidence.mosaic), 'superclass_silhouette', [], told)[1]
    return verdict, [
        *introduce(f'{NEAREST["superclass"]}, by values', lines),
        *introduce('silhouettes of the superclasses, by values', silhouettes)]


def adds_values(model: str) -> bool:
    """Whether a network adds value vectors; where they are concatenated, a norm follows, which undoes their scale."""
    return '_cat' not in model


def judge_mixing(evidence: Evidence) -> Judgement:
    """By the regions whose best match has the largest weight in the mixture, too: most of them."""
    verdicts: List[str] = []
    lines: List[str] = []
    others: List[str] = []
    for tag, found in sorted(evidence.mixing.items(), key=lambda item: item[1]['agreement']):
        share, error = (100 * found[key] for key in ('agreement', 'agreement_error'))
        (others if tag in evidence.taught else lines).append(f'{share:.1f} ± {error:.1f} % ({tag})')
        if tag not in evidence.taught:
            verdicts.append(Difference(share - 50, error).verdict)
    judged, taught = len(lines), [', '.join(others)] if others else []
    if judged > 2:
        images = say_counts(found['images'] for tag, found in evidence.mixing.items() if tag not in evidence.taught)
        lines = [f'{lines[0]} to {lines[-1]}, in {judged} networks, {images} images each']
    for key, factor, digits, unit, what in (
            ('matched_off', 100, 1, ' %', 'regions where the weight of the best match is 0'),
            ('matched_share', 100, 0, ' %', 'its share of the sum of the weights'),
            ('value_spread', 1, 2, '',
             'standard deviation of the mixture over regions, relative to that of what it is added to')):
        ordered = sorted(
            (factor * found[key], tag) for tag, found in evidence.mixing.items()
            if tag not in evidence.taught and (key != 'value_spread' or adds_values(evidence.runs[tag]['model'])))
        ends = [f'{value:.{digits}f}{unit} ({tag})' for value, tag in (ordered[0], ordered[-1])] if ordered else []
        lines += introduce(what, [' to '.join(dict.fromkeys(ends))] if ends else [])
    if judged:
        lines.append("partly built in: where the scale of a class's norm is positive, its weight rises with its score")
    return say_of(combine_all(verdicts), judged), introduce(
        'regions whose best match has the largest weight in the mixture', [*lines, *introduce(TAUGHT, taught)])


def judge_words(evidence: Evidence) -> Judgement:
    if not evidence.words:
        return UNTESTED, []
    shares = [
        f'{100 * found["mixed_words"]:.0f} % of {found["settings"]["words"]} visual words, holding '
        f'{100 * found["mixed_patches"]:.0f} % of the patches ({tag})' for tag, found in evidence.words.items()]
    return UNTESTED, [f'no class has half of the score in {", ".join(shares)}; what they show has not been labelled']


def judge(evidence: Evidence) -> List[Claim]:
    """Every claim of the paper with its verdict."""
    def judge_most(better: str, worse: str) -> Judgement:
        verdict, lines = judge_rows(evidence, 'table1', [(better, worse)], combine_most)
        return verdict, [*lines, *find_exceptions([(better, worse)])]

    weights = sorted({setting for setting, _ in evidence.scores.get('lambda', {})} - {'lambda0.5'})
    found = [
        ('Template matching improves the baselines', '4.2, Table 1', judge_baselines(evidence)),
        ('It is not the additional parameters that improve them', '4.2', (UNTESTED, [])),
        ('Template matching improves shallow networks more (here: RN26 more than RN38)', '4.2, Table 1',
         judge_shallow(evidence)),
        ('It does more than auxiliary supervision alone', '4.2, Table 1', judge_supervision(evidence)),
        ('Two blocks a stage with it mostly beat three without', '4.2, Table 1',
         judge_most('rn26_tm', 'rn38')),
        ('In DenseNet, concatenation is marginally above addition (here: mostly)', '4.2, Table 1',
         judge_most('dn100_tm_cat', 'dn100_tm')),
        ('Template matching gains from depth', '4.1', judge_depth(evidence, 'rn38_tm', 'rn26_tm')),
        ('With less depth it is on par with the deeper baseline (here: RN26-Ours no more than '
         f'{MARGIN:g} point below RN38)', '4.1', judge_depth(evidence, 'rn26_tm', 'rn38', within_margin=True)),
        ('λ = 0.5 is best', '4.1, Figure 4', judge_weight(evidence, weights)),
        ('Without the patch loss it is worse (λ = 0 than λ = 0.5)', '4.1, Figure 4',
         judge_weight(evidence, ['lambda0'])),
        (f'Soft maximizers do as well as BN-ReLU (no more than {MARGIN:g} point below it)', '4.1, Figure 3',
         judge_soft_maximizers(evidence)),
        ('A trained RN20 has μ = 2.5 and η = 17 (here: within 25 %)', '4.1', judge_constants(evidence)),
        ("Features are clustered by meaning at the block's output, not before it nor in the baseline (here: compared "
         'with single positions there)',
         '4.3, Figure 5', judge_block_output(evidence)),
        ("Animals lie apart from vehicles at the block's output (here: more than single positions at its input and in "
         'the baseline)', '4.3, Figure 5',
         judge_block_output(evidence, 'superclass')),
        ('The value vectors cluster them (here: the output is more clustered than without them, and they alone more '
         'than the patch mean)',
         '4.3, Figure 5', judge_value_vectors(evidence)),
        ('Value embeddings bring patches of like meaning together that class scores keep apart (here: neighbours of '
         'other classes are more often of the superclass)',
         '4.3, Figure 6', judge_values(evidence)),
        ('Combinations of classes represent new concepts, such as wings and tyres', '4.3, Figure 7',
         judge_words(evidence)),
        ('The classes that match a patch most are selected for its embedding (here: the best one, in most regions)',
         '5', judge_mixing(evidence)),
    ]
    return [Claim(text, section, verdict, lines) for text, section, (verdict, lines) in found]
