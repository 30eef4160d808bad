"""Pages of results: none is stale, and verdicts are those that the numbers give by hand."""
import json
import math
import shutil
from pathlib import Path

import pytest

from timm_tmblock.errors import InputError
from train import report
from train.claims import FAILS, HOLDS, UNDECIDED, UNTESTED, Difference, Evidence, combine, judge

ROOT = Path(__file__).parent.parent
IMAGES = dict(cifar10=12000, cifar100=12000, mini_imagenet=12000)


def verdicts(**kwargs):
    fields = dict(scores={}, test_images=IMAGES, evaluations={}, runs={})
    return {claim.text: (claim.verdict, claim.evidence) for claim in judge(Evidence(**{**fields, **kwargs}))}


def test_committed_pages_are_those_of_the_committed_results():
    report.main(['--check'])


def test_difference_of_seeds_and_of_single_runs():
    many = Difference.of([91., 92., 93.], [90., 90.5, 91.], 12000)
    assert many.points == pytest.approx(1.5) and many.error == pytest.approx(math.sqrt(1 / 3 + 0.25 / 3))
    assert many.verdict == HOLDS
    one = Difference.of([91.], [90.], 10000)
    assert one.error == pytest.approx(100 * math.sqrt((0.91 * 0.09 + 0.9 * 0.1) / 10000))
    assert one.verdict == HOLDS and Difference.of([90.], [91.], 10000).verdict == FAILS
    assert Difference.of([90.3], [90.], 10000).verdict == UNDECIDED


def test_several_tests_of_a_claim():
    assert combine([]) == UNTESTED and combine([UNDECIDED]) == UNDECIDED
    assert combine([HOLDS, UNDECIDED]) == HOLDS and combine([HOLDS, FAILS]) == combine([FAILS]) == FAILS


def test_without_results_nothing_is_tested():
    assert {verdict for verdict, _ in verdicts().values()} == {UNTESTED}


def test_claims_of_table_1():
    table = {('rn26', 'cifar10'): [89., 89.1], ('rn26_tm', 'cifar10'): [91., 91.1], ('rn38', 'cifar10'): [92., 92.1],
             ('rn26_aux', 'cifar10'): [91., 91.2]}
    found = verdicts(scores=dict(table1=table))
    assert found['Template matching improves the baselines (here: those named)'] == (
        HOLDS, 'RN26-Ours against RN26, CIFAR-10: +2.00 ± 0.07 points (2 and 2 runs)')
    assert found['With it two blocks a stage are mostly above three without'][0] == FAILS
    assert found['It does more than auxiliary supervision alone'][0] == UNDECIDED
    assert found['It gains from depth'] == (UNTESTED, '–')


def test_claims_of_the_ablations():
    weights = {(f'lambda{w}', 'cifar10'): [top1] for w, top1 in (('0', 85.), ('0.5', 91.), ('0.9', 88.))}
    soft = {(f'{kind}.batch8', 'cifar10'): [top1] for kind, top1 in (
        ('bn_relu', 88.), ('softmax', 88.2), ('perturbed', 80.))}
    found = verdicts(scores=dict(**{'lambda': weights}, maximizers=soft))
    assert found['λ = 0.5 is best'][0] == HOLDS
    assert found['Soft maximizers do as well as BN-ReLU'][0] == FAILS
    del soft['perturbed.batch8', 'cifar10']
    assert verdicts(scores=dict(maximizers=soft))['Soft maximizers do as well as BN-ReLU'][0] == HOLDS


def test_networks_of_one_recipe_are_compared_where_the_protocol_was_not_run():
    def run(**settings):
        return dict(epochs=13, settings=dict(opt='muon', lr=0.1, **settings))

    evaluations = {tag: dict(top1=top1, images=10000, dataset='cifar10') for tag, top1 in (
        ('rn26.cifar10', 91.), ('rn26_tm.cifar10', 93.), ('wrn16.cifar10', 94.))}
    runs = {tag: run() for tag in evaluations}
    claim = 'Template matching improves the baselines (here: those named)'
    verdict, evidence = verdicts(evaluations=evaluations, runs=runs)[claim]
    assert verdict == HOLDS and 'rn26_tm.cifar10 against rn26.cifar10: +2.00' in evidence and 'wrn16' not in evidence
    for other in (run(mixup=0.2), run(initial_checkpoint='x'), dict(run(), settings=dict(opt='sgd', lr=0.1))):
        assert verdicts(evaluations=evaluations, runs={**runs, 'rn26.cifar10': other})[claim] == (UNTESTED, "–")


@pytest.mark.parametrize('output, verdict', [(0.6, HOLDS), (0.4, FAILS), (0.01, FAILS)])
def test_clusters_at_the_output_of_the_block(output, verdict):
    def space(value):
        return dict(class_silhouette=value, class_neighbour_rate=value, superclass_silhouette=value,
                    superclass_neighbour_rate=value)
    spaces = {'rn26: stage 3': space(0.), 'rn26_tm: stage 3': space(0.02), 'rn26_tm: block output': space(output)}
    claim = "Features are clustered by what they mean at the block's output, not before it nor in the baseline"
    assert verdicts(geometry=dict(spaces=spaces))[claim][0] == verdict


@pytest.mark.parametrize('mu, eta, verdict', [(2.6, 16., HOLDS), (0.4, 17., FAILS), (2.5, 30., FAILS)])
def test_constants_of_the_maximizers(mu, eta, verdict):
    measured = dict(mu=mu, eta=eta, paper=dict(mu=2.5, eta=17.))
    assert verdicts(maximizer=measured)['A trained RN20 has μ = 2.5 and η = 17'][0] == verdict


def test_trust_is_decided_by_two_standard_errors():
    def row(lead, error):
        return {f'{key}{end}': value for key in ('deletion', 'insertion', 'without_most', 'without_least')
                for end, value in (('', 0.5), ('_error', 0.01), ('_lead', lead), ('_lead_error', error))}
    maps = {'class map': row(0, 1), 'Grad-CAM': row(0.01, 0.01), 'random': row(0.2, 0.01)}
    lines = report.say_trust(dict(images=10, top1=90., patch_accuracy=80., patch_agreement=81., maps=maps))
    assert '- Against Grad-CAM, the class map is no better and no worse by deletion (-0.010 ± 0.010) and ' in lines[-2]
    assert 'worse by deletion (-0.200 ± 0.010) and better by insertion (+0.200 ± 0.010)' in lines[-1]


def test_stale_page_is_named(tmp_path, monkeypatch):
    (tmp_path / 'train').mkdir()
    shutil.copytree(ROOT / 'train' / 'results', tmp_path / 'train' / 'results')
    monkeypatch.setattr(report, 'ROOT', tmp_path)
    with pytest.raises(InputError, match='RESULTS.md is stale; run python train/report.py'):
        report.main(['--check'])
    report.main([])
    report.main(['--check'])
    path = tmp_path / 'train' / 'results' / 'rn26_tm.cifar10' / 'evaluation.json'
    path.write_text(json.dumps(dict(json.loads(path.read_text()), top1=12.34)))
    assert '| 12.34 % |' in report.render_pages(tmp_path)[tmp_path / 'RESULTS.md']
