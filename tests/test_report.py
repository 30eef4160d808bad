"""Pages of results: none is stale, and verdicts are those that the numbers give by hand."""
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, sem, ttest_ind
from scipy.stats import t as student

from timm_tmblock.errors import InputError
from train import report
from train.claims import UNTESTED, combine_all, combine_most, judge
from train.comparison import FAILS, HOLDS, UNDECIDED, Difference, compare_others, find_recipe
from train.evidence import Evidence
from train.lineage import count_epochs, count_taught_epochs, find_fillings
from train.maps import compare_maps, find_p, say_fillings

ROOT = Path(__file__).parent.parent


def verdicts(**kwargs):
    fields = dict(scores={}, evaluations={}, runs={})
    claims = judge(Evidence(**{**fields, **kwargs}))
    return {claim.text: (claim.verdict, '; '.join(claim.evidence) or '–') for claim in claims}


def test_committed_pages_are_those_of_the_committed_results():
    report.main(['--check'])


def test_runs_are_compared_as_by_the_t_test_of_scipy():
    many = Difference.of_runs([[90., 92., 94.]], [[87., 88., 89.]])
    assert many.points == pytest.approx(4) and many.error == pytest.approx(math.sqrt(4 / 3 + 1 / 3))
    rng, decided = np.random.default_rng(0), []
    for _ in range(50):
        a, b = (list(90 + rng.normal(loc, scale, n)) for loc, scale, n in ((0.5, 0.2, 3), (0, 0.4, 5)))
        found, expected = Difference.of_runs([a], [b]), ttest_ind(a, b, equal_var=False)
        low, high = expected.confidence_interval(0.95)
        assert found.points - found.errors * found.error == pytest.approx(low)
        assert found.points + found.errors * found.error == pytest.approx(high)
        assert found.p == pytest.approx(expected.pvalue)
        decided.append(found.verdict)
        assert decided[-1] == (UNDECIDED if expected.pvalue >= 0.05 else HOLDS if expected.statistic > 0 else FAILS)
    assert {HOLDS, UNDECIDED} <= set(decided)


@pytest.mark.parametrize('a, b, told', [
    ([95.], [90.], '+5.00'), ([95., 95.1], [90.], '+5.05'), ([95., 95.2], [90., 90.2], '+5.00 ± 0.14'),
    ([95., 95., 95.], [90., 90., 90.], '+5.00 ± 0.00')])
def test_too_few_runs_and_copies_decide_nothing(a, b, told):
    assert Difference.of_runs([a], [b]).verdict == UNDECIDED and str(Difference.of_runs([a], [b])) == told


def test_gains_are_compared_by_the_spread_of_all_runs():
    rows = [[90., 91., 92.], [88., 88.5, 89.], [85., 85.2, 85.1], [84., 84., 84.6]]
    ours, baseline, deep, deep_baseline = rows
    gain = Difference.of_runs([ours, deep_baseline], [baseline, deep])
    parts = [np.var(row, ddof=1) / 3 for row in rows]
    assert gain.points == pytest.approx(2.5 - 0.9) and gain.error == pytest.approx(sum(parts) ** 0.5)
    freedom = sum(parts) ** 2 / sum(part ** 2 / 2 for part in parts)  # Welch and Satterthwaite
    assert gain.errors == pytest.approx(student.ppf(0.975, freedom))


def test_images_are_compared_one_by_one_where_the_answers_are_known():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 1003)) < [[0.9], [0.8]]
    ours, theirs = (dict(top1=100 * x.mean(), images=1003) for x in (a, b))
    unpaired = Difference.of_images(ours, theirs)
    assert unpaired.error == pytest.approx(100 * math.sqrt((a.var() + b.var()) / 1003))
    known = [dict(e, right=np.packbits(x).tobytes().hex(), targets_sha256='0') for e, x in ((ours, a), (theirs, b))]
    paired = Difference.of_images(*known)
    differences = 100 * (a.astype(float) - b)
    assert paired.points == unpaired.points == pytest.approx(differences.mean())
    assert paired.error == pytest.approx(differences.std() / math.sqrt(1003))
    assert Difference.of_images(known[0], theirs) == unpaired
    for other in (dict(known[1], targets_sha256='1'), {k: v for k, v in known[1].items() if k != 'targets_sha256'}):
        assert Difference.of_images(known[0], other) == unpaired  # of a copy in another order
    assert paired.verdict == UNDECIDED  # of one run each


