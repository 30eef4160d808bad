"""A run that is killed, at any place, goes on to the very weights and log of one that is not."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hub_cards.run import read_run
from timm_tmblock.errors import InputError
from train.checkpoint import find_checkpoints
from train.config import check_resumed, dump_args, find_changes_of_finished, parse_args
from train.record import holding
from train.train import Trainer, main

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures('fresh_accelerate')
FLAGS = ['--train-split', 'train[:36]', '--val-split', 'test[:15]', '--test-split', 'test[15:24]', '--epochs', '2',
         '--img-size', '16', '--checkpoint-interval', '1', '--device', 'cpu', '--report-to', 'none', '--experiment',
         'run']
EVERYTHING = ['--opt', 'muon', '--model-ema', '--mixup', '0.2', '--drop', '0.1', '--reprob', '0.5', '--remode', 'pixel',
              '--aa', 'trivial', '--workers', '1', '--checkpoint-hist', '1', '--tta', 'flip']
PERTURBED = ['--model', 'rn20', '--model-kwargs', 'maximizer=perturbed', 'maximizer_kwargs={"num_samples":3}',
             '--model-ema']
# kills one process, for real, before its step or within a checkpoint, which is when most can be left behind
KILLER = '''
import os, signal, sys
sys.path.insert(0, {root!r})
from train import checkpoint, train
calls = 0
def die_at_call(function, n, rank):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == n and os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped
{patch}
train.main(sys.argv[1:])
'''


LIMITED = '''
import resource, signal, sys
from timm_tmblock.errors import exiting_on_input_error
from train.train import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, 6_000_000))  # weights fit, the optimizer does not
with exiting_on_input_error():
    main(sys.argv[1:])
'''


def assert_same(a: Path, b: Path) -> None:
    """Weights, table and counters of two runs agree to the last bit."""
    assert (a / 'summary.csv').read_bytes() == (b / 'summary.csv').read_bytes()
    files = sorted(p.relative_to(a) for p in a.rglob('*.safetensors'))
    assert files == sorted(p.relative_to(b) for p in b.rglob('*.safetensors')) and len(files) >= 4
    for file in files:
        x, y = load_file(a / file), load_file(b / file)
        assert all(torch.equal(x[k], y[k]) for k in x), file
    states = [json.loads((find_checkpoints(f)[-1] / 'state.json').read_text()) for f in (a, b)]
    for state in states:
        for key in ('seconds', 'epoch_seconds', 'run_id', 'files'):
            state.pop(key)
    assert states[0] == states[1]


@pytest.mark.parametrize('processes, patch, flags', [
    (1, 'train.Trainer.step = die_at_call(train.Trainer.step, 5, "0")', EVERYTHING),
    (1, 'checkpoint.asdict = die_at_call(checkpoint.asdict, 5, "0")', []),
    (2, 'train.Trainer.step = die_at_call(train.Trainer.step, 6, "1")', PERTURBED),
], ids=['before a step', 'within a checkpoint', 'the second of two processes'])
def test_killed_run_resumes_to_the_same_weights_and_log(tmp_path, forks, processes, patch, flags):
    flags = [*FLAGS, *flags, '--batch-size', str(12 // processes)]
    script = ROOT / 'train' / 'train.py'
    auto = ['--resume', 'auto'] if processes > 1 else []  # of which nothing has begun
    whole = forks.run(script, *flags, *auto, '--output', str(tmp_path / 'whole'), processes=processes)
    assert whole.returncode == 0, whole.stderr[-2000:]

    killer = tmp_path / 'killer.py'
    killer.write_text(KILLER.format(root=str(ROOT), patch=patch))
    killed = forks.run(killer, *flags, '--output', str(tmp_path / 'killed'), processes=processes)
    folder = tmp_path / 'killed' / 'run'
    assert killed.returncode != 0 and (processes > 1 or killed.returncode == -signal.SIGKILL)
    assert json.loads((find_checkpoints(folder)[-1] / 'state.json').read_text())['update'] in (3, 4, 5)

    resume = [script, '--resume', str(folder)]  # with the settings of the run
    if processes > 1:  # or the same command
        resume = [script, *flags, '--output', str(tmp_path / 'killed'), '--resume', 'auto']
    if 'muon' in flags:  # in another process, which has another order of sets
        resumed = subprocess.run(
            [sys.executable, *resume], cwd=ROOT, env={**os.environ, 'PYTHONHASHSEED': '1', 'OMP_NUM_THREADS': '1'},
            capture_output=True, text=True)
    else:
        resumed = forks.run(*resume, processes=processes)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert_same(tmp_path / 'whole' / 'run', folder)
    results = [json.loads(r.stdout.splitlines()[-1]) for r in (whole, resumed)]
    for key in ('history', 'best', 'test', 'images'):
        assert results[0][key] == results[1][key]


@pytest.fixture(scope='module')
def train_whole(forks, tmp_path_factory):
    """Folders of runs that nothing stops, each trained once."""
    @cache
    def train(processes, *flags):
        folder = tmp_path_factory.mktemp('whole')
        whole = forks.run(ROOT / 'train' / 'train.py', *flags, '--output', str(folder), processes=processes)
        assert whole.returncode == 0, whole.stderr[-2000:]
        return folder / 'run'

    return train


@pytest.mark.parametrize('processes, n, more', [
    (1, 2, []), (1, 3, []), (1, 2, ['--grad-accum-steps', '2']), (2, 3, []), (2, 3, ['--dist-bn', 'reduce'])],
    ids=['', 'last of an epoch', 'last but for a batch', 'of two processes', 'of two processes with a mean of both'])
def test_terminated_run_saves_the_update_it_is_at(tmp_path, forks, train_whole, processes, n, more):
    """SIGTERM to the last of its processes, in step `n`; there is no checkpoint before the end of an epoch."""
    flags = [*FLAGS, '--checkpoint-interval', '0', '--batch-size', str(12 // processes), *more]
    whole = train_whole(processes, *flags)
    script = tmp_path / 'terminated.py'
    patch = f'train.ASK_SECONDS = 0; train.Trainer.step = die_at_call(train.Trainer.step, {n}, "{processes - 1}")'
    code = KILLER.format(root=str(ROOT), patch=patch).replace('SIGKILL', 'SIGTERM')
    script.write_text(code.replace(
        'train.main(', 'from timm_tmblock.errors import exiting_on_input_error as ending\nwith ending(): train.main('))
    folder = tmp_path / 'terminated' / 'run'
    run = forks.run(script, *flags, '--output', str(folder.parent), processes=processes)
    assert run.returncode == 143, run.stderr[-2000:]
    update = n // 2 if '--grad-accum-steps' in more else n
    assert f'Interrupted in epoch 1 at update {update}; the last good checkpoint is update-{update:08}' in run.stderr
    resumed = forks.run(ROOT / 'train' / 'train.py', '--resume', str(folder), processes=processes)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    for file in ('last.safetensors', 'best.safetensors', 'summary.csv'):
        assert (folder / file).read_bytes() == (whole / file).read_bytes()


def test_what_goes_on_by_itself_is_the_run_of_the_experiment(tmp_path):
    (tmp_path / 'recipe.yaml').write_text('experiment: run\nresume: auto\n')
    flags = [*FLAGS[:-2], '-c', str(tmp_path / 'recipe.yaml'), '--batch-size', '12', '--output', str(tmp_path)]
    with pytest.raises(InputError, match='run has nothing to measure yet'):
        parse_args([*flags, '--eval-only'])
    with pytest.raises(InputError, match='resumes the run of --experiment .*; add --experiment'):
        parse_args(['--resume', 'auto'])
    assert main([*flags, '--max-steps', '1', '--model-kwargs', 'patch_size=2'])['updates'] == 1
    args = parse_args([*flags, '--max-steps', '2'])
    assert args.resume == str(tmp_path / 'run') and args.model_kwargs == {'patch_size': 2, 'img_size': 16}
    assert main([*flags, '--max-steps', '2'])['updates'] == 2
    (tmp_path / 'link').symlink_to(tmp_path)  # another path to the same folder
    assert main([*flags, '--max-steps', '3', '--output', str(tmp_path / 'link')])['updates'] == 3
    with pytest.raises(InputError, match='--model-kwargs patch_size cannot change in a run that is resumed'):
        parse_args([*flags, '--model-kwargs', 'patch_size=4'])


def test_two_runs_in_one_folder_are_refused(tmp_path):
    flags = [*FLAGS, '--batch-size', '12', '--max-steps', '1', '--output', str(tmp_path)]
    with holding(tmp_path / 'run'), pytest.raises(InputError, match='A run is in progress in .*run; wait for it'):
        main(flags)
    assert not list((tmp_path / 'run').iterdir())
    main(flags)  # it is free again
    result = (tmp_path / 'run' / 'result.json').read_bytes()
    (tmp_path / 'run' / 'best.safetensors').unlink()  # a name of weights in a checkpoint
    (tmp_path / 'run' / 'best.safetensors').write_bytes(b'of the run in progress')
    with holding(tmp_path / 'run'), pytest.raises(InputError, match='A run is in progress'):
        main(['--resume', str(tmp_path / 'run'), '--max-steps', '2'])
    assert (tmp_path / 'run' / 'result.json').read_bytes() == result
    assert (tmp_path / 'run' / 'best.safetensors').read_bytes() == b'of the run in progress'


def test_checkpoint_on_a_full_disk_leaves_the_one_before_it(tmp_path, forks):
    """The file size limit stands in for the disk: both make a write fail half-way."""
    flags = [*FLAGS, '--batch-size', '12', '--sched', 'constant']
    folder = tmp_path / 'cut' / 'run'
    script = ROOT / 'train' / 'train.py'
    assert forks.run(script, *flags, '--output', str(tmp_path / 'whole')).returncode == 0

    started = forks.run(
        script, *flags, '--output', str(tmp_path / 'cut'), '--checkpoint-interval', '3', '--max-steps', '3')
    assert started.returncode == 0, started.stderr[-2000:]
    before = find_checkpoints(folder)
    full = forks.run('-c', LIMITED, '--resume', str(folder), '--max-steps', '6', '--checkpoint-interval', '1')
    assert full.returncode == 2
    assert full.stderr.splitlines()[-1].startswith(f'error: Cannot write {folder}/checkpoints')
    assert 'the disk is full' in full.stderr.splitlines()[-1]
    assert find_checkpoints(folder) == before
    assert [p.name for p in (folder / 'checkpoints').iterdir()] == [before[0].name]
    resumed = forks.run(script, '--resume', str(folder), '--max-steps', '6')
    assert json.loads(resumed.stdout.splitlines()[-1])['updates'] == 6
    a, b = (load_file(tmp_path / f / 'run' / 'last.safetensors') for f in ('whole', 'cut'))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=0)


@pytest.fixture(scope='module')
def unvalidated(tmp_path_factory):
    """A finished run that held out nothing."""
    flags = [*FLAGS, '--batch-size', '12', '--val-fraction', '0', '--max-steps', '4']
    folder = tmp_path_factory.mktemp('unvalidated')
    main([*(f for f in flags if f not in ('--val-split', 'test[:15]')), '--output', str(folder)])
    return folder


@pytest.mark.parametrize('damage', ['cut short', 'missing', 'unfinished'])
def test_damaged_checkpoint_is_passed_over_for_the_one_before_it(tmp_path, unvalidated, damage):
    folder = tmp_path / 'run'
    shutil.copytree(unvalidated / 'run', folder)
    older, newest = find_checkpoints(folder)
    if damage == 'cut short':
        content = (newest / 'optimizer.bin').read_bytes()
        (newest / 'optimizer.bin').write_bytes(content[:len(content) // 2])
    elif damage == 'missing':
        (newest / 'model.safetensors').unlink()
    else:
        (newest / 'state.json').write_text((newest / 'state.json').read_text()[:100])
    assert find_checkpoints(folder) == [older]
    main(['--resume', str(folder)])
    a, b = (load_file(f / 'run' / 'last.safetensors') for f in (unvalidated, tmp_path))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert find_checkpoints(folder)[-1] == newest  # written anew


def test_checkpoint_within_an_epoch_of_another_batch_size_is_refused(tmp_path):
    main([*FLAGS, '--batch-size', '12', '--output', str(tmp_path), '--max-steps', '2'])
    folder = tmp_path / 'run'
    newest = find_checkpoints(folder)[-1]
    state = json.loads((newest / 'state.json').read_text())
    (newest / 'state.json').write_text(json.dumps(dict(state, batch=2, epoch=0)))
    earlier = newest.with_name('update-00000001') / 'state.json'
    state = json.loads(earlier.read_text())
    for batch, advice in ((1, 'resume with the earlier values.$'), (0, 'or remove it to go on from update-00000001')):
        earlier.write_text(json.dumps(dict(state, batch=batch)))
        with pytest.raises(InputError, match=rf'within an epoch of batch_size 12 \(now 6\), .*{advice}'):
            main(['--resume', str(folder), '--batch-size', '6', '--max-steps', '9'])
    shutil.rmtree(newest)
    assert main(['--resume', str(folder), '--batch-size', '6', '--max-steps', '7'])['updates'] == 7


def test_what_killed_runs_leave_of_checkpoints_is_cleared_away(tmp_path):
    main([*FLAGS, '--batch-size', '12', '--max-steps', '2', '--output', str(tmp_path)])
    folder = tmp_path / 'run' / 'checkpoints'
    (folder / '.update-00000001.tmp').mkdir()
    (folder / 'mine').mkdir()
    (folder / 'update-00000000').mkdir()  # cut short as it was removed
    main(['--resume', str(tmp_path / 'run'), '--max-steps', '3'])
    assert sorted(p.name for p in folder.iterdir()) == ['mine', 'update-00000002', 'update-00000003']


def test_best_weights_are_those_of_the_checkpoint_a_run_goes_on_from(tmp_path, monkeypatch):
    told = iter([90., 95., 80., 70.])
    monkeypatch.setattr(Trainer, 'measure', lambda *args: dict(
        top1=next(told), top5=99., balanced_accuracy=90., loss=1.))
    flags = [*FLAGS[:4], *FLAGS[6:], '--batch-size', '12', '--checkpoint-interval', '0', '--output', str(tmp_path)]
    main([*flags, '--epochs', '1'])
    folder = tmp_path / 'run'
    best = (folder / 'best.safetensors').read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, 'save', lambda self: sys.exit('killed'))  # after the weights of the better epoch
        with pytest.raises(SystemExit, match='killed'):
            main(['--resume', str(folder), '--epochs', '2'])
    assert (folder / 'best.safetensors').read_bytes() != best
    result = main(['--resume', str(folder), '--epochs', '2'])  # which is worse this time
    assert result['best']['epoch'] == 0 and (folder / 'best.safetensors').read_bytes() == best


def test_run_does_not_go_on_from_a_checkpoint_that_another_has_gone_on_from(tmp_path):
    main([*FLAGS, '--batch-size', '12', '--max-steps', '1', '--output', str(tmp_path)])
    again = ['--resume', str(tmp_path / 'run'), '--max-steps', '2']
    trainer = Trainer(parse_args(again))
    main(again)
    with pytest.raises(InputError, match='Another run went on in .*run meanwhile; run the same command again'):
        trainer.start_record(ExitStack())


def test_epochs_that_max_steps_was_counted_in_are_those_of_the_run(tmp_path):
    main([*FLAGS, '--batch-size', '6', '--max-steps', '2', '--output', str(tmp_path)])
    with pytest.raises(InputError, match='--max-steps 2 was counted in epochs of 6 updates, and an epoch has 3 now'):
        main(['--resume', str(tmp_path / 'run'), '--batch-size', '12'])


def test_checkpoint_within_an_epoch_at_the_last_update_is_finished_as_the_run_would_have(tmp_path):
    flags = [*FLAGS, '--batch-size', '12', '--sched', 'constant', '--max-steps', '2']
    whole = main([*flags, '--output', str(tmp_path / 'whole')])
    trainer = Trainer(parse_args([*flags, '--max-steps', '3', '--output', str(tmp_path / 'cut')]))
    trainer.start_record(ExitStack())
    trainer.model.train()
    for images, targets in trainer.train_loader.epoch(0):
        trainer.step(images, targets)
        trainer.save()
        if trainer.state.update == 2:
            break  # killed, and was to have gone on
    resumed = main(['--resume', str(tmp_path / 'cut' / 'run'), '--max-steps', '2'])
    assert resumed['history'] == whole['history'] and resumed['test'] == whole['test']
    assert_same(tmp_path / 'whole' / 'run', tmp_path / 'cut' / 'run')


def test_epochs_are_of_the_images_there_are(tmp_path):
    flags = [f for f in FLAGS if f not in ('--val-split', 'test[:15]')]
    main([*flags, '--batch-size', '6', '--output', str(tmp_path), '--val-fraction', '0.5'])  # 2 epochs of 3 updates
    result = main(['--resume', str(tmp_path / 'run'), '--val-fraction', '0', '--epochs', '3'])  # then one of 6
    assert [row['epoch'] for row in result['history']] == [0, 1, 2] and result['updates'] == 18
    with pytest.raises(InputError, match='--val-fraction cannot change in a run that is resumed: the images would be'):
        main(['--resume', str(tmp_path / 'run'), '--val-fraction', '0.2', '--epochs', '4'])


def test_weights_that_other_images_chose_are_the_best_no_more(tmp_path):
    flags = [f for f in FLAGS if f not in ('--val-split', 'test[:15]')]
    folder = tmp_path / 'run'
    main([*flags, '--batch-size', '6', '--output', str(tmp_path), '--val-fraction', '0.5', '--checkpoint-hist', '1'])
    more = main(['--resume', str(folder), '--val-fraction', '0.25', '--epochs', '3'])
    assert [path.name for path in (folder / 'history').iterdir()] == ['epoch-0002.safetensors']
    assert more['best']['epoch'] == 2 and more['best']['images'] == more['images']['validation']
    last, best = (load_file(folder / f'{name}.safetensors') for name in ('last', 'best'))
    assert all(torch.equal(last[k], best[k]) for k in last)
    result = main(['--resume', str(folder), '--val-fraction', '0', '--epochs', '4'])
    assert result['best'] is None and list(result['weights']) == ['last'] and result['test']['weights'] == 'last'
    assert not (folder / 'best.safetensors').exists() and not (folder / 'history').exists()
    assert read_run(folder / 'last.safetensors')['top1'] == result['test']['top1']


@pytest.mark.parametrize('batch_size, steps', [(3, 7), (12, 3)])
def test_part_of_an_epoch_is_counted_whatever_the_size_of_an_update(tmp_path, capsys, batch_size, steps):
    main([*FLAGS, '--output', str(tmp_path), '--batch-size', '6', '--max-steps', '2'])  # of 6
    flags = ['--batch-size', str(batch_size), '--max-steps', str(steps)]
    trainer = Trainer(parse_args(['--resume', str(tmp_path / 'run'), *flags]))
    assert trainer.state.update == 2 * 6 // batch_size
    taken = trainer.state.update
    before = find_steps(tmp_path / 'run')
    assert main(['--resume', str(tmp_path / 'run'), *flags])['updates'] == steps
    assert find_steps(tmp_path / 'run') == before + steps - taken  # all of them by the optimizer too
    printed = capsys.readouterr().out
    assert f'an update has {batch_size} images now, which had 6 before (processes: 1); learning rate up to' in printed
    numbers = re.findall(r'Epoch (\d+)/(\d+): training loss', printed)
    assert numbers and all(int(number) <= int(last) for number, last in numbers)


def find_steps(folder):
    state = torch.load(find_checkpoints(folder)[-1] / 'optimizer.bin', weights_only=True)['state']
    step, = {int(s['step']) for s in state.values() if 'step' in s}
    return step


def test_epochs_are_counted_whatever_the_size_of_an_update(tmp_path):
    flags = [*FLAGS, '--opt', 'sgd', '--sched', 'poly', '--decay-rate', '1', '--lr', '1e-3', '--output', str(tmp_path)]
    main([*flags, '--batch-size', '6'])  # 2 epochs of 6 updates
    for batch_size, epochs in ((12, 4), (3, 5)):  # of 3, then of 12
        result = main(['--resume', str(tmp_path / 'run'), '--epochs', str(epochs), '--batch-size', str(batch_size)])
        updates = epochs * 36 // batch_size
        assert [row['epoch'] for row in result['history']] == list(range(epochs)) and result['updates'] == updates
        assert result['last']['lr'] == pytest.approx(1e-3 / updates, rel=1e-3)  # of the last update
        newest = json.loads((find_checkpoints(tmp_path / 'run')[-1] / 'state.json').read_text())
        assert (newest['epoch'], newest['update']) == (epochs, updates)


def test_resumed_run_keeps_the_trackers_run(tmp_path):
    flags = [*FLAGS, '--batch-size', '12', '--max-steps', '2', '--output', str(tmp_path), '--report-to', 'tensorboard']
    main(flags)
    ids = [json.loads((p / 'state.json').read_text())['run_id'] for p in find_checkpoints(tmp_path / 'run')]
    main(['--resume', str(tmp_path / 'run'), '--max-steps', '4'])
    ids += [json.loads((p / 'state.json').read_text())['run_id'] for p in find_checkpoints(tmp_path / 'run')]
    assert len(set(ids)) == 1 and len(ids[0]) == 32
    seen = EventAccumulator(str(tmp_path / 'run' / 'timm-tmblock')).Reload()
    assert [event.step for event in seen.Scalars('eval/top1')] == [2, 4]


def test_run_that_goes_on_is_not_finished(tmp_path):
    flags = [*FLAGS, '--batch-size', '12', '--img-size', '24', '--output', str(tmp_path)]
    main([*flags, '--epochs', '1'])
    folder = tmp_path / 'run'
    assert main(['--resume', str(folder)])['epochs'] == 1 and (folder / 'result.json').is_file()  # nothing to do
    state = find_checkpoints(folder)[-1] / 'state.json'
    state.write_text(json.dumps(dict(json.loads(state.read_text()), running_seconds=500.)))
    trainer = Trainer(parse_args(['--resume', str(folder), '--epochs', '2', '--img-size', '16']))
    assert trainer.data_config.input_size == (3, 16, 16) and trainer.args.model_kwargs['img_size'] == 16
    trainer.start_record(ExitStack())
    assert not (folder / 'result.json').exists()  # it was of one epoch
    trainer.train_epoch()
    assert trainer.state.epoch_seconds[1] > 500 > trainer.state.epoch_seconds[0]
    with pytest.raises(InputError, match='has 5 updates behind it, more than the 2 of these settings'):
        main(['--resume', str(folder), '--max-steps', '2'])


def test_finished_run_keeps_the_record_of_how_it_was_trained(tmp_path, finished):
    folder = tmp_path / 'run'
    shutil.copytree(finished / 'run', folder)
    before = {name: (folder / name).read_bytes() for name in ('args.yaml', 'result.json', 'last.safetensors')}
    with pytest.raises(InputError, match='is trained to its end, where --lr, --mixup can change nothing'):
        main(['--resume', str(folder), '--lr', '0.5', '--mixup', '0.3'])
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert 'flip_top1' in main(['--resume', str(folder), '--tta', 'flip'])['test']  # measured in another way


def test_finished_run_keeps_the_record_of_its_images(tmp_path):
    flags = [f for f in FLAGS if f not in ('--val-split', 'test[:15]')]
    main([*flags, '--batch-size', '12', '--epochs', '1', '--output', str(tmp_path)])
    folder = tmp_path / 'run'
    before = {name: (folder / name).read_bytes() for name in ('args.yaml', 'result.json', 'best.safetensors')}
    with pytest.raises(InputError, match='is trained to its end, where --val-fraction can change nothing'):
        main(['--resume', str(folder), '--val-fraction', '0'])
    assert before == {name: (folder / name).read_bytes() for name in before}
    path = folder / 'args.yaml'
    again = ['--resume', str(folder)]
    assert find_changes_of_finished(parse_args([*again, '--val-fraction', '0.1']), path) == []  # as without the flag
    assert find_changes_of_finished(parse_args([*again, '--dataset', 'copy/of/sample']), path) == []
    assert find_changes_of_finished(parse_args([*again, '--dataset', 'hfds/other']), path) == ['dataset']


@pytest.mark.parametrize('flags', [['--test-split', 'test[:24]'], ['--test-split', ''], ['--val-split', 'test[24:36]']])
def test_splits_that_are_pooled_cannot_change_where_they_are_measured_alone(tmp_path, flags):
    path = tmp_path / 'args.yaml'
    begun = ['--output', str(tmp_path), '--val-split', 'test[36:48]', '--test-split', 'test[48:60]']
    path.write_text(dump_args(parse_args([*begun, '--pool', '65', '15', '20'])))
    asked = ['--resume', str(tmp_path), '--eval-only', *flags]
    with pytest.raises(InputError, match=f'^{flags[0]} cannot change in a run that is resumed: the images would'):
        check_resumed(parse_args(asked), path)
    path.write_text(dump_args(parse_args(begun)))
    check_resumed(parse_args(asked), path)


def test_parts_of_a_pool_that_were_held_out_are_measured_again(tmp_path):
    flags = [f for f in FLAGS if f not in ('--val-split', 'test[:15]')]
    pooled = ['--test-split', 'test[15:40]', '--pool', '65', '15', '20']
    result = main([*flags, '--batch-size', '12', '--epochs', '1', '--output', str(tmp_path), *pooled])
    again = main(['--resume', str(tmp_path / 'run'), '--eval-only'])
    assert again['test']['loss'] == pytest.approx(result['test']['loss'], rel=1e-5)


def test_trackers_count_on_where_updates_have_more_images(tmp_path):
    flags = [*FLAGS, '--output', str(tmp_path), '--report-to', 'tensorboard']
    main([*flags, '--batch-size', '6', '--epochs', '2'])  # 12 updates
    for batch_size, epochs in ((12, 3), (3, 4)):  # 6 of which stand for those, and 3 more; 36, and 12 more
        main(['--resume', str(tmp_path / 'run'), '--batch-size', str(batch_size), '--epochs', str(epochs)])
    seen = EventAccumulator(str(tmp_path / 'run' / 'timm-tmblock')).Reload()
    assert [event.step for event in seen.Scalars('eval/top1')] == [6, 12, 15, 48]


def test_result_names_every_machine_a_run_was_on(tmp_path, monkeypatch):
    flags = [*FLAGS, '--batch-size', '12', '--output', str(tmp_path)]
    for machine, epochs in (('one machine', '1'), ('another', '2'), ('one machine', '3')):
        monkeypatch.setattr('train.train.describe_hardware', lambda *args, name=machine: name)
        result = main([*flags, '--epochs', epochs])
        flags = ['--resume', str(tmp_path / 'run')]
    assert result['hardware'] == 'one machine, then another'


def test_run_that_ended_before_its_first_checkpoint_is_begun_again(tmp_path, monkeypatch):
    flags = [*FLAGS, '--batch-size', '12', '--output', str(tmp_path), '--epochs', '1']
    Trainer(parse_args(flags)).start_record(ExitStack())  # killed here
    monkeypatch.setattr('train.train.open_splits', lambda *args: pytest.fail('that is soon enough'))
    with pytest.raises(InputError, match='that run ended before its first; begin it again with the same command'):
        main(['--resume', str(tmp_path / 'run')])
    monkeypatch.undo()
    assert main(flags)['epochs'] == 1


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('finished')
    main([*FLAGS, '--batch-size', '12', '--output', str(folder), '--epochs', '1'])
    return folder


@pytest.mark.parametrize('flags', [
    ['--opt', 'momentum'], ['--opt-args', 'amsgrad=True'], ['--opt-betas', '0.5', '0.6'], ['--weight-decay', '0.5'],
    ['--momentum', '0.5'], ['--opt-eps', '1e-5'], ['--eval-metric', 'loss'],
    ['--seed', '7'], ['--experiment', 'other'], ['--output', 'elsewhere'], ['--pretrained'],
    ['--initial-checkpoint', 'x.safetensors'], ['--val-split', 'test[24:30]'], ['--train-split', 'train[36:72]'],
    ['--split-seed', '1'], ['--pool', '65', '15', '20']])
def test_what_a_checkpoint_settles_cannot_change(finished, flags):
    before = {p: p.read_bytes() for p in finished.rglob('*') if p.is_file()}
    message = f'^{flags[0]} cannot change in a run that is resumed'
    for eval_only in ([], ['--eval-only']):
        if not eval_only or flags[0] in ('--train-split', '--split-seed', '--pool'):
            with pytest.raises(InputError, match=message):
                main(['--resume', str(finished / 'run'), '--epochs', '2', *flags, *eval_only])
    assert {p: p.read_bytes() for p in finished.rglob('*') if p.is_file()} == before


def test_finished_run_without_checkpoints_is_not_written_over(tmp_path, finished):
    shutil.copytree(finished / 'run', tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints')
    with pytest.raises(InputError, match='already holds a run'):
        main([*FLAGS, '--output', str(tmp_path)])
