"""Settings of the training script: each has the effect its name says."""
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models import group_parameters, save_for_hf
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from timm_tmblock import PatchSupervised, explain
from timm_tmblock.checkpoint import load_model, save_weights
from timm_tmblock.errors import InputError
from timm_tmblock.models._labels import CIFAR10_LABELS
from train.checkpoint import find_checkpoints
from train.config import SETTINGS, dump_args, parse_args
from train.data import decode, open_named
from train.engine import create_accelerator
from train.inputs import create_data_config, create_loader
from train.model import network
from train.optim import create_optimizer, create_schedule, resolve_lr
from train.record import create_folder_name
from train.train import Trainer, main

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures('fresh_accelerate')
TINY = ['--train-split', 'train[:36]', '--val-split', 'test[:15]', '--batch-size', '12', '--epochs', '1',
        '--device', 'cpu', '--report-to', 'none', '--experiment', 'run']


def create_trainer(tmp_path, *flags) -> Trainer:
    return Trainer(parse_args([*TINY, '--output', str(tmp_path), *flags]))


def test_recipe_may_name_the_run_that_is_resumed(tmp_path):
    (tmp_path / SETTINGS).write_text(dump_args(parse_args(['--lr', '0.3', '--epochs', '7', '--experiment', 'x'])))
    (tmp_path / 'r.yaml').write_text(f'resume: {tmp_path}\nepochs: 9\n')
    args = parse_args(['-c', str(tmp_path / 'r.yaml')])
    assert (args.lr, args.epochs, args.experiment, args.resume) == (0.3, 9, 'x', str(tmp_path))


@pytest.mark.parametrize('flags', [
    [], ['--push-to-hub', 'me/x', '--hub-private', '--no-model-ema', '--pool', '65', '15', '20'], ['--kd-checkpoint']])
def test_settings_of_a_run_are_read_back_as_they_were(tmp_path, flags):
    args = parse_args(flags)
    (tmp_path / SETTINGS).write_text(dump_args(args))
    resumed = vars(parse_args(['--resume', str(tmp_path)]))
    assert resumed.pop('resume') == str(tmp_path)
    assert {**resumed, 'resume': None} == vars(args)


def gradients_after_clipping(tmp_path, monkeypatch, *flags):
    trainer = create_trainer(tmp_path, '--opt', 'momentum', '--lr', '0', *flags)
    seen = {}
    step = type(trainer.optimizer.optimizer).step

    def record(self, *args, **kwargs):
        seen.update({n: p.grad.clone() for n, p in trainer.plain_model.named_parameters()})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(type(trainer.optimizer.optimizer), 'step', record)
    trainer.model.train()
    trainer.step(*next(trainer.train_loader.epoch(0)))
    monkeypatch.undo()
    return seen, dict(trainer.plain_model.named_parameters())


