"""The training script: what it writes, and what it says to bad input."""
import csv
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate.commands.config import load_config_from_file
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from timm_tmblock.checkpoint import load_model, read_description, save_weights
from timm_tmblock.errors import InputError
from train.augment import create_policy
from train.checkpoint import find_checkpoints
from train.config import create_parser, parse_args
from train.inputs import create_data_config
from train.optim import create_optimizer, create_schedule, resolve_lr
from train.train import Trainer, main

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures('fresh_accelerate')
RECIPES = sorted(ROOT.glob('train/recipes/*/*.yaml'))
TINY = ['--train-split', 'train[:36]', '--val-split', 'test[:15]', '--batch-size', '12', '--epochs', '2',
        '--device', 'cpu', '--report-to', 'none', '--experiment', 'run']


def run_tiny(folder, *flags):
    return main([*TINY, '--output', str(folder), *flags])


def run_command(*flags, launch=(sys.executable,), **kwargs):
    return subprocess.run(
        [*launch, str(ROOT / 'train' / 'train.py'), *flags], capture_output=True, text=True, cwd=ROOT, **kwargs)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The output folder of `python train/train.py` and what it printed."""
    folder = tmp_path_factory.mktemp('finished')
    flags = [f if f != 'none' else 'tensorboard' for f in TINY]
    run = run_command(*flags, '--output', str(folder), '--model-ema', '--smoothing', '0.1', '--log-interval', '1')
    assert run.returncode == 0, run.stderr[-2000:]
    return folder / 'run', run


def test_last_line_is_the_result_as_json(finished):
    folder, run = finished
    result = json.loads(run.stdout.splitlines()[-1])
    assert result['model'] == 'rn26_tm' and result['parameters'] == 983_032 and result['epochs'] == 2
    assert result['history'][-1] == result['last']
    assert result['best']['top1'] == max(max(row['eval_top1'], row['eval_ema_top1']) for row in result['history'])
    for row in result['history']:
        assert row['train_loss'] == pytest.approx((row['train_class_loss'] + row['train_patch_loss']) / 2)
        right = row['train_top1'] * 36 / 100  # of 36 images
        assert right == pytest.approx(round(right), abs=1e-3)
    assert any(row['train_top1'] >= 100 / 36 for row in result['history'])


def test_progress_and_tensorboard_are_written(finished):
    folder, run = finished
    assert re.search(r'Epoch 2/2: 100%.*3/3.*class_loss=.*top1=.*img/s=', run.stderr)
    events = EventAccumulator(str(folder / 'timm-tmblock'))
    events.Reload()
    logged = events.Scalars('eval/top1')
    assert [event.step for event in logged] == [3, 6]
    history = json.loads(run.stdout.splitlines()[-1])['history']
    assert [event.value for event in logged] == pytest.approx([row['eval_top1'] for row in history])
    losses = events.Scalars('train/loss')  # of each update, at the last those of the epoch
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    assert [losses[i].value for i in (2, 5)] == pytest.approx([row['train_loss'] for row in history])
    assert [event.value for event in events.Scalars('lr')][-1] == pytest.approx(history[-1]['lr'])
    assert all(event.value > 0 for event in events.Scalars('images_per_second'))


def test_summary_has_a_row_an_epoch(finished):
    folder, run = finished
    rows = list(csv.DictReader((folder / 'summary.csv').open()))
    history = json.loads(run.stdout.splitlines()[-1])['history']
    assert [float(r['eval_top1']) for r in rows] == [h['eval_top1'] for h in history]
    assert yaml.safe_load((folder / 'args.yaml').read_text())['smoothing'] == 0.1


@pytest.mark.parametrize('name', ['last', 'best'])
def test_weights_load_in_timm_and_score_what_was_recorded(finished, name):
    folder, run = finished
    path = folder / f'{name}.safetensors'
    model = timm.create_model('rn26_tm', pretrained=True, pretrained_cfg_overlay=dict(file=str(path))).eval()
    assert read_description(path)['label_names'][3] == 'cat'
    described = load_model(path)
    assert described.pretrained_cfg['label_names'][3] == 'cat'
    loader = Trainer(parse_args([*TINY, '--output', str(folder / 'other')])).val_loader
    result = json.loads(run.stdout.splitlines()[-1])
    best = result['best']
    expected = best['top1'] if name == 'best' else result['last']['eval_ema_top1']
    correct = 0
    with torch.no_grad():
        for images, targets in loader.epoch(0):
            assert torch.equal(model(images), described(images))
            correct += (model(images).argmax(1) == targets).sum().item()
    assert 100 * correct / 15 == pytest.approx(expected)


def test_auxiliary_head_leaves_nothing_in_the_weights(tmp_path):
    result = run_tiny(tmp_path, '--model', 'rn26', '--aux-head', '--model-ema')
    assert result['parameters'] == 964_058
    assert 'train_patch_loss' in result['history'][0]
    baseline = timm.create_model('rn26')
    for name in ('best', 'last'):
        assert load_file(tmp_path / 'run' / f'{name}.safetensors').keys() == baseline.state_dict().keys()
    assert type(load_model(tmp_path / 'run' / 'best.safetensors')) is type(baseline)


@pytest.mark.parametrize('flags, size, kept, reduction', [
    (['64'], (64, 64), 64, 8), (['64', '64'], (64, 64), 64, 8), (['48', '96'], (48, 96), [48, 96], 4)])
def test_image_size_reaches_data_model_and_weights(tmp_path, flags, size, kept, reduction):
    result = run_tiny(tmp_path, '--model', 'rn26_tm', '--img-size', *flags, '--epochs', '1')
    assert result['parameters'] == 983_032
    path = tmp_path / 'run' / 'last.safetensors'
    model = load_model(path)
    assert model.img_size == size and model.patch_reduction == reduction
    assert read_description(path)['input_size'] == [3, *size]
    settings = (path.parent / 'args.yaml').read_text()
    assert yaml.safe_load(settings)['img_size'] == kept and '&' not in settings
    again = Trainer(parse_args(['--resume', str(path.parent), '--epochs', '2', '--device', 'cpu']))
    begun = Trainer(parse_args([
        *TINY[:-1], 'new', '--initial-checkpoint', str(path), '--output', str(tmp_path)]))
    assert again.data_config.input_size == begun.data_config.input_size == (3, *size)


def test_updates_and_rates_are_counted_with_mixup_accumulation_and_clipping(tmp_path):
    result = run_tiny(
        tmp_path, '--mixup', '0.2', '--cutmix', '1', '--smoothing', '0.1', '--grad-accum-steps', '3',
        '--clip-grad', '1', '--opt', 'sgd', '--lr', '0.1', '--sched', 'step', '--decay-epochs', '1',
        '--decay-rate', '0.5', '--batch-size', '6', '--no-channels-last', '--padding-mode', 'constant')
    state = json.loads((find_checkpoints(tmp_path / 'run')[-1] / 'state.json').read_text())
    assert state['update'] == 4  # 36 images: 6 batches, 2 updates an epoch
    assert result['last']['lr'] == pytest.approx(0.05)


@pytest.mark.parametrize('clipping', [[], ['--clip-grad', '0.01']])
def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path, clipping):
    flags = ['--opt', 'momentum', '--lr', '0.1', '--momentum', '0', '--weight-decay', '0', '--padding', '0',
             '--hflip', '0']
    gradients = []
    for extra in (['--batch-size', '12'], ['--batch-size', '4', '--grad-accum-steps', '3']):
        trainer = Trainer(parse_args([*TINY, '--output', str(tmp_path), *flags, *extra, *clipping]))
        for m in trainer.model.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.momentum = 0.  # statistics of a smaller batch differ, so use the running ones
        batches = trainer.train_loader.epoch(0)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        steps = 3 if '--grad-accum-steps' in extra else 1
        for images, targets in (next(batches) for _ in range(steps)):
            trainer.model.eval()
            trainer.model.training = True  # patch supervision with fixed statistics
            trainer.step(images, targets)
        assert trainer.state.update == 1
        gradients.append({n: before[n] - p.detach() for n, p in trainer.model.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('flags', [['--aa', 'trivial'], ['--memory-limit', '0']])
def test_terminated_run_exits_as_one_that_was_and_keeps_its_checkpoint(tmp_path, flags):
    """SIGTERM to all its processes, as Slurm and containers send it."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / 'train' / 'train.py'), *TINY, '--epochs', '500', '--checkpoint-interval', '1',
         '--workers', '2', '--output', str(tmp_path), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 300
    while not find_checkpoints(tmp_path / 'run') and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM, error
    assert re.search(r'^error: Interrupted .* continue with --resume', error.splitlines()[-1])
    assert find_checkpoints(tmp_path / 'run')
    assert not list((tmp_path / 'run' / 'checkpoints').glob('.*'))