def test_runs_of_fewer_epochs_than_the_protocol_say_so():
    table = {('rn26', 'cifar10'): [89., 89.1, 89.2], ('rn26_tm', 'cifar10'): [91., 91.1, 91.2],
             ('rn26_aux', 'cifar10'): [91.1, 91.2, 91.]}
    found = verdicts(scores=dict(table1=table), short={('table1', 'cifar10'): 40})
    assert found['Template matching improves the baselines'][0] == 'holds after 40 epochs'
    told = found['It does more than auxiliary supervision alone']
    assert told[0] == UNDECIDED and told[1].endswith(', by itself: holds after 40 epochs')
    assert ' runs, p = ' in told[1]
    assert verdicts(scores=dict(table1=table), short={('depth', 'cifar10'): 40})[
        'Template matching improves the baselines'][0] == HOLDS
    both = {**table, **{(row, 'cifar100'): runs for (row, _), runs in table.items()}}
    verdict, told = verdicts(scores=dict(table1=both), short={('table1', 'cifar10'): 40})[
        'Template matching improves the baselines']
    assert verdict == 'holds after 40 epochs'
    short, full = told.split('; ')[:2]
    assert short.endswith(', by itself: holds after 40 epochs') and full.endswith(', by itself: holds')


def test_two_standard_errors_decide():
    assert Difference(1.9, 1.).verdict == Difference(-1.9, 1.).verdict == UNDECIDED
    assert Difference(2.1, 1.).verdict == HOLDS and Difference(-2.1, 1.).verdict == FAILS


def test_errors_of_both_gains_decide_which_is_larger():
    def judge_with(spread):
        scores = {('rn26', 'cifar10'): [88., 88.1, 88.2], ('rn26_tm', 'cifar10'): [91., 91.1, 91.2],
                  ('rn38', 'cifar10'): [89. - spread, 89., 89. + spread], ('rn38_tm', 'cifar10'): [89., 89.1, 89.2]}
        claims = verdicts(scores=dict(table1=scores))
        return next(found for text, found in claims.items() if 'shallow networks' in text)

    assert judge_with(0.)[0] == HOLDS and judge_with(3.)[0] == UNDECIDED  # only the deeper baseline is uncertain


def test_several_tests_of_a_claim():
    assert combine_all([]) == combine_most([]) == UNTESTED
    assert combine_all([HOLDS, HOLDS]) == HOLDS and combine_all([HOLDS, UNDECIDED]) == UNDECIDED
    assert combine_all([HOLDS, UNDECIDED, FAILS]) == FAILS
    assert combine_most([HOLDS, HOLDS, FAILS]) == HOLDS and combine_most([FAILS, FAILS, HOLDS]) == FAILS
    assert combine_most([HOLDS, FAILS]) == combine_most([HOLDS, UNDECIDED]) == UNDECIDED


def test_without_results_nothing_is_tested():
    assert {verdict for verdict, _ in verdicts().values()} == {UNTESTED}


EXCEPTION = "exceptions in the paper's own table: DN100-Ours against DN100, CIFAR-100 (-0.40)"


def test_claims_of_table_1():
    def judge_without_p(**kwargs):
        found = verdicts(**kwargs)
        return {text: (verdict, re.sub(', p = [^)]+', '', told)) for text, (verdict, told) in found.items()}

    def runs(first):
        return [first, first + 0.1, first + 0.2]

    table = {('rn26', 'cifar10'): runs(89.), ('rn26_tm', 'cifar10'): runs(91.), ('rn38', 'cifar10'): runs(92.),
             ('rn26_aux', 'cifar10'): runs(91.1)}
    found = judge_without_p(scores=dict(table1=table))
    assert found['Template matching improves the baselines'] == (
        HOLDS, f'RN26-Ours against RN26, CIFAR-10: +2.00 ± 0.08 points (3 and 3 runs); {EXCEPTION}')
    assert found['Two blocks a stage with it mostly beat three without'][0] == FAILS
    small = {('wrn16', 'cifar10'): runs(91.), ('wrn16_tm', 'cifar10'): runs(91.1)}
    assert judge_without_p(scores=dict(table1={**table, **small}))[
        'Template matching improves the baselines'] == (UNDECIDED, (  # it improves one of two
            f'RN26-Ours against RN26, CIFAR-10: +2.00 ± 0.08 points (3 and 3 runs), by itself: holds; WRN16-Ours '
            f'against WRN16, CIFAR-10: +0.10 ± 0.08 points (3 and 3 runs), by itself: undecided; {EXCEPTION}'))
    assert found['It does more than auxiliary supervision alone'] == (UNDECIDED, (
        'RN26-Ours against RN26-aux, CIFAR-10: -0.10 ± 0.08 points (3 and 3 runs); RN26-aux against RN26, CIFAR-10: '
        '+2.10 ± 0.08 points (3 and 3 runs), by itself: holds'))
    both = {**table, **{(row, 'cifar100'): runs(top1) for row, top1 in (('rn26', 60.), ('rn26_aux', 60.1))}}
    told = judge_without_p(scores=dict(table1=both))['It does more than auxiliary supervision alone'][1]
    assert re.findall(r'RN26-aux against RN26, (\S+): [^;]+ \(3 and 3 runs\), by itself: (\w+)(?:;|$)', told) == [
        ('CIFAR-10', 'holds'), ('CIFAR-100', 'undecided')]
    assert found['Template matching gains from depth'] == (UNTESTED, '–')
    table.update({('rn38_tm', 'cifar10'): runs(92.)})
    found = judge_without_p(scores=dict(table1=table, depth={('rn26', 'cifar10'): [89.]}))
    assert found['Template matching gains from depth'] == (
        HOLDS, 'RN38-Ours against RN26-Ours, CIFAR-10: +1.00 ± 0.08 points (3 and 3 runs)')


