"""The paper's experiments, in miniature: which cells there are, that they run, resume, and are set beside the paper."""
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from timm_tmblock.errors import InputError
from train import reproduce
from train.checkpoint import find_checkpoints
from train.config import parse_args
from train.paper import DATASETS, TABLE_1
from train.reproduce import check_flags, create_cells, create_parser, main
from train.tables import format_scores, render, tabulate

ROOT = Path(__file__).parent.parent
TINY = ['--data', 'cifar10=sample', '--jobs', '2', '--', '--train-split', 'train[:45]', '--test-split', 'test[:10]',
        '--max-steps', '1', '--device', 'cpu']


def cells(*flags):
    args = create_parser().parse_args(list(flags))
    return create_cells(args.experiment, args)


def test_table_1_has_ten_rows_three_sets_and_every_seed():
    found = cells('table1', '--datasets', *DATASETS, '--seeds', '0', '1', '2')
    assert len(found) == len({c.name for c in found}) == 10 * 3 * 3
    for cell in found:
        args = parse_args(['-c', str(ROOT / 'train' / 'recipes' / 'paper' / f'{cell.recipe}.yaml')])
        assert (args.opt, args.lr, args.weight_decay, args.batch_size) == ('adam', 1e-3, 1e-4, 32)
        assert args.pool == [65, 15, 20] and args.patch_loss_weight == 0.5 and not args.filter_bias_and_bn
        assert args.aux_head == cell.setting.endswith('_aux')
        assert args.model.partition('.')[0] == cell.setting.removesuffix('_aux')


def test_recipes_of_the_paper_print_its_numbers_and_ours():
    for row, (name, *numbers) in TABLE_1.items():
        for dataset, number in zip(DATASETS, numbers):
            text = (ROOT / 'train' / 'recipes' / 'paper' / f'{row}.{dataset}.yaml').read_text()
            assert text.startswith(f'# {name} of') and f'The paper: {number:.2f} %' in text
            results = [json.loads(path.read_text()) for path in (
                ROOT / 'train' / 'results' / 'paper' / 'table1').glob(f'{row}.{dataset}.seed*/result.json')]
            assert ('not run yet' in text) == (not results)
            assert all(f'{result["test"]["top1"]:.2f} %' in text for result in results)


def test_what_is_named_twice_is_run_once():
    assert len(cells('table1', '--rows', 'rn26', '--seeds', '0', '1', '0')) == 2
    assert len(cells('lambda', '--lambdas', '0.5', '0.50000001')) == 1


@pytest.mark.parametrize('flags', [
    ['--model', 'rn20'], ['--model=rn20'], ['--aux-head'], ['--dataset', 'x'], ['--pretrained'], ['--eval-only']])
def test_flags_cannot_make_all_rows_one(tmp_path, flags):
    with pytest.raises(InputError, match=f'^{flags[0].partition("=")[0]} is set by the experiment.*; leave it out'):
        main(['table1', '--output', str(tmp_path), '--', *flags])
    assert not list(tmp_path.iterdir())


def test_grid_of_maximizers_is_that_of_figure_3():
    found = {c.setting: parse_args(list(c.flags)) for c in cells('maximizers')}
    assert list(found) == [
        'bn_relu.batch8', 'softmax.batch8', 'perturbed.batch8', 'bn_relu.batch32', 'softmax.batch32']
    for setting, args in found.items():
        assert args.model == 'rn20' and setting.endswith(f'batch{args.batch_size}')
        assert args.model_kwargs.get('maximizer', 'bn_relu') == setting.split('.')[0]
    more = [c.setting for c in cells('maximizers', '--perturbed-32', '--num-samples', '600')]
    assert more == [*found, 'perturbed.batch32']
    for cell in cells('maximizers', '--datasets', 'mini_imagenet'):
        recipe = str(ROOT / 'train' / 'recipes' / 'paper' / f'{cell.recipe}.yaml')
        assert parse_args(['-c', recipe, *cell.flags]).model == 'rn20.mini_imagenet'


@pytest.fixture
def environments(tmp_path, monkeypatch):
    """A function that gives what three runs, two at once, the first the longest, are told through the environment."""
    def find(gpus, variable, value):
        monkeypatch.setattr('torch.cuda.device_count', lambda: gpus)
        monkeypatch.delenv(variable, raising=False)
        if value:
            monkeypatch.setenv(variable, value)
        told, others_ended = [], threading.Semaphore(0)

        def run_cell(cell, folder, flags, env, running):
            told.append(env)
            if cell is first:
                assert all(others_ended.acquire(timeout=60) for _ in others)
            else:
                others_ended.release()

        first, *others = cells('depth')[:3]
        monkeypatch.setattr(reproduce, 'run_cell', run_cell)
        assert reproduce.run_cells([first, *others], tmp_path, dict(cifar10=[]), 2) == []
        return told

    return find