def test_full_disk_leaves_the_earlier_weights(tmp_path):
    """The file size limit stands in for the disk: both make a write fail half-way."""
    path = tmp_path / 'x.safetensors'
    save_weights(path, {'w': torch.ones(3)}, {})
    before = path.read_bytes()
    code = (
        'import torch\n'
        'from timm_tmblock.checkpoint import save_weights\n'
        'from timm_tmblock.errors import InputError\n'
        f'try: save_weights({str(path)!r}, {{"w": torch.ones(1_000_000)}}, {{}})\n'
        'except InputError as e: print("refused:", e)\n')

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, preexec_fn=limit)
    assert run.stdout.startswith(f'refused: Cannot write {path}'), run.stderr
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


ACCELERATE = ['accelerate.commands.launch', '--cpu', '--num_processes=1', '--num_machines=1', '--mixed_precision=bf16',
              '--dynamo_backend=no']


def test_settings_of_the_launcher_are_the_runs(tmp_path):
    run = run_command(
        *TINY, '--img-size', '8', '--epochs', '1', '--batch-size', '6', '--output', str(tmp_path),
        launch=[sys.executable, '-m', *ACCELERATE], env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count('writing to') == run.stdout.count('{"model"') == 1
    result = json.loads(run.stdout.splitlines()[-1])
    assert result['processes'] == 1 and result['mixed_precision'] == 'bf16'
    state = json.loads((find_checkpoints(tmp_path / 'run')[-1] / 'state.json').read_text())
    assert state['update'] == 6
    correct = result['last']['eval_top1'] * 15 / 100
    assert correct == pytest.approx(round(correct), abs=1e-6)  # of exactly 15 images


def test_flags_override_the_recipe(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(
        'lr: 1e-2\nepochs: 7\nmodel_ema: true\nmodel_kwargs: {patch_size: 3}\nmean: [0.5, 0.5, 0.4]\ndrop: null\n')
    args = parse_args(['-c', str(recipe), '--epochs', '3'])
    assert (args.lr, args.epochs, args.model_ema, args.drop) == (0.01, 3, True, 0.)
    assert args.model_kwargs == dict(patch_size=3) and args.mean == [0.5, 0.5, 0.4]
    assert not parse_args(['-c', str(recipe), '--no-model-ema']).model_ema
    recipe.write_text('mixed_precision: no\n')  # which YAML reads as false
    args = parse_args(['-c', str(recipe), '--opt-kwargs', 'nesterov=True', '--validation-batch-size', '7'])  # timm's
    assert args.mixed_precision == 'no' and args.opt_args == dict(nesterov=True) and args.val_batch_size == 7


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_recipes_parse_and_name_what_there_is(recipe):
    args = parse_args(['-c', str(recipe)])
    assert timm.is_model(args.model)
    optimizer = create_optimizer(args, torch.nn.Conv2d(3, 4, 3), resolve_lr(args, args.batch_size))
    assert create_schedule(args, optimizer, 100)[1] >= 100 * args.epochs
    create_policy(create_data_config(args))
    assert f'-c {recipe.relative_to(ROOT)}' in recipe.read_text()  # the command that runs it


@pytest.mark.parametrize('path', sorted(ROOT.glob('train/accelerate/*.yaml')), ids=lambda p: p.stem)
def test_accelerate_configs_are_such_and_name_their_command(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1 and config.num_machines in (1, 2)
    if config.distributed_type.value in ('FSDP', 'DEEPSPEED'):  # which cast whole networks, batch norms too
        assert config.mixed_precision == 'no'
    assert f'accelerate launch --config_file {path.relative_to(ROOT)}' in path.read_text()


@pytest.mark.parametrize('text, message', [
    ('epoch: 3', 'unknown keys: epoch'), ('- 3', 'must map'), ('a: [', 'Cannot read'),
    ('lr: fast', "must be a number, not 'fast'"), ('model_ema: 3', 'must be true or false'),
    ('padding_mode: zeros', 'invalid choice'),
])
def test_bad_recipes_are_one_sentence(tmp_path, text, message):
    (tmp_path / 'recipe.yaml').write_text(text)
    with pytest.raises(InputError, match=message) as error:
        parse_args(['-c', str(tmp_path / 'recipe.yaml')])
    assert '\n' not in str(error.value)
    with pytest.raises(InputError, match=r'^There is no recipe \S+missing.yaml\.$'):
        parse_args(['-c', str(tmp_path / 'missing.yaml')])


def test_every_setting_has_a_help_text_that_renders():
    parser = create_parser()
    assert all(action.help for action in parser._actions)
    text = parser.format_help()
    assert '--patch-loss-weight' in text and '(default: None)' not in text and '(default: 0.5)' in text


@pytest.mark.parametrize('flags, message', [
    (['--model', 'rn27_tm'], "no model 'rn27_tm'"),
    (['--model-kwargs', 'depth=3'], 'depth'),
    (['--dataset', 'hfds/not/there'], 'not/there'),
    (['--train-split', 'holdout'], 'holdout'),
    (['--dataset', f'hfds/{ROOT}/train/sample'], "no column 'image', it has img, label"),
    (['--device', 'cuda'], 'no cuda device'),
    (['--mixed-precision', 'fp16'], 'GPU'),
    (['--opt', 'gradient_descent'], 'gradient_descent'),
    (['--sched', 'zigzag'], 'zigzag'),
    (['--batch-size', '50'], 'use a --batch-size of at most'),
    (['--batch-size', '0'], 'batch-size'),
    (['--mean', '0.5'], '3 values'),
    (['--pretrained', '--model', 'rn20'], 'No pretrained weights'),
    (['--patch-loss-weight', '2'], '--patch-loss-weight: must be from 0 to 1'),
    (['--lr', '1e30', '--opt', 'sgd'], r'not finite in update 2, .* rate 9\.3.*e\+29; there was no checkpoint'),
    (['--resume', 'nowhere'], 'no experiment folder nowhere'),
    (['--output', f'{ROOT}/README.md'], 'Cannot write'),
    (['--no-such-flag'], 'no-such-flag'),
])
def test_bad_input_is_one_sentence(tmp_path, flags, message):
    if '--device' in flags and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    with pytest.raises(InputError, match=message) as error:
        run_tiny(tmp_path, *flags)
    assert '\n' not in str(error.value)


def test_run_is_not_written_over(tmp_path):
    run_tiny(tmp_path, '--epochs', '1')
    with pytest.raises(InputError, match='already holds a run'):
        run_tiny(tmp_path, '--epochs', '1')


def test_resuming_another_model_is_refused(tmp_path):
    run_tiny(tmp_path, '--epochs', '1')
    before = {p: p.read_bytes() for p in (tmp_path / 'run').glob('*.safetensors')}
    with pytest.raises(InputError, match=r'does not fit this run \(Unexpected key.* "tm\.'):
        run_tiny(tmp_path, '--model', 'rn26', '--resume', str(tmp_path / 'run'))
    assert all(p.read_bytes() == content for p, content in before.items())


def test_damaged_image_stops_before_training(tmp_path):
    for split in ('train', 'validation'):
        for name in ('ant', 'bee'):
            folder = tmp_path / 'images' / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f'{i}.png')
    flags = ['--dataset', str(tmp_path / 'images'), '--train-split', 'train', '--val-split', 'validation',
             '--batch-size', '2', '--epochs', '1']
    result = run_tiny(tmp_path, *flags)
    assert result['num_classes'] == 2
    damaged = tmp_path / 'images' / 'train' / 'bee' / '1.png'
    damaged.write_bytes(damaged.read_bytes()[:500])
    with pytest.raises(InputError, match=r'cannot be read.*bee/1\.png'):
        run_tiny(tmp_path, *flags, '--experiment', 'damaged')
    assert not (tmp_path / 'damaged').exists()


def test_command_exits_with_2_and_one_line(forks):
    run = forks.run(ROOT / 'train' / 'train.py', '--model', 'nothing')
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: timm has no model 'nothing'")
    assert 'Traceback' not in run.stderr