@pytest.mark.parametrize('top1, verdict', [
    ({'0': 85., '0.5': 91., '0.9': 88.}, HOLDS), ({'0': 85., '0.25': 91.1, '0.5': 91.}, UNDECIDED),
    ({'0': 85., '0.25': 92.5, '0.5': 91.}, FAILS)])
def test_best_weight_is_above_each_of_the_others(top1, verdict):
    weights = {(f'lambda{w}', 'cifar10'): [value, value + 0.1, value + 0.2] for w, value in top1.items()}
    assert verdicts(scores={'lambda': weights})['λ = 0.5 is best'][0] == verdict


@pytest.mark.parametrize('top1, verdict', [
    ([88.2, 88.1, 88., 88.3], HOLDS), ([88.2, 88.1, 88.], HOLDS), ([88.2, 88.1, 88., 80.], HOLDS),
    ([88.2, 80., 88., 88.3], FAILS),
    ([88.2, 87.2, 88., 88.3], UNDECIDED), ([88.2, 88.1], UNDECIDED)])
def test_soft_maximizers_do_as_well_within_a_margin(top1, verdict):
    names = ('softmax.batch8', 'softmax.batch32', 'perturbed.batch8', 'perturbed.batch32')
    top1 = dict(zip(names, top1), **{f'bn_relu.batch{n}': 88. for n in (8, 32)})
    soft = {(name, 'cifar10'): [value, value + 0.1, value + 0.2] for name, value in top1.items()}
    claim = 'Soft maximizers do as well as BN-ReLU (no more than 1 point below it)'
    assert verdicts(scores=dict(maximizers=soft))[claim][0] == verdict
    # so far apart that nothing is known
    few = {key: [85., 60., 70.] if 'softmax' in key[0] else [88., 80., 84.] for key in soft}
    assert verdicts(scores=dict(maximizers=few))[claim][0] == UNDECIDED