def test_gradients_are_clipped_as_the_mode_says(tmp_path, monkeypatch):
    plain, weights = gradients_after_clipping(tmp_path, monkeypatch)
    norm = torch.cat([g.flatten() for g in plain.values()]).norm()
    clipped, _ = gradients_after_clipping(tmp_path, monkeypatch, '--clip-grad', '0.1')
    for name in plain:
        torch.testing.assert_close(clipped[name], plain[name] * 0.1 / norm, rtol=1e-3, atol=1e-7)
    clipped, _ = gradients_after_clipping(tmp_path, monkeypatch, '--clip-grad', '1e-3', '--clip-mode', 'value')
    for name in plain:
        torch.testing.assert_close(clipped[name], plain[name].clamp(-1e-3, 1e-3), rtol=1e-3, atol=1e-7)
    clipped, _ = gradients_after_clipping(tmp_path, monkeypatch, '--clip-grad', '1e-3', '--clip-mode', 'agc')
    for name in list(plain)[-2:]:  # the classifier is exempt
        torch.testing.assert_close(clipped[name], plain[name], rtol=1e-3, atol=1e-7)
    for name in list(plain)[:-2]:
        if plain[name].ndim == 4:
            w, g = (t.flatten(1).norm(dim=1) for t in (weights[name], plain[name]))
            bound = 1e-3 * w.clamp(min=1e-3)
            torch.testing.assert_close(
                clipped[name].flatten(1).norm(dim=1), torch.minimum(g, bound), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize('aux', [False, True])
def test_layer_decay_scales_the_learning_rate_from_the_last_layer_down(tmp_path, aux):
    model = ['--model', 'rn26', '--aux-head'] if aux else []
    trainer = create_trainer(tmp_path, '--layer-decay', '0.5', '--lr', '1', *model)
    scales = {id(p): g['lr_scale'] for g in trainer.optimizer.param_groups for p in g['params']}
    by_name = {n: scales[id(p)] for n, p in trainer.plain_model.named_parameters()}
    prefix = 'model.' if aux else ''
    assert trainer.lr == trainer.peak_lr == 1
    assert by_name[f'{prefix}fc.weight'] == 1 and by_name[f'{prefix}conv1.weight'] == min(by_name.values()) < 0.01
    if aux:
        assert {v for n, v in by_name.items() if n.startswith('aux.')} == {1}


def test_layers_of_a_supervised_baseline_are_those_of_the_baseline():
    baseline = timm.create_model('rn26')
    layers = group_parameters(baseline, baseline.group_matcher(), reverse=True)
    supervised = PatchSupervised(baseline)
    wrapped = group_parameters(supervised, supervised.group_matcher(), reverse=True)
    assert {n: wrapped[f'model.{n}'] for n in layers} == layers
    assert {v for n, v in wrapped.items() if n.startswith('aux.')} == {max(layers.values())}


@pytest.mark.parametrize('flags, images, expected', [
    ([], 512, 1e-3), (['--lr', '0.3', '--lr-base', '0.1'], 512, 0.3), (['--lr-base', '0.1'], 1024, 0.2),
    (['--lr-base', '0.1', '--opt', 'lamb'], 1024, 0.2), (['--lr-base', '0.1', '--opt', 'muon'], 1024, 0.4),
    (['--lr-base', '0.1', '--lr-base-scale', 'linear'], 1024, 0.4),
    (['--lr-base', '0.1', '--opt', 'sgd', '--lr-base-scale', 'sqrt'], 1024, 0.2),
    (['--lr-base', '0.1', '--opt', 'sgd', '--lr-base-size', '128'], 64, 0.05),
])
def test_learning_rate_scales_with_the_images_of_an_update(flags, images, expected):
    assert resolve_lr(parse_args(flags), images) == pytest.approx(expected)


def test_learning_rate_of_a_recipe_yields_to_that_of_the_command_line(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('lr: 0.015\n')
    assert resolve_lr(parse_args(['-c', str(recipe)]), 512) == 0.015
    assert resolve_lr(parse_args(['-c', str(recipe), '--lr-base', '0.1']), 1024) == pytest.approx(0.2)
    trainer = create_trainer(tmp_path, '-c', str(recipe), '--lr-base', '0.256', '--lr-base-size', '12')
    assert trainer.lr == pytest.approx(0.256)
    assert trainer.args.lr is None and trainer.args.lr_base == 0.256  # what another number of GPUs scales anew
    flags = ['--opt', 'sgd', '--lr-base', '0.1', '--lr-base-size', '12', '--grad-accum-steps', '3']
    assert create_trainer(tmp_path, *flags).peak_lr == pytest.approx(0.3)  # an update has 36 images
    trainer = create_trainer(tmp_path, '--lr', '0.3', '--warmup-epochs', '1')
    assert trainer.peak_lr == 0.3 > trainer.lr  # which warms up


@pytest.mark.parametrize('recipe, flags, expected', [
    ('val_fraction: 0', ['--val-split', 'test'], dict(val_split='test', val_fraction=None)),
    ('val_fraction: 0', ['--pool', '65', '15', '20'], dict(pool=[65, 15, 20], val_fraction=None)),
    ('val_split: test', ['--val-fraction', '0.2'], dict(val_split=None, val_fraction=0.2)),
    ('{kd_model_name: [rn26], kd_checkpoint: [a]}', ['--kd-checkpoint'], dict(kd_model_name=None, kd_checkpoint=[])),
    ('kd_checkpoint: a', ['--kd-model-name', 'rn26_tm'], dict(kd_model_name=['rn26_tm'], kd_checkpoint=None)),
    ('opt_kwargs: {nesterov: true}', [], dict(opt_args=dict(nesterov=True))),  # another name of a flag
    ('validation_batch_size: 7', [], dict(val_batch_size=7)),
    ('max_steps: 3', ['--epochs', '30'], dict(max_steps=None, epochs=30)),  # which is the default, but was given
    ('max_steps: 3', [], dict(max_steps=3, epochs=30)),
])
def test_settings_that_say_the_same_replace_those_of_a_recipe(tmp_path, recipe, flags, expected):
    (tmp_path / 'recipe.yaml').write_text(recipe + '\n')
    args = vars(parse_args(['-c', str(tmp_path / 'recipe.yaml'), *flags]))
    assert {key: args[key] for key in expected} == expected


def test_memory_without_limit_and_empty_words_are_taken(tmp_path):
    (tmp_path / 'recipe.yaml').write_text('memory_limit: .inf\n')
    args = parse_args(['-c', str(tmp_path / 'recipe.yaml'), '--model-kwargs', '', 'patch_size=3'])
    assert args.memory_limit == float('inf') and args.model_kwargs == dict(patch_size=3)
    (tmp_path / 'args.yaml').write_text(dump_args(args))
    assert parse_args(['-c', str(tmp_path / 'args.yaml')]).memory_limit == float('inf')


def test_runs_that_begin_at_once_have_folders_of_their_own(tmp_path):
    flags = [f for f in TINY if f not in ('--experiment', 'run')]
    names = {create_folder_name(parse_args([*flags, '--output', str(tmp_path)])) for _ in range(3)}
    assert len(names) == 3 and all(name.name.split('-')[2] == 'rn26_tm' for name in names)


@pytest.mark.parametrize('metric, top1s, best_epoch, other', [
    ('top1', (50., 60., 40.), 1, 0), ('loss', (50., 60., 40.), 2, 0), ('top1', (60., 60., 60.), 2, 0),
    ('balanced_accuracy', (60., 50., 70.), 1, 0)])
def test_weights_are_chosen_by_the_metric_and_among_ties_by_the_loss(
        tmp_path, monkeypatch, metric, top1s, best_epoch, other):
    told = iter([
        dict(top1=top1, top5=90., balanced_accuracy=100 - top1, loss=loss) for top1, loss in zip(top1s, (2., 3., 1.))])
    monkeypatch.setattr(Trainer, 'measure', lambda *args: next(told))
    flags = ['--epochs', '3', '--max-steps', '9', '--eval-metric', metric, '--checkpoint-hist', '2']
    result = main([*TINY, '--output', str(tmp_path), *flags])
    assert result['best']['epoch'] == best_epoch
    kept = sorted(path.stem for path in (tmp_path / 'run' / 'history').iterdir())
    assert kept == [f'epoch-{other:04d}', f'epoch-{best_epoch:04d}']
    best = load_file(tmp_path / 'run' / 'best.safetensors')
    chosen = load_file(tmp_path / 'run' / 'history' / f'{kept[-1]}.safetensors')
    assert all(torch.equal(best[key], chosen[key]) for key in best)


@pytest.mark.parametrize('flags, updates, shape', [
    (['--sched', 'poly', '--decay-rate', '1', '--epochs', '4'], 40, {0: 1, 20: 0.5, 39: 0.025}),
    (['--sched', 'poly', '--decay-rate', '1', '--max-steps', '25'], 25, {0: 1, 5: 0.8, 24: 0.04}),
    (['--sched', 'step', '--decay-epochs', '2', '--epochs', '4'], 40, {0: 1, 19: 1, 20: 0.1}),
    (['--sched', 'step', '--epochs', '100'], 1000, {899: 1, 900: 0.1}),
    (['--sched', 'multistep', '--decay-milestones', '1', '3', '--epochs', '4'], 40, {8: 1, 10: 0.1, 28: 0.1, 30: 0.01}),
    (['--sched', 'constant', '--warmup-epochs', '2', '--warmup-lr', '0', '--epochs', '4'], 40, {0: 0, 10: 0.5, 20: 1}),
    (['--sched', 'cosine', '--epochs', '3', '--cooldown-epochs', '1', '--min-lr', '0.01'], 40, {15: 0.505, 35: 0.01}),
    (['--sched', 'cosine', '--epochs', '3', '--warmup-epochs', '1', '--warmup-prefix'], 40, {10: 1}),
    (['--sched', 'cosine', '--epochs', '2', '--lr-cycle-limit', '2', '--lr-cycle-decay', '0.5'], 40,
     {0: 1, 10: 0.5, 20: 0.5, 30: 0.25}),
    (['--sched', 'wsd', '--decay-epochs', '0.5', '--epochs', '4'], 40, {0: 1, 20: 1, 25: 0.5, 30: 1 - 0.5 ** 0.5}),
])
def test_schedule_is_stepped_by_updates(flags, updates, shape):
    args = parse_args(['--lr', '1', *flags])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.)
    scheduler, n = create_schedule(args, optimizer, updates_per_epoch=10)
    assert n == updates
    for update, lr in shape.items():
        scheduler.step_update(update)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(lr), update


def test_max_steps_end_the_run_within_an_epoch(tmp_path):
    result = main([*TINY, '--output', str(tmp_path), '--max-steps', '5'])
    assert (result['updates'], result['epochs'], len(result['history'])) == (5, 2, 2)
    assert json.loads((find_checkpoints(tmp_path / 'run')[-1] / 'state.json').read_text())['update'] == 5


def test_weights_that_were_never_validated_can_be(tmp_path):
    flags = [f for f in TINY if f not in ('--val-split', 'test[:15]')]
    main([*flags, '--val-fraction', '0', '--output', str(tmp_path), '--max-steps', '1'])
    measured = main(['--resume', str(tmp_path / 'run'), '--eval-only', '--val-split', 'test[:15]'])
    assert measured['weights'].endswith('last.safetensors')
    (images, targets), = create_trainer(tmp_path / 'other').val_loader.epoch(0)
    with torch.no_grad():
        right = (load_model(tmp_path / 'run' / 'last.safetensors')(images).argmax(1) == targets).double().mean()
    assert measured['validation']['top1'] == pytest.approx(100 * right.item())


def test_adaptive_clipping_leaves_out_each_of_several_heads(tmp_path, monkeypatch):
    flags = ['--model', 'deit_tiny_distilled_patch16_224', '--img-size', '32', '--model-kwargs', 'depth=1']
    plain, _ = gradients_after_clipping(tmp_path, monkeypatch, *flags)
    clipped, _ = gradients_after_clipping(
        tmp_path, monkeypatch, *flags, '--clip-grad', '1e-4', '--clip-mode', 'agc')
    heads = [name for name in plain if name.startswith('head')]
    assert len(heads) == 4 and all(torch.equal(clipped[name], plain[name]) for name in heads)
    assert clipped['blocks.0.mlp.fc1.weight'].norm() < plain['blocks.0.mlp.fc1.weight'].norm()


def test_validation_interval_history_and_test_part(tmp_path):
    flags = ['--epochs', '4', '--val-interval', '2', '--checkpoint-hist', '1', '--test-split', 'test[15:40]', '--tta',
             'flip']
    result = main([*TINY, '--output', str(tmp_path), *flags])
    assert ['eval_top1' in row for row in result['history']] == [False, True, False, True]
    assert result['images'] == dict(train=36, validation=15, test=25)
    best = result['best']['epoch']
    assert [p.name for p in (tmp_path / 'run' / 'history').iterdir()] == [f'epoch-{best:04d}.safetensors']
    kept = load_file(tmp_path / 'run' / 'history' / f'epoch-{best:04d}.safetensors')
    chosen = load_file(tmp_path / 'run' / 'best.safetensors')
    assert all(torch.equal(kept[k], chosen[k]) for k in chosen)

    loader = create_trainer(tmp_path / 'other', '--test-split', 'test[15:40]').test_loader
    model = load_model(tmp_path / 'run' / 'best.safetensors')
    (images, targets), = loader.epoch(0)
    with torch.no_grad():
        logits, mirrored = model(images), model(images.flip(3))
    for prefix, output in (('', logits), ('flip_', (logits + mirrored) / 2)):
        hits = (output.argmax(1) == targets).double().mean().item()
        assert result['test'][f'{prefix}top1'] == pytest.approx(100 * hits)
        assert result['test'][f'{prefix}loss'] == pytest.approx(F.cross_entropy(output, targets).item(), rel=1e-4)


def test_loss_that_is_not_a_number_is_the_worst(tmp_path, monkeypatch):
    losses = iter([math.nan, 2., 3.])
    monkeypatch.setattr('train.train.validate', lambda *args, **kwargs: dict(
        loss=next(losses), top1=10., top5=50., balanced_accuracy=10.))
    result = main([
        *TINY, '--output', str(tmp_path), '--epochs', '3', '--eval-metric', 'loss', '--checkpoint-hist', '1'])
    assert result['best']['epoch'] == 1
    assert [p.name for p in (tmp_path / 'run' / 'history').iterdir()] == ['epoch-0001.safetensors']


def test_without_validation_the_last_weights_are_tested(tmp_path):
    flags = [f for f in TINY if f not in ('--val-split', 'test[:15]')]
    result = main([*flags, '--output', str(tmp_path), '--val-fraction', '0', '--test-split', 'test[:15]'])
    assert result['best'] is None and result['test']['weights'] == 'last'
    assert not (tmp_path / 'run' / 'best.safetensors').exists()


def test_eval_only_measures_what_training_recorded_and_writes_nothing(tmp_path, monkeypatch):
    result = main([*TINY, '--output', str(tmp_path), '--test-split', 'test[15:40]'])
    settings = tmp_path / 'run' / SETTINGS
    settings.write_text(settings.read_text().replace('push_to_hub: null', 'push_to_hub: me/run'))
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    monkeypatch.setattr('train.train.check_push', lambda *args: pytest.fail('nothing is pushed'))
    measured = main(['--resume', str(tmp_path / 'run'), '--eval-only'])
    assert measured['validation']['top1'] == result['best']['top1']
    assert measured['test']['loss'] == pytest.approx(result['test']['loss'], rel=1e-6)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == files
    best = str(tmp_path / 'run' / 'best.safetensors')
    measured = main([*TINY, '--output', str(tmp_path / 'new'), '--initial-checkpoint', best, '--eval-only'])
    assert measured['validation']['top1'] == result['best']['top1'] and measured['weights'] == best
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('start', [
    ['--pretrained'],
    ['--initial-checkpoint', str(ROOT / 'timm_tmblock' / 'weights' / 'rn26_tm.cifar10.safetensors')],
])
def test_what_measures_weights_from_elsewhere_is_named(start):
    with pytest.raises(InputError, match='may have seen all training images.* or the --val-fraction that was held out'):
        main([*start, '--eval-only', '--device', 'cpu', '--report-to', 'none'])
    part = ['--train-split', 'train[:200]', '--val-fraction', '0.1']
    measured = main([*start, *part, '--eval-only', '--device', 'cpu', '--report-to', 'none'])
    assert 'top1' in measured['validation'] and 'test' not in measured


def test_measuring_without_images_is_refused(tmp_path):
    flags = [f for f in TINY if f not in ('--val-split', 'test[:15]')]
    main([*flags, '--val-fraction', '0', '--output', str(tmp_path), '--max-steps', '1'])
    with pytest.raises(InputError, match='no images to measure the weights on; name a split with --test-split'):
        main(['--resume', str(tmp_path / 'run'), '--eval-only'])


def test_run_that_accumulates_gradients_is_measured(tmp_path):
    flags = ['--grad-accum-steps', '3', '--sched', 'wsd', '--epochs', '5']  # 3 batches of training, 1 to be measured
    result = main([*TINY, '--output', str(tmp_path), *flags])
    measured = main(['--resume', str(tmp_path / 'run'), '--eval-only'])
    assert measured['validation']['top1'] == result['best']['top1']


def save_sample(path, names=CIFAR10_LABELS):
    """A copy of those of 40 images of the sample that are of the first classes, under these names."""
    from datasets import ClassLabel, load_dataset
    sample = load_dataset(str(ROOT / 'train' / 'sample'), split='test[:40]')
    sample = sample.filter(lambda row: row['label'] < len(names)).cast_column('label', ClassLabel(names=list(names)))
    path.mkdir()
    sample.to_parquet(path / 'test.parquet')
    return ['--dataset', f'hfds/{path}', '--input-key', 'img', '--train-split', 'test[:50%]', '--val-fraction', '0',
            '--test-split', 'test[50%:]', '--device', 'cpu', '--report-to', 'none']


@pytest.mark.parametrize('start', ['--pretrained', '--initial-checkpoint', '--resume'])
def test_weights_of_other_classes_are_not_measured_nor_gone_on_with(tmp_path, start):
    mixed = [*CIFAR10_LABELS[:6], CIFAR10_LABELS[8], CIFAR10_LABELS[7], CIFAR10_LABELS[6], CIFAR10_LABELS[9]]
    flags = [start]
    if start == '--initial-checkpoint':
        flags.append(str(ROOT / 'timm_tmblock' / 'weights' / 'rn26_tm.cifar10.safetensors'))
    if start == '--resume':
        flags.append(str(tmp_path / 'run'))
        main([*(f for f in TINY if f not in ('--val-split', 'test[:15]')), '--output', str(tmp_path)])
    for name, names, message in (
            ('mixed', mixed, "have classes in another order .class 6 is 'frog' in the one and 'ship'"),
            ('two', 'ab', 'has 10 classes and .*two has 2')):
        data = save_sample(tmp_path / name, names)
        for more in [['--eval-only'], ['--epochs', '2']][:1 + (start == '--resume')]:
            with pytest.raises(InputError, match=message):
                main([*flags, *data, *more])


def test_few_images_are_measured_too(tmp_path):
    measured = main([*save_sample(tmp_path / 'few'), '--pretrained', '--eval-only'])  # no batch of training has so few
    assert measured['weights'] == 'pretrained' and measured['test']['top1'] > 80


def test_initial_checkpoint_is_where_training_starts(tmp_path):
    main([*TINY, '--output', str(tmp_path)])
    best = tmp_path / 'run' / 'best.safetensors'
    trainer = create_trainer(tmp_path / 'new', '--initial-checkpoint', str(best))
    weights = load_file(best)
    assert all(torch.equal(v, weights[k]) for k, v in trainer.plain_model.state_dict().items())
    with pytest.raises(InputError, match='holds weights of rn26_tm, not of rn38_tm'):
        create_trainer(tmp_path / 'new', '--initial-checkpoint', str(best), '--model', 'rn38_tm')


@pytest.fixture
def two_classes(tmp_path):
    for name in ('ship', 'frog'):
        folder = tmp_path / 'set' / 'train' / name
        folder.mkdir(parents=True)
        for i in range(12):
            shutil.copy(ROOT / 'train' / 'sample' / 'images' / f'{name}.png', folder / f'{i}.png')
    return tmp_path / 'set'


@pytest.mark.parametrize('weights', ['pretrained', 'cifar10', 'cifar100'])
def test_pretrained_networks_are_tuned_to_other_classes(tmp_path, two_classes, weights):
    file = ROOT / 'timm_tmblock' / 'weights' / f'rn26_tm.{weights}.safetensors'
    start = ['--pretrained'] if weights == 'pretrained' else ['--initial-checkpoint', str(file)]
    result = main([
        '--dataset', str(two_classes), '--val-fraction', '0', '--batch-size', '12', '--epochs', '1', '--device', 'cpu',
        '--lr', '0', '--report-to', 'none', '--output', str(tmp_path), '--experiment', 'run', *start])
    model = load_model(tmp_path / 'run' / 'last.safetensors')
    assert model.num_classes == model.get_patch_classifier().num_templates == 2 == result['num_classes']
    before, after = load_file(file if weights == 'cifar100' else file.with_stem('rn26_tm.cifar10')), model.state_dict()
    kept = [k for k in before if 'running' not in k and 'num_batches' not in k and before[k].shape == after[k].shape]
    assert len(kept) > 40 and all(torch.equal(before[k].float(), after[k]) for k in kept)


def test_weights_that_say_nothing_of_themselves_are_tuned_to_other_classes(tmp_path, two_classes):
    before = load_file(ROOT / 'timm_tmblock' / 'weights' / 'rn26_tm.cifar100.safetensors')
    save_file(before, tmp_path / 'foreign.safetensors')  # as timm's save_for_hf leaves them
    trainer = create_trainer(
        tmp_path, '--dataset', str(two_classes), '--train-split', 'train', '--val-split', '', '--val-fraction', '0',
        '--initial-checkpoint', str(tmp_path / 'foreign.safetensors'))
    model = trainer.plain_model
    assert model.num_classes == model.get_patch_classifier().num_templates == 2
    name = 'layer1.blocks.0.conv1.weight'
    assert torch.equal(model.state_dict()[name], before[name].float())
    save_file({'layer1.blocks.0.conv1.weight': torch.zeros(1)}, tmp_path / 'part.safetensors')
    with pytest.raises(InputError, match='These settings of rn26_tm cannot be used: size mismatch for layer1'):
        create_trainer(tmp_path, '--initial-checkpoint', str(tmp_path / 'part.safetensors'))


def test_checkpoint_brings_its_layout_and_preprocessing(tmp_path):
    theirs = [
        '--model-kwargs', 'patch_size=1', '--img-size', '24', '--mean', '0.2', '0.3', '0.4', '--crop-pct', '0.9',
        '--std', '0.3', '0.2', '0.1', '--interpolation', 'nearest', '--crop-mode', 'squash']
    result = main([*TINY, '--output', str(tmp_path), '--model', 'rn20_tm', *theirs])
    best = str(tmp_path / 'run' / 'best.safetensors')
    flags = [*TINY, '--output', str(tmp_path / 'new'), '--model', 'rn20_tm', '--initial-checkpoint', best]
    measured = main([*flags, '--eval-only'])
    assert measured['validation']['loss'] == pytest.approx(result['best']['loss'], rel=1e-6)
    trainer = create_trainer(tmp_path / 'new', *flags)
    config = trainer.data_config
    assert config.input_size == (3, 24, 24) and config.mean == (0.2, 0.3, 0.4) and config.std == (0.3, 0.2, 0.1)
    assert (config.interpolation, config.crop_mode) == ('nearest', 'squash')
    save_for_hf(load_model(best), tmp_path / 'folder', safe_serialization=True)  # as a network of the Hub
    weights = str(tmp_path / 'folder' / 'model.safetensors')
    assert create_trainer(tmp_path / 'new', *flags[:-1], weights).data_config == config
    trainer = create_trainer(tmp_path / 'new', *flags, '--model-kwargs', 'img_size=96')
    assert trainer.data_config.input_size == (3, 96, 96)
    others = ['--mean', '0.5', '0.5', '0.5', '--img-size', '64']
    trainer = create_trainer(tmp_path / 'new', *flags, *others)  # unless told otherwise
    assert trainer.data_config.mean == (0.5, 0.5, 0.5) and trainer.data_config.crop_pct == 0.9
    assert trainer.plain_model.patch_size == 1
    images = torch.zeros(1, *trainer.data_config.input_size)
    assert trainer.plain_model.eval().forward_patch_logits(images)[1].shape[2:] == (16, 16)  # not 32


def test_run_goes_on_without_the_weights_it_began_with(tmp_path):
    main([*TINY, '--output', str(tmp_path)])
    best = (tmp_path / 'run' / 'best.safetensors').rename(tmp_path / 'start.safetensors')
    main([*TINY, '--output', str(tmp_path / 'new'), '--initial-checkpoint', str(best)])
    best.unlink()
    assert main(['--resume', str(tmp_path / 'new' / 'run'), '--epochs', '2'])['epochs'] == 2


@pytest.mark.parametrize('student', ['rn26_tm', 'rn26'])
@pytest.mark.parametrize('weights, expected', [
    ([], (1, 1)), (['--task-loss-weight', '0.3'], (0.3, 0.7)), (['--distill-loss-weight', '2'], (1, 2)),
])
def test_distillation_adds_the_divergence_from_the_teacher(tmp_path, student, weights, expected):
    trainer = create_trainer(
        tmp_path, '--model', student, '--kd-model-name', 'rn26_tm', '--kd-temperature', '2',
        '--mean', '0.4', '0.5', '0.6', *weights)
    images, targets = next(trainer.train_loader.epoch(0))
    result = trainer.task(images, targets)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (trainer.data_config.mean, trainer.data_config.std))
    teacher = timm.create_model('rn26_tm', pretrained=True).eval()
    t_mean, t_std = (torch.tensor(teacher.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
    with torch.no_grad():
        logits = teacher((images * std + mean - t_mean) / t_std)
    p = (logits.double() / 2).softmax(1)
    kl = (p * (p.log() - (result['output'].double() / 2).log_softmax(1))).sum(1).mean() * 4
    assert result['kd_loss'].item() == pytest.approx(kl.item(), rel=1e-4)
    total = expected[0] * result['task_loss'] + expected[1] * result['kd_loss']
    torch.testing.assert_close(result['loss'], total)
    if student == 'rn26_tm':
        torch.testing.assert_close(result['task_loss'], (result['class_loss'] + result['patch_loss']) / 2)
    result['loss'].backward()
    assert all(p.grad is None for p in trainer.task.teachers.parameters())
    names = {n for n, _ in trainer.plain_model.named_parameters()}
    assert names == {n for n, _ in timm.create_model(student).named_parameters()}  # nothing of the teacher


def test_teacher_from_a_checkpoint_sees_images_of_its_own_size(tmp_path):
    main([*TINY, '--output', str(tmp_path), '--model', 'rn20', '--img-size', '64', '--max-steps', '1'])
    best = str(tmp_path / 'run' / 'best.safetensors')
    trainer = create_trainer(tmp_path / 'student', '--kd-checkpoint', best)
    images, _ = next(trainer.train_loader.epoch(0))
    larger = resize(images, [64, 64], InterpolationMode.BICUBIC, antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(trainer.task.teach(images), load_model(best)(larger), rtol=1e-4, atol=1e-4)


def test_teacher_is_compiled_with_the_student_and_teaches_the_same(tmp_path):
    teach = ('--model', 'rn20', '--kd-model-name', 'rn26_tm')
    plain, compiled = (create_trainer(tmp_path, *teach, *flags) for flags in ((), ('--torchcompile', 'eager')))
    assert isinstance(compiled.task.teachers[0].model, torch._dynamo.OptimizedModule)
    images, _ = next(plain.train_loader.epoch(0))
    torch.testing.assert_close(compiled.task.teach(images), plain.task.teach(images))


def test_several_teachers_teach_the_mean_of_their_logits(tmp_path):
    names = ['rn26_tm.cifar10', 'rn26.cifar10']
    trainer = create_trainer(tmp_path, '--model', 'rn20', '--mean', '0.4', '0.5', '0.6', '--kd-model-name', *names)
    images, _ = next(trainer.train_loader.epoch(0))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (trainer.data_config.mean, trainer.data_config.std))
    expected = torch.zeros(len(images), 10, dtype=torch.float64)
    for name in names:
        teacher = timm.create_model(name, pretrained=True).eval()
        t_mean, t_std = (torch.tensor(teacher.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
        with torch.no_grad():
            expected += teacher((images * std + mean - t_mean) / t_std).double() / len(names)
    torch.testing.assert_close(trainer.task.teach(images).double(), expected, rtol=1e-4, atol=1e-4)


def test_modules_are_imported_before_the_model_is_looked_up(tmp_path, monkeypatch):
    (tmp_path / 'my_networks.py').write_text(
        'import timm\nfrom timm.models import register_model\n@register_model\n'
        'def my_network(pretrained=False, **kwargs):\n'
        '    return timm.create_model("test_resnet", pretrained=pretrained, **kwargs)\n')
    monkeypatch.syspath_prepend(tmp_path)
    trainer = create_trainer(
        tmp_path, '--device-modules', 'my_networks', '--model', 'my_network', '--img-size', '32')
    assert type(trainer.model).__name__ == 'ResNet'


def test_no_bound_of_gradients_takes_back_that_of_a_recipe(tmp_path):
    (tmp_path / 'r.yaml').write_text('clip_grad: 0.001')
    args = parse_args(['-c', str(tmp_path / 'r.yaml'), '--clip-grad', '0'])
    assert args.clip_grad == 0
    recipe = ['-c', str(tmp_path / 'r.yaml')]
    free, _ = gradients_after_clipping(tmp_path, pytest.MonkeyPatch(), *recipe, '--clip-grad', '0')
    assert torch.cat([g.flatten() for g in free.values()]).norm() > 1e-3


def test_trial_of_a_schedule_of_steps_may_be_too_short_for_one(tmp_path):
    for flags in (['step', '--decay-epochs', '90'], ['multistep', '--decay-milestones', '90', '180']):
        assert create_trainer(tmp_path, '--sched', *flags).updates == 3


def test_images_that_are_not_augmented_are_those_of_the_set(tmp_path):
    flags = ['--aa', 'trivial', '--reprob', '1', '--color-jitter', '0.4', '--vflip', '1']
    trainer = create_trainer(tmp_path, '--no-aug', *flags)
    args = trainer.args
    stored = create_loader(
        decode(open_named(args, args.train_split), trainer.data_config), trainer.data_config, args, trainer.accelerator)
    images = torch.cat([x for x, _ in trainer.train_loader.epoch(0)]).flatten(1)
    expected = torch.cat([x for x, _ in stored.epoch(0)]).flatten(1)
    far = torch.cdist(images, expected, compute_mode='donot_use_mm_for_euclid_dist').min(1).values
    assert far.max() < 1e-3 and len(far) == len(expected) == 36
    assert trainer.train_loader.augmentation == 'no augmentation'
    assert create_trainer(tmp_path, '--no-aug', '--mixup', '1').mixup is not None


def test_teacher_of_other_weights_sees_images_as_the_network_it_is_named_by(tmp_path):
    weights = save_foreign(tmp_path / 't.safetensors', timm.create_model('rn26_tm', pretrained=True))
    flags = ['--model', 'rn20', '--mean', '0.1', '0.2', '0.3', '--kd-model-name', 'rn26_tm']
    both, named = (create_trainer(tmp_path, *flags, *more) for more in (['--kd-checkpoint', weights], []))
    x, _ = next(named.train_loader.epoch(0))
    torch.testing.assert_close(both.task.teach(x), named.task.teach(x))


def test_measuring_needs_no_teacher(tmp_path):
    trainer = create_trainer(tmp_path, '--kd-checkpoint', 'gone.safetensors', '--eval-only')
    assert trainer.evaluate()['validation']['loss'] > 0


def test_weights_of_a_teacher_go_before_the_name_of_a_recipe_unless_it_has_both(tmp_path):
    (tmp_path / 'r.yaml').write_text('kd_model_name: [rn26_tm.dist_cifar100]\n')
    args = parse_args(['-c', str(tmp_path / 'r.yaml'), '--kd-checkpoint', 'mine.safetensors'])
    assert (args.kd_model_name, args.kd_checkpoint) == (None, ['mine.safetensors'])
    (tmp_path / 'r.yaml').write_text('kd_model_name: [rn26]\nkd_checkpoint: [a.safetensors]\n')
    args = parse_args(['-c', str(tmp_path / 'r.yaml')])
    assert (args.kd_model_name, args.kd_checkpoint) == (['rn26'], ['a.safetensors'])
    args = parse_args(['-c', str(tmp_path / 'r.yaml'), '--kd-checkpoint', 'moved.safetensors'])
    assert (args.kd_model_name, args.kd_checkpoint) == (['rn26'], ['moved.safetensors'])


@pytest.mark.parametrize('recipe', ['{}', 'val_fraction: 0', 'val_fraction: 0.2', 'val_split: test'])
def test_no_images_validate_where_the_split_for_it_is_empty(tmp_path, recipe):
    (tmp_path / 'r.yaml').write_text(recipe)
    trainer = create_trainer(tmp_path, '-c', str(tmp_path / 'r.yaml'), '--val-split', '')
    assert trainer.val_loader is None and trainer.train_loader.num_images == 36


@pytest.mark.parametrize('flag', ['--checkpoint-hist', '--val-interval'])
@pytest.mark.parametrize('held_out', [['--val-fraction', '0'], ['--pool', '80', '0', '20'], ['--val-split', '']])
def test_flags_of_validation_need_images_for_it(flag, held_out):
    with pytest.raises(InputError, match=f'^{flag} only applies with images held out .*; give --val-split, '):
        parse_args([flag, '2', *held_out])
    for others in ([], ['--val-split', 'test'], ['--pool', '65', '15', '20']):
        parse_args([flag, '2', *others])
    parse_args([flag, '0' if flag == '--checkpoint-hist' else '1', *held_out])


@pytest.mark.parametrize('flags, recipe, needed', [
    (['--kd-temperature', '2'], 'kd_checkpoint: a.safetensors', 'a teacher, --kd-model-name or --kd-checkpoint'),
    (['--model-ema-decay', '0.9'], 'model_ema: true', '--model-ema'),
    (['--no-model-ema-warmup'], 'model_ema: true', '--model-ema'),
    (['--clip-mode', 'agc'], 'clip_grad: 0.1', '--clip-grad'),
    (['--mixup-prob', '0.5'], 'mixup: 0.2', '--mixup or --cutmix'),
    (['--mixup-mode', 'elem'], 'cutmix: 1.0', '--mixup or --cutmix'),
    (['--mixup-off-epoch', '3'], 'mixup: 0.2', '--mixup or --cutmix'),
    (['--mixup-switch-prob', '0.1'], '{mixup: 0.2, cutmix: 1.0}', '--mixup and --cutmix'),
    (['--remode', 'pixel'], 'reprob: 0.5', '--reprob'),
    (['--recount', '2'], 'reprob: 0.5', '--reprob'),
    (['--lr-base-size', '64'], 'lr_base: 0.1', '--lr-base'),
    (['--lr-base-scale', 'sqrt'], 'lr_base: 0.1', '--lr-base'),
    (['--layer-decay-min-scale', '0.1'], 'layer_decay: 0.7', '--layer-decay'),
    (['--layer-decay-no-opt-scale', '0.1'], 'layer_decay: 0.7', '--layer-decay'),
    (['--color-jitter-prob', '0.5'], 'color_jitter: 0.4', '--color-jitter'),
    (['--task-loss-weight', '0.5'], 'kd_checkpoint: a.safetensors', 'a teacher, --kd-model-name or --kd-checkpoint'),
    (['--torchcompile-mode', 'default'], 'torchcompile: inductor', '--torchcompile'),
    (['--hub-private'], 'push_to_hub: me/x', '--push-to-hub'),
    (['--warmup-lr', '0.1'], 'warmup_epochs: 2.0', '--warmup-epochs'),
    (['--warmup-prefix'], 'warmup_epochs: 2.0', '--warmup-epochs'),
])
def test_flag_that_would_change_nothing_is_refused_unless_a_recipe_has_its_use(tmp_path, flags, recipe, needed):
    setting = flags[0].replace('--no-', '--')
    with pytest.raises(InputError, match=f'^{setting} only applies with {needed}; add it.$'):
        parse_args(flags)
    (tmp_path / 'r.yaml').write_text(recipe)
    parse_args(['-c', str(tmp_path / 'r.yaml'), *flags])
    value = flags[1] if len(flags) > 1 else json.dumps(flags[0] == setting)
    (tmp_path / 'r.yaml').write_text(f'{setting.lstrip("-").replace("-", "_")}: {value}\n')  # for others to build on
    parse_args(['-c', str(tmp_path / 'r.yaml')])


def test_measurement_publishes_nothing():
    with pytest.raises(InputError, match='--eval-only trains nothing to publish'):
        parse_args(['--eval-only', '--push-to-hub', 'me/net'])


def test_short_flags_are_timms():
    args = parse_args(['-b', '7', '-vb', '9', '-j', '3'])
    assert (args.batch_size, args.val_batch_size, args.workers) == (7, 9, 3)


def test_teacher_of_the_same_classes_in_another_order_is_refused(tmp_path):
    names = list(reversed(CIFAR10_LABELS))
    weights = tmp_path / 'teacher.safetensors'
    save_weights(weights, timm.create_model('rn20').state_dict(), dict(model='rn20', num_classes=10, label_names=names))
    with pytest.raises(InputError, match='The teacher and the data have classes in another order'):
        main([*TINY, '--output', str(tmp_path), '--kd-checkpoint', str(weights)])


@pytest.mark.parametrize('flags, expected', [
    (['--hflip', '0.3', '--vflip', '0.4'], dict(hflip=0.3, vflip=0.4)),
    (['--reprob', '0.25', '--remode', 'pixel', '--recount', '2'], dict(re_prob=0.25, re_mode='pixel', re_count=2)),
    (['--aa', 'trivial'], dict(policy='trivial')),
    (['--color-jitter', '0.4', '--color-jitter-prob', '0.5'], dict(color_jitter=(0.4,) * 3, color_jitter_prob=0.5)),
    (['--color-jitter', '0.4', '0.3', '0.2', '0.1'], dict(color_jitter=(0.4, 0.3, 0.2, 0.1))),
    (['--grayscale-prob', '0.1', '--gaussian-blur-prob', '0.2'], dict(grayscale_prob=0.1, gaussian_blur_prob=0.2)),
    (['--padding', '2', '--padding-mode', 'constant'], dict(padding=2, padding_mode='constant')),
    (['--scale', '0.5', '1', '--ratio', '0.8', '1.2'], dict(scale=(0.5, 1), ratio=(0.8, 1.2))),
    (['--train-crop-mode', 'rkrc', '--train-interpolation', 'random'],
     dict(train_crop_mode='rkrc', train_interpolation='random')),
    (['--color-jitter', '0'], dict(color_jitter=None)),
])
def test_flags_of_augmentation_reach_the_configuration(flags, expected):
    found = vars(create_data_config(parse_args(flags)))
    assert {key: found[key] for key in expected} == expected


def test_flags_of_the_optimizer_reach_it():
    network = torch.nn.Conv2d(3, 4, 3)
    flags = ['--opt', 'adamw', '--opt-betas', '0.8', '0.9', '--opt-eps', '1e-5', '--opt-args', 'amsgrad=True']
    group = create_optimizer(parse_args([*flags, '--weight-decay', '0.2']), network, 0.3).param_groups[-1]
    assert (tuple(group['betas']), group['eps'], group['amsgrad'], group['lr'], group['weight_decay']) == (
        (0.8, 0.9), 1e-5, True, 0.3, 0.2)
    group, = create_optimizer(
        parse_args(['--opt', 'sgd', '--momentum', '0.7', '--no-filter-bias-and-bn']), network, 0.3).param_groups
    assert (group['momentum'], group['nesterov'], len(group['params'])) == (0.7, True, 2)


@pytest.mark.parametrize('flags, advice', [
    ([], '; --pool divides a set that is sorted by class'), (['--pool', '60', '20', '20'], '')])
def test_classes_that_a_run_has_no_images_of_are_told(tmp_path, flags, advice):
    trainer = create_trainer(tmp_path, *flags)
    trainer.missing = ['ant', 'bee', 'cow', 'dog', 'elk', 'fox']
    assert trainer.tell_missing() == f'none of them is of ant, bee, cow, dog, elk, ...{advice}\n'
    trainer.missing = []
    assert trainer.tell_missing() == ''


def test_flags_of_mixup_reach_it(tmp_path):
    mixup = create_trainer(
        tmp_path, '--mixup', '0.3', '--cutmix', '0.7', '--mixup-prob', '0.6', '--mixup-switch-prob', '0.2',
        '--mixup-mode', 'pair', '--cutmix-minmax', '0.2', '0.8').mixup
    assert (mixup.mixup_alpha, mixup.cutmix_minmax, mixup.mix_prob, mixup.switch_prob, mixup.mode) == (
        0.3, [0.2, 0.8], 0.6, 0.2, 'pair')


@pytest.mark.parametrize('flag', ['--mixup', '--cutmix'])
def test_mixed_labels_are_smoothed_once(tmp_path, flag):
    """By timm's mixup, so that the loss takes them as they are."""
    trainer = create_trainer(tmp_path, flag, '1', '--smoothing', '0.4')
    images, soft = torch.randn(3, 3, 32, 32), torch.rand(3, 10).softmax(1)
    result = trainer.task(images, soft)
    expected = -(soft * result['output'].log_softmax(1)).sum(1).mean()
    assert result['class_loss'].item() == pytest.approx(expected.item(), rel=1e-5)


def test_grey_networks_have_the_mean_of_the_colours(tmp_path):
    flags = [*TINY, '--max-steps', '1', '--experiment', 'grey', '--model', 'rn26_tm', '--pretrained']
    main([*flags, '--output', str(tmp_path), '--model-kwargs', 'in_chans=1'])
    model = load_model(tmp_path / 'grey' / 'last.safetensors')
    colour = timm.get_pretrained_cfg('rn26_tm')
    for key in ('mean', 'std'):
        assert model.pretrained_cfg[key] == pytest.approx([np.mean(getattr(colour, key))], abs=1e-4)
    assert model.pretrained_cfg['input_size'][0] == 1
    assert explain(model, ROOT / 'train' / 'sample' / 'images' / 'ship.png').image.size == (32, 32)
    with pytest.raises(InputError, match='--mean and --std need 1 values each'):
        main([*flags, '--output', str(tmp_path / 'b'), '--model-kwargs', 'in_chans=1', '--mean', '.5', '.5', '.5'])


@pytest.mark.parametrize('before, after, mean', [(3, 1, [0.3]), (1, 3, [0.2, 0.2, 0.2])])
def test_weights_of_other_channels_are_a_start(tmp_path, before, after, mean):
    source_network = timm.create_model('rn20', in_chans=before)
    source = [0.1, 0.2, 0.6] if before == 3 else [0.2]
    save_weights(tmp_path / 'w.safetensors', source_network.state_dict(), dict(
        model='rn20', num_classes=10, input_size=[before, 32, 32], mean=source, std=source,
        model_args=dict(in_chans=before) if before != 3 else {}))
    trainer = create_trainer(
        tmp_path, '--model', 'rn20', '--initial-checkpoint', str(tmp_path / 'w.safetensors'), '--model-kwargs',
        f'in_chans={after}')
    assert trainer.data_config.input_size[0] == after and trainer.data_config.mean == pytest.approx(mean)
    weight = network(trainer.model).conv1.weight
    kernel = source_network.conv1.weight
    expected = kernel.sum(1, keepdim=True) if after == 1 else kernel.repeat(1, 3, 1, 1) / 3
    torch.testing.assert_close(weight, expected)


def save_foreign(path, model):
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return str(path)


def test_undescribed_weights_of_other_classes_are_not_measured(tmp_path):
    for num_classes, message in ((7, 'has 7 classes and sample has 10'), (0, 'it has no fc.weight')):
        weights = save_foreign(tmp_path / 'w.safetensors', timm.create_model('rn20', num_classes=num_classes))
        with pytest.raises(InputError, match=message):
            main([*TINY, '--output', str(tmp_path), '--model', 'rn20', '--initial-checkpoint', weights, '--eval-only'])


def test_weights_without_a_classifier_are_a_start(tmp_path):
    headless = timm.create_model('rn20', num_classes=0)
    weights = save_foreign(tmp_path / 'w.safetensors', headless)
    trainer = create_trainer(tmp_path, '--model', 'rn20', '--initial-checkpoint', weights)
    found = network(trainer.model)
    assert found.fc.weight.shape[0] == 10
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in headless.state_dict().items())


def test_undescribed_weights_of_a_shallower_network_are_refused(tmp_path):
    for num_classes in (7, 0, 10):
        weights = save_foreign(tmp_path / 'w.safetensors', timm.create_model('rn26', num_classes=num_classes))
        with pytest.raises(InputError, match='These settings of rn38 cannot be used: .*layer1.blocks.2'):
            create_trainer(tmp_path, '--model', 'rn38', '--initial-checkpoint', weights)


def test_pretrained_weights_out_of_reach_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match='weights of resnet10t cannot be fetched .* leave out --pretrained'):
        create_trainer(tmp_path, '--model', 'resnet10t', '--pretrained')


def test_grey_teacher_of_colour_images_is_refused(tmp_path):
    weights = tmp_path / 'teacher.safetensors'
    description = dict(model='rn20', num_classes=10, model_args=dict(in_chans=1))
    save_weights(weights, timm.create_model('rn20', in_chans=1).state_dict(), description)
    with pytest.raises(InputError, match='The teacher takes images of 1 channels and the model of 3'):
        main([*TINY, '--output', str(tmp_path), '--kd-checkpoint', str(weights)])


@pytest.mark.parametrize('flags, message', [
    (['--model', 'hf-hub:me/birds'], 'begin with the weights of hf-hub:me/birds, name its architecture'),
    (['--model', 'zzzz'], "timm has no model 'zzzz'; is it one of .*rn26_tm"),
    (['--kd-model-name', 'no_such'], 'no_such is not a model with pretrained weights'),
    (['--kd-model-name', 'wrn16'], 'wrn16 is not a model with pretrained weights'),
    (['--kd-checkpoint', 'missing.safetensors'], 'no checkpoint missing.safetensors'),
    (['--kd-checkpoint', 'a.safetensors', 'b.safetensors', '--kd-model-name', 'rn26'], 'names 2 files and .* 1 models'),
    (['--initial-checkpoint', 'missing.safetensors'], 'no checkpoint missing.safetensors'),
    (['--report-to', 'nothing'], "no tracker 'nothing'; --report-to takes"),
    (['--grad-accum-steps', '4'], 'fewer batches than --grad-accum-steps'),
    (['--report-to', 'clearml'], "'clearml' is not installed; pip install clearml"),
    (['--torchcompile', 'slowly'], "compiler 'slowly' cannot be used"),
    (['--sync-bn'], 'needs GPUs'),
    (['--torchcompile', '--torchcompile-mode', 'reduce-overhead', '--grad-accum-steps', '2'], 'leave out one of the'),
    (['--torchcompile', '--torchcompile-mode', 'max-autotune', '--grad-accum-steps', '2'], 'leave out one of the two'),
    (['--torchcompile', 'cudagraphs', '--grad-accum-steps', '2'], 'leave out one of the two'),
    (['--cuda-graph', '--grad-accum-steps', '2'], 'use --no-cuda-graph or --grad-accum-steps 1'),
    (['--cuda-graph', '--torchcompile', 'cudagraphs'], 'captures CUDA graphs itself, which --cuda-graph cannot'),
    (['--cuda-graph'], 'needs a GPU of NVIDIA or AMD, not cpu; use --no-cuda-graph'),
    (['--torchcompile-mode', 'max-autotune'], '--torchcompile-mode only applies with --torchcompile'),
    (['--task-loss-weight', '1', '--kd-model-name', 'rn26_tm'], 'weight 1 leaves nothing for the teacher; give --dist'),
    (['--hub-private'], '--hub-private only applies with --push-to-hub; add it'),
    (['--distill-loss-weight', '1'], '--distill-loss-weight only applies with a teacher, --kd-model-name or --kd'),
    (['--aa', 'zzz'], 'augmentation of single images cannot be used: .*zzz'),
    (['--reprob', '0.5', '--train-split', 'train[:5]'], 'use a --batch-size of at most'),
    (['--cutmix', '1', '--cutmix-minmax', '0.5', '0.1', '--max-steps', '1'], 'two rising fractions'),
    (['--img-size', '30', '--model', 'resnet18', '--aux-head'], 'cannot be used'),
    (['--sched', 'wsd', '--decay-epochs', '50'], 'schedule requires'),
    (['--sched', 'step', '--cooldown-epochs', '5'], "'step' has no lowest rate to stay at; leave out --cooldown-epoch"),
    (['--sched', 'step'], "With --sched step the rate would first drop after 90 epochs, but the run has 1;"),
    (['--sched', 'multistep', '--max-steps', '9'], 'first drop after 90 epochs, but the run has 3; set --decay-milest'),
    (['--device-modules', 'not_a_module'], "--device-modules cannot be used: No module named 'not_a_module'"),
    (['--color-jitter', '0.1', '0.2'], 'takes one factor, three or four, not 2'),
    (['--color-jitter', '0.1', '0.1', '0.1', '0.6'], 'This augmentation of single images cannot be used: hue'),
    (['--val-split', '', '--val-fraction', '0.1'], '--val-split says which images validate; leave out --val-fraction'),
    (['--sched', 'step', '--epochs', '90', '--warmup-epochs', '5', '--warmup-prefix'],
     'first drop after 95 epochs, but the run has 95'),
    (['--train-crop-mode', 'rkrr'], '--train-crop-mode only applies to images that are randomly resized'),
    (['--train-interpolation', 'random'], '--train-interpolation only applies to images that are randomly resized'),
    (['--sched', 'rsqrt'], "'rsqrt' takes its timescale from the warmup; set --warmup-epochs"),
    (['--lr-noise-pct', '0'], 'must be above 0'),
    (['--mixup', '0.2', '--batch-size', '1'], 'in pairs; use an even --batch-size'),
    (['--cutmix', '0.2', '--batch-size', '3'], 'in pairs; use an even --batch-size'),
    (['--sched', 'none'], 'for a rate that stays the same use --sched constant'),
    (['--padding', '-1'], 'must be at least 0, not -1'),
    (['--mixup', '0.2', '--cutmix-minmax', '0.1', '0.5'], '--cutmix-minmax only applies with --cutmix'),
    (['--seed', '-1'], 'must be from 0 to'),
    (['--split-seed', str(2 ** 70)], 'must be from 0 to'),
    (['--batch-size', 'many'], "must be a whole number, not 'many'"),
    (['--interpolation', 'foo'], 'invalid choice'),
    (['--crop-pct', '-1'], 'must be above 0'),
    (['--mean', 'nan', '0', '0'], "must be a number, not 'nan'"),
    (['--clip-grad', '-1'], 'must be at least 0'),
    (['--hflip', '3'], 'must be from 0 to 1'),
    (['--decay-epochs', '5'], '--decay-epochs only applies with --sched step, wsd or rsqrt; add it'),
    (['--img-size', '3', '32', '32'], '--img-size takes one number, or height and width'),
    (['--val-fraction', '1'], 'must be at least 0 and below 1, not 1'),
    (['--scale', '0', '1'], 'must be above 0 and at most 1, not 0'),
    (['--scale', '0.5', '1.5'], 'must be above 0 and at most 1, not 1.5'),
    (['--ratio', '2', '0.5'], '--ratio takes the smallest value and the largest, not 2 0.5'),
    (['--scale', '0.5', '1'], '--scale only applies to images that are randomly resized .* or set --memory-limit 0'),
    (['--ratio', '0.5', '1'], '--ratio only applies to images that are randomly resized'),
    (['--mixup', '-1'], 'must be at least 0, not -1'),
    (['--model', 'rn26.foo'], "rn26 has no tag 'foo'; it has cifar10, cifar100, mini_imagenet"),
    (['--model-kwargs', 'foo'], 'must be KEY=VALUE, not foo'),
    (['--opt-betas', '0.9'], 'optimizer .adam. cannot be used'),
    (['--model', 'dn100_tm', '--drop-path', '0.1'], "of dn100_tm cannot be .* there is no argument 'drop_path_rate'"),
    (['--model-kwargs', 'patch_size=2.5'], 'patch_size must be a whole number of at least 1, got 2.5'),
    (['--opt', 'adahessian'], 'needs second derivatives'),
    (['--train-split', 'train[:36]', '--test-split', 'train[20:40]'], "'train.*36.*' and 'train.*40.*' .* in common"),
    (['--dataset', 'wds/somewhere'], 'is a stream, which has no order; open it as hfds/... or torch/...'),
    (['--dataset', 'TFDS/somewhere'], 'is a stream'),
    (['--opt-args', 'lr=5'], 'has flags of its own, --lr and --lr-base'),
    (['--model-kwargs', 'in_chans=4'], 'in_chans=4 cannot be used; images are decoded to 1 channel or 3'),
    (['--model-kwargs', 'num_templates=7'], 'is not one template for each of the 10 classes'),
])
def test_settings_that_cannot_be_used_are_one_sentence(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr('train.trackers.get_available_trackers', list)  # as where none is installed
    with pytest.raises(InputError, match=message) as error:
        main([*TINY, '--output', str(tmp_path), *flags])
    assert '\n' not in str(error.value)


def test_compiled_run_keeps_the_names_of_its_weights(tmp_path):
    result = main([*TINY, '--output', str(tmp_path), '--torchcompile', 'aot_eager', '--model-ema', '--max-steps', '2',
                   '--grad-checkpointing'])
    assert result['last']['train_loss'] > 0
    expected = timm.create_model('rn26_tm').state_dict().keys()
    for name in ('last', 'best'):
        assert load_file(tmp_path / 'run' / f'{name}.safetensors').keys() == expected
    resumed = main(['--resume', str(tmp_path / 'run'), '--torchcompile', 'no', '--max-steps', '3'])
    assert resumed['history'][0] == result['history'][0] and resumed['updates'] == 3


def test_each_run_of_one_process_has_its_own_precision_and_compiler():
    """As in a notebook."""
    found = []
    for flags in (['--mixed-precision', 'bf16', '--torchcompile', 'aot_eager'], [], ['--mixed-precision', 'no']):
        accelerator = create_accelerator(parse_args([*TINY, *flags]))
        found.append((accelerator.mixed_precision, accelerator.state.dynamo_plugin.backend.value))
    assert found == [('bf16', 'AOT_EAGER'), ('no', 'NO'), ('no', 'NO')]


def test_recipe_takes_what_it_does_not_say_from_its_base(tmp_path):
    (tmp_path / 'base.yaml').write_text('lr: 0.1\nepochs: 7\n')
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'sub' / 'recipe.yaml').write_text('base: ../base.yaml\nepochs: 9\n')
    args = parse_args(['-c', str(tmp_path / 'sub' / 'recipe.yaml'), '--opt', 'sgd'])
    assert (args.lr, args.epochs, args.opt) == (0.1, 9, 'sgd')
    (tmp_path / 'sub' / 'recipe.yaml').write_text('base: ../base.yaml\nlr_base: 0.2\n')
    args = parse_args(['-c', str(tmp_path / 'sub' / 'recipe.yaml')])
    assert (args.lr, args.lr_base) == (None, 0.2)  # lr is the base's
    (tmp_path / 'base.yaml').write_text('base: sub/recipe.yaml\n')
    with pytest.raises(InputError, match='is its own base'):
        parse_args(['-c', str(tmp_path / 'sub' / 'recipe.yaml')])


def test_loss_of_a_baseline_is_cross_entropy(tmp_path):
    trainer = create_trainer(tmp_path, '--model', 'rn26', '--smoothing', '0.3')
    images, targets = next(trainer.train_loader.epoch(0))
    result = trainer.task(images, targets)
    torch.testing.assert_close(result['loss'], F.cross_entropy(result['output'], targets, label_smoothing=0.3))


@pytest.mark.parametrize('model', [['rn26_tm'], ['rn26', '--aux-head']])
def test_loss_is_of_the_weight_and_smoothing_one_asks_for(tmp_path, model):
    trainer = create_trainer(tmp_path, '--model', *model, '--patch-loss-weight', '0.2', '--smoothing', '0.3')
    images, targets = next(trainer.train_loader.epoch(0))
    result = trainer.task(images, targets)
    torch.testing.assert_close(result['class_loss'], F.cross_entropy(result['output'], targets, label_smoothing=0.3))
    torch.testing.assert_close(result['loss'], 0.8 * result['class_loss'] + 0.2 * result['patch_loss'])


def test_settings_of_the_network_and_the_optimizer_reach_them(tmp_path):
    trainer = create_trainer(
        tmp_path, '--drop', '0.4', '--drop-path', '0.2', '--grad-checkpointing', '--weight-decay', '0.1')
    assert trainer.plain_model.head_drop.p == 0.4
    assert trainer.plain_model.layer4.blocks[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert all(m.grad_checkpointing for m in trainer.plain_model.modules() if hasattr(m, 'grad_checkpointing'))
    for flag, decayed in ((), 0.), (('--no-filter-bias-and-bn',), 0.1):
        trainer = create_trainer(tmp_path, '--weight-decay', '0.1', *flag)
        for group in trainer.optimizer.param_groups:
            for p in group['params']:
                assert group['weight_decay'] == (0.1 if p.ndim > 1 else decayed)


def test_ema_is_the_mean_its_decay_says(tmp_path):
    trainer = create_trainer(
        tmp_path, '--model-ema', '--model-ema-decay', '0.7', '--no-model-ema-warmup', '--lr', '0.1', '--opt', 'sgd')
    assert create_trainer(tmp_path, '--model-ema').ema.use_warmup and not trainer.ema.use_warmup
    trainer.model.train()
    for images, targets in trainer.train_loader.epoch(0):
        before = {k: v.clone() for k, v in trainer.ema.module.named_parameters()}
        trainer.step(images, targets)
    after = dict(trainer.plain_model.named_parameters())  # timm begins with a copy, at the first update
    for k, v in trainer.ema.module.named_parameters():
        torch.testing.assert_close(v, 0.7 * before[k] + 0.3 * after[k])


def test_seed_decides_weights_and_order(tmp_path):
    trainers = [create_trainer(tmp_path, '--seed', seed) for seed in ('0', '1', '0')]
    first, second, again = ([
        next(trainer.train_loader.epoch(0))[0], trainer.plain_model.conv1.weight.detach()] for trainer in trainers)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, second))


def test_mixing_ends_with_the_epoch_one_names(tmp_path):
    trainer = create_trainer(tmp_path, '--mixup', '1', '--mixup-off-epoch', '2')
    assert create_trainer(tmp_path, '--mixup', '1', '--smoothing', '0.4').mixup.label_smoothing == 0.4
    seen = []
    trainer.task.register_forward_pre_hook(lambda task, args: seen.append(args))
    images, targets = next(trainer.train_loader.epoch(0))
    trainer.model.train()
    for epoch in (1, 2):
        trainer.state.epoch = epoch
        trainer.step(images.clone(), targets)
    (mixed, soft), (plain, hard) = seen
    lam = soft.gather(1, targets[:, None]).view(-1, 1, 1, 1)
    other = targets != targets.flip(0)
    torch.testing.assert_close(mixed[other], (lam * images + (1 - lam) * images.flip(0))[other], rtol=1e-4, atol=1e-5)
    assert other.any() and not torch.equal(mixed, images) and torch.equal(plain, images)
    assert torch.equal(hard, F.one_hot(targets, 10).float())