@pytest.mark.parametrize('visible, expected', [(None, ['0', '1', '1']), ('4,GPU-ab', ['4', 'GPU-ab', 'GPU-ab'])])
def test_runs_take_the_gpus_that_are_free(environments, visible, expected):
    assert sorted(env['CUDA_VISIBLE_DEVICES'] for env in environments(2, 'CUDA_VISIBLE_DEVICES', visible)) == expected


@pytest.mark.parametrize('given, expected', [(None, ['OMP_NUM_THREADS']), ('3', [])])
def test_threads_one_asks_for_are_the_threads(environments, given, expected):
    assert [list(env) for env in environments(0, 'OMP_NUM_THREADS', given)] == [expected] * 3


def test_figure_has_each_setting_at_its_own_place(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr('train.tables.save_figure', lambda figure, path: drawn.append(figure))
    for setting, dataset, seed, top1 in (
            ('rn26', 'cifar10', 0, 88.), ('rn26', 'cifar10', 1, 90.), ('rn26_tm', 'cifar10', 0, 91.),
            ('rn38', 'cifar10', 0, 90.), ('rn38', 'cifar100', 0, 65.)):
        path = tmp_path / f'{setting}.{dataset}.seed{seed}' / 'result.json'
        path.parent.mkdir()
        path.write_text(json.dumps(dict(
            setting=setting, data=dataset, seed=seed, test=dict(top1=top1), epochs=3, images={}, hardware='',
            versions={}, mixed_precision='no', command='')))
    render('depth', tmp_path)
    axes = drawn[0].axes[0]
    ticks = {t.get_text(): x for t, x in zip(axes.get_xticklabels(), axes.get_xticks())}
    for container, scores in zip(axes.containers, ({'RN26': 89., 'RN26-Ours': 91., 'RN38': 90.}, {'RN38': 65.})):
        assert dict(zip(*container.lines[0].get_data())) == {ticks[name]: top1 for name, top1 in scores.items()}
    bars = {segment[0, 0]: segment[:, 1] for segment in axes.containers[0].lines[2][0].get_segments()}
    assert bars[ticks['RN26']] == pytest.approx([89 - 2 ** 0.5, 89 + 2 ** 0.5])  # sample deviation of 88 and 90
    assert bars[ticks['RN38']] == pytest.approx([90., 90.])


def test_grid_of_lambdas_has_no_loss_of_patches_and_the_choice_of_the_paper():
    weights = [parse_args(list(c.flags)).patch_loss_weight for c in cells('lambda')]
    assert weights == sorted(weights) and weights[0] == 0 and 0.5 in weights


@pytest.fixture
def forked_runs(monkeypatch, forks):
    """Runs that are forked, which takes less than starting them."""
    class Process:
        def __init__(self, command, stderr, env):
            changed = {key: value for key, value in env.items() if os.environ.get(key) != value}
            self.run = forks.run(*command[1:], **changed)
            self.returncode = self.run.returncode
            stderr.write(self.run.stderr)
            stderr.flush()

        def communicate(self):
            return self.run.stdout, None

    monkeypatch.setattr(reproduce.Processes, 'start', lambda self, command, **kwargs: Process(command, **kwargs))


@pytest.mark.usefixtures('forked_runs')
@pytest.mark.parametrize('experiment, flags, settings, figure', [
    ('table1', ['--rows', 'rn26', 'rn26_aux'], {'rn26', 'rn26_aux'}, False),
    ('lambda', ['--lambdas', '0', '0.5'], {'lambda0', 'lambda0.5'}, True),
    ('depth', ['--rows', 'rn26_tm', 'rn38'], {'rn26_tm', 'rn38'}, True),
    ('maximizers', ['--num-samples', '2'],
     {'bn_relu.batch8', 'softmax.batch8', 'perturbed2.batch8', 'bn_relu.batch32', 'softmax.batch32'},
     True),
])
def test_experiment_runs_and_renders(tmp_path, experiment, flags, settings, figure):
    path = main([experiment, *flags, '--output', str(tmp_path), *TINY])
    results = [json.loads(p.read_text()) for p in (tmp_path / experiment).glob('*/result.json')]
    assert {r['setting'] for r in results} == settings
    for r in results:
        assert r['updates'] == 1 and sum(r['images'].values()) == 55 and r['images']['train'] >= 32
        assert r['command'].startswith('train.py -c train/recipes/paper/') and str(tmp_path) not in json.dumps(r)
    text = path.read_text()
    rows = [line for line in text.splitlines() if line.startswith('| ') and '(1 run)' in line]
    assert len(rows) == len(settings)
    if experiment == 'table1':
        top1 = {r['setting']: r['test']['top1'] for r in results}
        assert f'| RN26 | {top1["rn26"]:.2f} (1 run) | 89.52 |' in text
        assert f'| RN26-aux | {top1["rn26_aux"]:.2f} (1 run) | 90.57 |' in text
        assert '| RN38-Ours | – | 91.36 |' in text  # not run
    picture = tmp_path / experiment / f'{experiment}.png'
    assert picture.exists() == figure
    if figure:
        with Image.open(picture) as image:
            assert image.width > 500


@pytest.mark.usefixtures('forked_runs')
def test_finished_cells_are_skipped_and_interrupted_ones_resumed(tmp_path):
    command = ['table1', '--rows', 'rn26', '--output', str(tmp_path), *TINY[:2], *TINY[4:]]
    long = [*command[:-4], '--max-steps', '25', '--checkpoint-interval', '1', '--device', 'cpu', '--batch-size', '5']
    process = subprocess.Popen(
        [sys.executable, str(ROOT / 'train' / 'reproduce.py'), *long], stderr=subprocess.PIPE, text=True)
    folder = tmp_path / 'table1' / 'rn26.cifar10.seed0'
    deadline = time.monotonic() + 120
    while not find_checkpoints(folder) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 143 and error.splitlines()[-1] == 'error: Interrupted; the same command continues.'
    assert not (folder / 'result.json').exists()

    before = int(find_checkpoints(folder)[-1].name.removeprefix('update-'))
    assert 0 < before < 25
    main(long)
    result = json.loads((folder / 'result.json').read_text())
    assert result['updates'] == 25
    stamp = (folder / 'log.txt').stat().st_mtime_ns
    main(long)
    main([*long, '--checkpoint-interval', '7', '--report-to', 'tensorboard'])  # which change no result
    assert (folder / 'log.txt').stat().st_mtime_ns == stamp
    for row in ('rn26', 'rn38'):  # itself, and one to compare it with
        with pytest.raises(InputError, match='rn26.cifar10.seed0 was begun with the flags .*choose another --output'):
            main([*command[:2], row, *long[3:], '--lr', '0.1'])


@pytest.mark.parametrize('there, here, taken', [('1', '1', True), ('1', '2', False)])
def test_depth_takes_finished_runs_of_the_same_settings_from_table_1(tmp_path, monkeypatch, there, here, taken):
    twin = tmp_path / 'table1' / 'rn38.cifar10.seed0'
    twin.mkdir(parents=True)
    command = f'train.py -c train/recipes/paper/rn38.cifar10.yaml --seed 0 --epochs {there}'
    (twin / 'cell.json').write_text(json.dumps(dict(data='cifar10', flags=f'--epochs {there}', command=command)))
    (twin / 'result.json').write_text(json.dumps(dict(
        setting='rn38', data='cifar10', seed=0, test=dict(top1=87.25), epochs=1, images={}, hardware='', versions={},
        mixed_precision='no', command=command)))

    def start(self, command, **kwargs):
        raise InputError('started')

    monkeypatch.setattr(reproduce.Processes, 'start', start)
    run = ['depth', '--rows', 'rn38', '--epochs', here, '--output', str(tmp_path)]
    if taken:
        assert '| RN38 | 87.25 (1 run) |' in main(run).read_text()
        main(run)  # again, from its own folder
    else:
        with pytest.raises(InputError, match='started'):
            main(run)


def test_runs_of_one_row_have_one_number_of_samples(tmp_path):
    folder = tmp_path / 'maximizers' / 'perturbed.batch8.cifar10.seed0'
    folder.mkdir(parents=True)
    kwargs = shlex.quote('maximizer_kwargs={"num_samples":50}')
    (folder / 'cell.json').write_text(json.dumps(dict(data='cifar10', flags='--max-steps 1', command=(
        'train.py -c train/recipes/paper/rn26.cifar10.yaml --seed 0 --model rn20 --batch-size 8 --model-kwargs '
        f'maximizer=perturbed {kwargs} --max-steps 1'))))
    (folder / 'result.json').write_text('{}')
    with pytest.raises(InputError, match='seed0 was begun as .*num_samples.*, not as .* --seed 1 .*choose another'):
        main(['maximizers', '--seeds', '1', '--output', str(tmp_path), '--', '--max-steps', '1'])


def test_runs_from_the_hub_are_set_beside_those_of_a_copy():
    folder, flags = ROOT / 'train' / 'results' / 'paper' / 'table1', ['--epochs', '40', '--mixed-precision', 'bf16']
    for dataset in ('cifar10', 'cifar100'):
        check_flags(folder, dataset, flags)
        check_flags(folder, dataset, ['--dataset', f'hfds/uoft-cs/{dataset}', *flags])
        check_flags(folder, dataset, ['--dataset', f'hfds/my copies/{dataset}/', *flags, '--report-to', 'a', 'b'])
        check_flags(folder, dataset, [*flags[2:], '-j', '8', *flags[:2], '--log-interval=7'])
        others = [flags[2:], ['--dataset', f'hfds/uoft-cs/{dataset}x', *flags], [*flags, '--workers', '2', '-b', '64']]
        for other in others:
            with pytest.raises(InputError, match=f'{dataset}.seed0 was begun with the flags'):
                check_flags(folder, dataset, other)


@pytest.mark.usefixtures('forked_runs')
@pytest.mark.parametrize('flags, message', [
    (['--batch-size', '500'], '.*use a --batch-size of at most'),
    (['--lr', '1e20', '--max-steps', '3'], 'The loss or a weight was not finite')])
def test_run_that_fails_is_named(tmp_path, flags, message):
    with pytest.raises(InputError, match=rf'rn26.cifar10.seed0 failed, see .*log.txt: error: {message}'):
        main(['table1', '--rows', 'rn26', '--output', str(tmp_path), *TINY, *flags])
    assert 'No run is finished yet.' in (tmp_path / 'table1' / 'README.md').read_text()


@pytest.mark.usefixtures('forked_runs')
def test_corrected_command_runs_where_nothing_was_trained(tmp_path):
    command = ['table1', '--rows', 'rn26', '--output', str(tmp_path), *TINY]
    with pytest.raises(InputError, match='rn26.cifar10.seed0 failed'):
        main([*command[:6], 'cifar10=no/such/folder', *command[7:]])
    assert '(1 run)' in main(command).read_text()


def test_scores_are_mean_and_sample_deviation():
    assert format_scores([90., 92., 94.]) == '92.00 ± 2.00 (3 runs)'
    assert format_scores([90.]) == '90.00 (1 run)'
    assert format_scores([]) == '–'


def test_table_holds_all_seeds_of_a_cell(tmp_path):
    for seed, top1 in enumerate((90., 91.)):
        path = tmp_path / f'rn26.cifar10.seed{seed}'
        path.mkdir()
        (path / 'result.json').write_text(json.dumps(dict(
            setting='rn26', data='cifar10', seed=seed, test=dict(top1=top1), epochs=3, images=dict(train=7),
            hardware='a machine', mixed_precision='no', versions=dict(torch='2'), command=f'train.py --seed {seed}')))
    text = render('table1', tmp_path).read_text()
    assert '| RN26 | 90.00, 91.00 (2 runs) | 89.52 |' in text
    for dataset, column in (('cifar100', 2), ('mini_imagenet', 3)):
        assert format_scores([70.]) in '\n'.join(lines := tabulate('table1', {('rn38', dataset): [70.]}))
        assert f'| RN38 | 70.00 (1 run) | {TABLE_1["rn38"][column]:.2f} |' in lines
    assert '- Seeds: 0, 1' in text and '- Epochs: 3\n' in text
    assert '- `python train/train.py --seed 0`, also with --seed 1\n' in text


@pytest.mark.parametrize('flags, message', [
    (['table2'], 'invalid choice'), (['table1', '--data', 'mnist=x'], '--data takes'),
    (['table1', '--data', 'cifar10'], '--data takes'), (['table1', '--rows', 'rn50'], 'invalid choice'),
    (['depth', '--rows', 'wrn16_tm'], 'depth has no row wrn16_tm; --rows takes rn26, rn26_tm, rn38'),
    (['lambda', '--rows', 'rn26'], 'lambda has no row rn26; leave out --rows'),
    (['depth', '--lambdas', '0.5'], '--lambdas only applies to lambda; leave it out of depth'),
    (['table1', '--perturbed-32'], '--perturbed-32 only applies to maximizers; leave it out of table1'),
    (['lambda', '--num-samples', '3'], '--num-samples only applies to maximizers; leave it out of lambda'),
    (['lambda', '--', '--patch-loss-weight=0.5'], '--patch-loss-weight is set by the experiment'),
    (['maximizers', '--', '--batch-size', '128'], '--batch-size is set by the experiment'),
    (['maximizers', '--', '-b', '128'], '-b is set by the experiment'),
    (['maximizers', '--', '-b128'], '-b128 is set by the experiment'),
    (['table1', '--', '--seed', '3'], '--seed is set by the experiment'),
    (['table1', '--', '--pool', '80', '20', '0'], 'needs a test part, which --pool leaves empty'),
    (['table1', '--', '--pool', '80', '20', '0.0'], 'needs a test part, which --pool leaves empty'),
])
def test_bad_input_is_one_sentence(flags, message):
    with pytest.raises(InputError, match=message) as error:
        main(flags)
    assert '\n' not in str(error.value)