def test_networks_of_one_recipe_are_compared():
    def run(model, processes=1, best=None, epochs=13, **settings):
        common = dict(opt='muon', lr=0.1, batch_size=64, val_fraction=0, experiment=model)
        return dict(model=model, dataset='hfds/uoft-cs/cifar10', epochs=epochs, processes=processes, best=best,
                    settings=dict(common, **settings))

    names = ('rn26.cifar10', 'rn26_tm.cifar10', 'wrn16.cifar10')
    evaluations = {tag: dict(top1=top1, images=10000, split='test', dataset=dataset) for tag, top1, dataset in zip(
        names, (91., 93., 94.), ('hfds/uoft-cs/cifar10', 'hfds/../data/cifar10', 'hfds/uoft-cs/cifar10'))}
    runs = {tag: run(tag.partition('.')[0]) for tag in evaluations}
    claim = 'Template matching improves the baselines'

    def compare(**kwargs):
        return verdicts(**dict(dict(evaluations=evaluations, runs=runs), **kwargs))[claim]

    verdict, evidence = compare()
    assert verdict == UNDECIDED and 'wrn16' not in evidence
    alone = 'with other recipes, one run each, ± over test images: '
    assert f'{alone}+2.00 ± 0.38 (rn26_tm.cifar10) points, 1 in all' in evidence
    protocol = dict(table1={('rn26', 'cifar10'): [90., 90.1, 90.2], ('rn26_tm', 'cifar10'): [88., 88.1, 88.2]})
    decided, both = compare(scores=protocol)
    assert decided == FAILS and 'RN26-Ours against RN26, CIFAR-10: -2.00' in both
    assert evidence.partition('; ')[2] in both

    def compare_with(baseline):
        return compare(runs={**runs, 'rn26.cifar10': baseline})

    assert compare_with(run('rn26', val_fraction=0.1, val_split='validation'))[0] == UNDECIDED  # all images, too
    assert compare_with(run('rn26', processes=2, batch_size=32))[0] == UNDECIDED  # as many images an update
    assert compare_with(run('rn26', grad_accum_steps=2, batch_size=32))[0] == UNDECIDED
    assert find_recipe(run('rn26', kd_checkpoint='x')) == find_recipe(run('rn26', kd_checkpoint=['x']))
    on_test = dict(val_split='test', val_fraction=0.1)
    assert compare_with(run('rn26', best=dict(epoch=12), **on_test))[0] == UNDECIDED  # and those are the last weights
    others = [run('rn26', best=dict(epoch=11), **on_test), run('rn26', best=dict(epoch=1), val_split='train+test[:9]'),
              run('rn26', processes=2), run('rn26', grad_accum_steps=2), run('rn26', val_fraction=None),
              run('rn26', epochs=14)]
    for settings in (dict(opt='sgd'), dict(mixup=0.2), dict(initial_checkpoint='x'), dict(kd_checkpoint='x'),
                     dict(aa='trivial'), dict(weight_decay=0.1), dict(drop=0.1), dict(pretrained=True), dict(seed=1)):
        others.append(run('rn26', **settings))
    for other in others:
        assert compare_with(other) == (UNTESTED, EXCEPTION)
    for key, value in (('split', 'train'), ('dataset', 'hfds/uoft-cs/cifar100')):
        moved = {**evaluations, 'rn26.cifar10': dict(evaluations['rn26.cifar10'], **{key: value})}
        assert compare(evaluations=moved) == (UNTESTED, EXCEPTION)

    for tag, top1 in (('rn26_tm.longer', 93.5), ('rn26.longer', 93.4)):
        model = tag.partition('.')[0]
        evaluations[tag] = dict(evaluations['rn26.cifar10'], top1=top1)
        runs[tag] = run(
            model, epochs=5, lr=0.05, experiment='longer', initial_checkpoint=f'output/{model}/last.safetensors')
    found = compare_others(Evidence({}, evaluations, runs))
    assert [(c.tag, c.baseline, c.epochs) for c in found] == [
        ('rn26_tm.cifar10', 'rn26.cifar10', 13), ('rn26_tm.longer', 'rn26.longer', 18)]
    assert (
        f'{alone}+0.10 ± 0.35 (rn26_tm.longer) points, 1 in all; +0.10 ± 0.35 '
        '(rn26_tm.longer) to +2.00 ± 0.38 (rn26_tm.cifar10) points with earlier phases, 2 in all') in compare()[1]
    assert (  # the last of a pair is the last without a teacher
        f'{alone}+2.00 ± 0.38 (rn26_tm.cifar10) points, 1 in all; +0.10 ± 0.35 (rn26_tm.longer) points where both had '
        f'a teacher (') in compare(taught={'rn26_tm.longer', 'rn26.longer'})[1]
    taught = compare(taught=set(runs))[1]
    assert f'{alone}+0.10 ± 0.35 (rn26_tm.longer) to +2.00 ± 0.38 (rn26_tm.cifar10) points where both had' in taught
    assert 'longer' not in compare_with(run('rn26', opt='sgd'))[1]  # which trained the first 13 of them
    evaluations['rn26.cifar10']['images'] = evaluations['rn26_tm.longer']['images'] = 500
    assert compare() == (UNTESTED, EXCEPTION)


def space(value, *keys, error=0.01):
    return {name: number for key in keys for name, number in ((key, value), (f'{key}_error', error))}


def compare_all(spaces):
    """Leads with an error that two spaces of images of their own would have."""
    keys = [key for key in next(iter(spaces.values())) if not key.endswith('_error')]
    names = list(spaces)
    return {
        ours: {other: {k: v for key in keys for k, v in space(
            spaces[ours][key] - spaces[other][key], key, error=0.014).items()} for other in names[:i]}
        for i, ours in enumerate(names)}


CLUSTERED = ("Features are clustered by meaning at the block's output, not before it nor in the baseline (here: "
             'compared with single positions there)')


def make_geometry(output, shortcut=0.2, model='rn26_tm', mean=0.3):
    keys = [f'{label}_{measure}' for label in ('class', 'superclass') for measure in ('neighbour_rate', 'silhouette')]
    layers = {'stage 3': 0.2, 'patch mean': mean, 'shortcut': shortcut, 'values': 0.9, 'block output': output}
    spaces = {f'{model}: {layer}': space(value, *keys) for layer, value in layers.items()}
    spaces = {'rn26: stage 3': space(0.15, *keys), 'rn26: patch mean': space(0.25, *keys), **spaces}
    return dict(
        settings=dict(model=model, baseline='rn26'), chance={'class': 0.1, 'superclass': 0.5}, spaces=spaces,
        leads=compare_all(spaces))


@pytest.mark.parametrize('output, verdict', [(0.6, HOLDS), (0.3, HOLDS), (0.22, UNDECIDED), (0.1, FAILS)])
def test_neighbours_at_the_output_of_the_block(output, verdict):
    found = verdicts(geometry={'rn26_tm.a': make_geometry(output)})[CLUSTERED]
    scope = '' if verdict == UNDECIDED else ' (one network tested)'
    if output == 0.3:
        scope += ', but averaging over patches alone may do as much'
    assert found == (verdict + scope, (
        f'nearest neighbours of the class, at the output: rn26_tm.a: {100 * output:.1f} ± 1.0 %, 20.0 ± 1.0 % at its '
        f'input, 15.0 ± 1.0 % in the baseline, 30.0 ± 1.0 % at its input averaged over patches, 25.0 ± 1.0 % in the '
        f'baseline so averaged, 10 % by chance; silhouettes of the classes, at the output: rn26_tm.a: {output:.3f} ± '
        f'0.010, 0.200 ± 0.010 at its input, 0.150 ± 0.010 in the baseline, 0.300 ± 0.010 at its input averaged over '
        f'patches, 0.250 ± 0.010 in the baseline so averaged'))
    both = {'rn26_tm.a': make_geometry(output), 'rn26_tm.b': make_geometry(0.21, model='rn26_tm.b')}
    together = verdicts(geometry=both)[CLUSTERED]
    assert together[0] == (FAILS if verdict == FAILS else UNDECIDED) and '; rn26_tm.b: 21.0 ± 1.0 %, ' in together[1]
    for aside, why in (('taught', 'with a teacher, so not judged'), (
            'elsewhere', 'on another set than the figure, so not judged')):
        alone, beside = verdicts(geometry=both, **{aside: {'rn26_tm.b'}})[CLUSTERED]
        rates = together[1].partition('; silhouettes')[0].replace('rn26_tm.b', f'{why}: rn26_tm.b')
        assert (alone, beside) == (verdict + scope, f'{rates}; silhouettes{found[1].partition("; silhouettes")[2]}')
    uncertain = make_geometry(output)
    lead = uncertain['leads']['rn26_tm: block output']['rn26: stage 3']
    lead['class_neighbour_rate_error'] = 0.5  # of the baseline alone
    assert verdicts(geometry={'rn26_tm.a': uncertain})[CLUSTERED][0] == (
        f'{FAILS} (one network tested)' if verdict == FAILS else UNDECIDED)
    of_files = make_geometry(output, model='a.best')  # spaces have the names of runs
    of_files['settings'].update(model='output/a/best.safetensors', baseline='output/b/last.safetensors')
    of_files['spaces'] = {name.replace('rn26:', 'b.last:'): x for name, x in of_files['spaces'].items()}
    of_files['leads'] = compare_all(of_files['spaces'])
    assert verdicts(geometry={'rn26_tm.a': of_files})[CLUSTERED] == found
    animals = verdicts(geometry={'rn26_tm.a': make_geometry(output)})[
        "Animals lie apart from vehicles at the block's output (here: more than single positions at its input and in "
        'the baseline)']
    assert animals[0] == verdict + scope and '50 % by chance; silhouettes of the superclasses' in animals[1]


@pytest.mark.parametrize('shortcut, mean, verdict', [
    (0.2, 0.3, HOLDS), (0.61, 0.3, UNDECIDED), (0.8, 0.3, FAILS), (0.2, 0.7, HOLDS), (0.2, 0.91, UNDECIDED),
    (0.2, 0.95, FAILS)])
def test_value_vectors_cluster_what_is_not_clustered_without_them_nor_by_averaging(shortcut, mean, verdict):
    claim, = (text for text in verdicts() if text.startswith('The value vectors cluster them'))

    def judge_beside(scores):
        keys = [f'{label}_{key}' for label in ('class', 'superclass') for key in ('neighbour_rate', 'silhouette')]
        spaces = {name: space(value, *keys) for name, value in (
            ('value embeddings', 0.8), ('class scores', scores))}
        mosaic = dict(settings={}, spaces=spaces, leads=compare_all(spaces), chance={'superclass': 0.47})
        return verdicts(geometry={'rn26_tm.a': geometry}, mosaic={'rn26_tm.a': mosaic})[claim]

    geometry = make_geometry(0.6, shortcut, mean=mean)
    found = judge_beside(0.7)
    assert found[0].removesuffix(' (one network tested)') == verdict and (
        f'90.0 ± 1.0 % in the mixture of value vectors alone, {100 * mean:.1f} ± 1.0 % in the mean' in found[1])
    for scores, said in ((0.81, 'may do as much'), (0.9, 'does more')):  # the scores that weight them
        more = f', but comparing class scores alone {said}' if verdict == HOLDS else ''
        assert judge_beside(scores)[0] == found[0] + more
    del geometry['spaces']['rn26_tm: shortcut']
    assert judge_beside(0.7) == verdicts(geometry={'rn26_tm.a': geometry})[claim] == (UNTESTED, '–')


@pytest.mark.parametrize('values, verdict', [(0.3, HOLDS), (0.11, UNDECIDED), (0.01, FAILS)])
def test_value_embeddings_against_class_scores(values, verdict):
    spaces = {name: space(value, 'superclass_silhouette', 'superclass_neighbour_rate') for name, value in (
        ('value embeddings', values), ('class scores', 0.1))}
    claim, = (text for text in verdicts() if text.startswith('Value embeddings bring patches of like meaning together'))
    verdict += '' if verdict == UNDECIDED else ' (one network tested)'
    mosaic = dict(settings={}, spaces=spaces, leads=compare_all(spaces), chance={'superclass': 0.47})
    assert verdicts(mosaic={'rn26_tm.a': mosaic})[claim] == (
        verdict, f'nearest neighbours of other classes that are of the superclass, by values: rn26_tm.a: '
        f'{100 * values:.1f} ± 1.0 %, 10.0 ± 1.0 % by scores, 47 % by chance; silhouettes of the superclasses, by '
        f'values: rn26_tm.a: {values:.3f} ± 0.010, 0.100 ± 0.010 by scores')


@pytest.mark.parametrize('shares, verdict', [
    ([0.9], HOLDS), ([0.51], UNDECIDED), ([0.2], FAILS), ([0.9, 0.2], FAILS), ([0.9, 0.51], UNDECIDED)])
def test_best_match_is_to_have_the_largest_weight_in_most_regions_of_each_network(shares, verdict):
    def mix(share, spread=0.3):
        return dict(
            agreement=share, agreement_error=0.01, matched_share=share / 2, matched_off=spread / 2, value_spread=spread,
            images=2000)

    mixing = {f'rn26_tm.{i}': mix(share) for i, share in enumerate(shares)}
    runs = {tag: dict(model=tag.partition('.')[0]) for tag in (*mixing, 'a', 'b', 'dn100_tm_cat.a')}
    claim, = (text for text in verdicts() if text.startswith('The classes that match a patch most'))
    found = verdicts(mixing=mixing, runs=runs)[claim]
    scope = {1: ' (one network tested)', 2: ' (2 networks tested)', 3: ' (3 networks tested)'}
    judged = verdict == HOLDS or verdict == FAILS and len(shares) == 1
    assert found[0] == (verdict + scope[len(shares)] if judged else verdict)
    assert f'{100 * shares[0]:.1f} ± 1.0 % (rn26_tm.0)' in found[1]
    mixing.update(a=mix(0.95, 0.04), b=mix(0.1, 0.01))
    alone, beside = verdicts(mixing=mixing, runs=runs, taught={'b'})[claim]
    assert alone == (verdict + scope[len(shares) + 1] if verdict == HOLDS else verdict)
    assert beside.endswith('with a teacher, so not judged: 10.0 ± 1.0 % (b)')
    assert f' to {47.5:.0f} % (a)' in beside
    assert 'relative to that of what it is added to: 0.04 (a) to 0.30 (rn26_tm.' in beside
    assert '; regions where the weight of the best match is 0: 2.0 % (a) to 15.0 % (rn26_tm.' in beside
    mixing['dn100_tm_cat.a'] = mix(0.95, 5.)  # not added
    concatenated = verdicts(mixing=mixing, runs=runs, taught={'b'})[claim][1]
    assert 'to 250.0 % (dn100_tm_cat.a)' in concatenated and 'added to: 0.04 (a) to 0.30 (rn26_tm.' in concatenated


@pytest.mark.parametrize('deep, verdict', [(92., HOLDS), (93.4, UNDECIDED), (97., FAILS)])
def test_shallow_networks_gain_more(deep, verdict):
    top1 = dict(rn26=89., rn26_tm=91.5, rn38=91., rn38_tm=deep)
    table = {(model, 'cifar10'): value for model, value in top1.items()}
    claim = 'Template matching improves shallow networks more (here: RN26 more than RN38)'
    assert verdicts(scores=dict(table1={k: [v, v + 0.1, v + 0.2] for k, v in table.items()}))[claim][0] == verdict
    assert verdicts(scores=dict(table1={k: [v] for k, v in table.items()}))[claim][0] == UNDECIDED
    assert verdicts()[claim] == (
        UNTESTED, "exceptions in the paper's own table: CIFAR-100 (+0.84 and +0.86); Mini-ImageNet (+0.80 and +3.11)")


def test_exceptions_in_the_table_of_the_paper_are_told():
    found = verdicts()
    assert found['In DenseNet, concatenation is marginally above addition (here: mostly)'] == (
        UNTESTED, "exceptions in the paper's own table: DN100-Ours-C against DN100-Ours, CIFAR-10 (-0.21)")
    assert found['Template matching improves the baselines'] == (UNTESTED, EXCEPTION)


@pytest.mark.parametrize('mu, eta, by_protocol, planned, expected', [
    (2.6, 30., False, 7, UNTESTED), (2.6, 18., False, 7, UNTESTED),
    (2.6, 30., True, 9, 'does not hold (one network tested, after 7 epochs)'),
    (2.6, 18., True, 7, 'holds (one network tested)'),
    (2.6, 18., True, 9, 'holds (one network tested, after 7 epochs)'),
])
def test_constants_of_one_network_are_of_that_alone(mu, eta, by_protocol, planned, expected):
    measured = dict(
        mu=mu, eta=eta, paper=dict(mu=2.5, eta=17.), epochs=7, planned=planned, opt='adam', images=1234,
        by_protocol=by_protocol, layer_mu=dict(a=3., b=-0.914), layer_eta=dict(a=9.44, b=8.), train_top1=88.88)
    verdict, evidence = verdicts(maximizer=measured)['A trained RN20 has μ = 2.5 and η = 17 (here: within 25 %)']
    assert verdict == expected
    assert ('after 7 epochs by the protocol' if by_protocol else 'one after 7 epochs of Adam has') in evidence
    assert not by_protocol or ', on 1,234 images, most of which it was trained on, has μ' in evidence
    assert not by_protocol or evidence.endswith(
        'in its layers μ is -0.91 to 3.00 and η 8.0 to 9.4; in the last epoch 88.9 % of its training images were right')
    near = '' if eta == 18. else 'not '
    assert f'μ = 2.60, within 25 % of the claimed value, and η = {eta}, {near}within 25 %' in evidence


def test_trust_is_decided_by_two_standard_errors_and_accuracies_by_an_exact_test():
    def row(lead, error, right, wrong):
        images = np.repeat([100., -100., 0.], [right, wrong, 600 - right - wrong])
        measures = dict.fromkeys(('deletion', 'insertion'), (lead, error))
        measures.update(without_most=(-images.mean(), sem(images)), without_least=(images.mean(), sem(images)))
        return {f'{key}{end}': value for key, (lead, error) in measures.items()
                for end, value in (('', 0.5), ('_error', 0.01), ('_lead', lead), ('_lead_error', error))}
    maps = {'class map': row(0, 1, 0, 0), 'Grad-CAM': row(0.01, 0.01, 24, 12), 'random': row(0.2, 0.01, 29, 12)}
    assert maps['Grad-CAM']['without_least_lead'] > 2 * maps['Grad-CAM']['without_least_lead_error']  # but p = 0.07
    lines = report.say_trust(
        dict(images=600, top1=90., patch_accuracy=80., patch_agreement=81., fill='blur', occlusion_window=16, maps=maps,
             settings=dict(model='rn26_tm')))
    grad_cam, random = (line for line in lines if line.startswith('- Against'))
    assert grad_cam == (
        '- Against Grad-CAM, the class map is not significantly different by deletion (-0.010 ± 0.010), insertion '
        '(+0.010 ± 0.010), accuracy without the higher-ranked half (+2.0 ± 1.0), accuracy without the lower-ranked '
        'half (+2.0 ± 1.0).')
    assert random == (
        '- Against random, the class map is better by insertion (+0.200 ± 0.010), accuracy without the higher-ranked '
        'half (+2.8 ± 1.1), accuracy without the lower-ranked half (+2.8 ± 1.1); worse by deletion (-0.200 ± 0.010).')


@pytest.mark.parametrize('right, wrong', [(24, 12), (29, 12), (0, 7), (3, 0), (0, 0)])
def test_exact_test_of_accuracies_is_of_the_images_that_differ(right, wrong):
    images = np.repeat([1., -1., 0.], [right, wrong, 600 - right - wrong])
    expected = binomtest(right, right + wrong).pvalue if right + wrong else 1.
    assert find_p(images.mean(), sem(images), 600) == pytest.approx(expected)


@pytest.mark.parametrize('fill, measures', [('mean', 3), ('blur', 4)])
def test_insertion_counts_where_what_it_starts_from_masks(fill, measures):
    row = {f'{key}{end}': value for key in ('deletion', 'insertion', 'without_most', 'without_least')
           for end, value in (('_lead', 0.2), ('_lead_error', 0.01))}
    trust = dict(fill=fill, maps={'occlusion': row, 'Grad-CAM': row}, images=600)
    by = {name: [part.partition(' (')[0] for parts in compare_maps(trust, name).values() for part in parts]
          for name in trust['maps']}
    for name in trust['maps']:
        assert len(by[name]) == measures and ('insertion' in by[name]) == (fill == 'blur')


def test_stale_page_is_named(tmp_path, monkeypatch):
    (tmp_path / 'train').mkdir()
    pictures = shutil.ignore_patterns('*.png', '*.svg')
    shutil.copytree(ROOT / 'train' / 'results', tmp_path / 'train' / 'results', ignore=pictures)
    monkeypatch.setattr(report, 'ROOT', tmp_path)
    with pytest.raises(InputError, match='RESULTS.md is stale; run python train/report.py'):
        report.main(['--check'])
    report.main([])
    report.main(['--check'])
    path = tmp_path / 'train' / 'results' / 'rn26_tm.cifar10' / 'evaluation.json'
    path.write_text(json.dumps(dict(json.loads(path.read_text()), top1=12.34)))
    assert '| 12.34 % |' in report.render_pages(tmp_path)[tmp_path / 'RESULTS.md']


def test_epochs_of_all_runs_are_counted():
    def run(epochs, experiment, start=None, model='rn26', dataset='hfds/uoft-cs/cifar10'):
        settings = dict(experiment=experiment, initial_checkpoint=start)
        return dict(model=model, epochs=epochs, dataset=dataset, settings=settings)

    runs = dict(
        another_set=run(7, 'a', dataset='hfds/uoft-cs/cifar100'),  # of a folder of the same name
        first=run(13, 'a'), second=run(24, 'b', 'output/a/last.safetensors'),
        third=run(23, 'c', '/elsewhere/b/best.safetensors', dataset='hfds/here/cifar10'),
        other=run(5, 'd', 'output/a/last.safetensors', 'rn26_tm'),
        unknown=run(5, 'e', 'weights.safetensors'), shipped=run(5, 'g', 'timm_tmblock/weights/third.safetensors'),
        itself=run(5, 'f', 'output/f/last.safetensors'))
    expected = dict(another_set=7, first=13, second=37, third=60, other=None, unknown=None, shipped=65, itself=None)
    assert {tag: count_epochs(tag, runs) for tag in runs} == expected
    runs['second']['settings']['kd_checkpoint'] = 'output/teacher/last.safetensors'
    assert {tag: count_taught_epochs(tag, runs) for tag in runs} == {
        **dict.fromkeys(runs, 0), 'second': 24, 'third': 24, 'shipped': 24}
    runs['first']['settings']['pretrained'] = True
    assert count_epochs('first', runs) is None


@pytest.mark.parametrize('settings, fillings, said', [
    ({}, [], 'trained without random erasing'),
    (dict(reprob=0.2), ['random erasing'], 'trained with random erasing'),
    (dict(reprob=0.2, remode='pixel'), [], 'trained without random erasing'),
    (dict(aa='trivial'), ['TrivialAugment'], r'into images \(TrivialAugment\), so the network has seen'),
    (dict(aa='rand-m9', reprob=0.1), ['random erasing', 'rand-m9'], r'\(random erasing and rand-m9\)'),
    (dict(padding=4, padding_mode='constant'), ['the padding'], r'\(the padding\)'),
    (dict(padding=4, padding_mode='reflect'), [], 'trained without random erasing'),
])
def test_what_put_the_mean_colour_into_training_images_is_of_all_runs(settings, fillings, said):
    def run(**kwargs):
        return dict(model='rn26', epochs=1, dataset='hfds/uoft-cs/cifar10', settings=kwargs)

    runs = dict(
        first=run(experiment='a', **settings), second=run(initial_checkpoint='output/a/last.safetensors'),
        unknown=run(initial_checkpoint='elsewhere.safetensors', **settings))
    assert find_fillings('second', runs) == fillings and re.search(said, say_fillings(fillings))
    assert find_fillings('unknown', runs) is None and 'is not recorded' in say_fillings(None)
