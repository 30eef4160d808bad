"""What a launcher and the settings of Accelerate do to a run, and what of them cannot be had."""
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from timm_tmblock.errors import InputError
from train.config import parse_args
from train.engine import _configure_deepspeed, create_accelerator
from train.trackers import fail_trackers, finish_trackers, start_trackers
from train.train import Trainer, main

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures('fresh_accelerate')
TINY = ['--train-split', 'train[:36]', '--val-split', 'test[:15]', '--batch-size', '12', '--epochs', '1',
        '--device', 'cpu', '--report-to', 'none', '--experiment', 'run']


def test_precision_of_the_launcher_belongs_to_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    main([*TINY, '--img-size', '8', '--output', str(tmp_path)])
    monkeypatch.delenv('ACCELERATE_MIXED_PRECISION')
    assert main(['--resume', str(tmp_path / 'run'), '--epochs', '2'])['mixed_precision'] == 'bf16'


@pytest.mark.parametrize('capability, slow', [('AVX2', True), ('AVX512', False)])
def test_run_says_that_bf16_is_slow_on_cpus_without_kernels_for_it(tmp_path, monkeypatch, capsys, capability, slow):
    monkeypatch.setattr('torch.backends.cpu.get_cpu_capability', lambda: capability)
    main([*TINY, '--output', str(tmp_path), '--max-steps', '1', '--mixed-precision', 'bf16', '--img-size', '8'])
    assert ('bf16 (many times slower than no on' in capsys.readouterr().out) == slow


@pytest.mark.parametrize('flags, message', [
    (['--mixed-precision', 'bf16'], 'use --mixed-precision no'), (['--opt', 'muon'], 'muon needs the shapes'),
    (['--clip-grad', '1', '--clip-mode', 'agc'], 'clips only by the norm'),
])
def test_deepspeed_does_as_the_flags_say_or_says_that_it_cannot(flags, message):
    config = dict(gradient_clipping='auto')
    _configure_deepspeed(config, parse_args(['--mixed-precision', 'no', '--batch-size', '7']))
    assert config == dict(  # 'auto' would clip by 1
        gradient_clipping=0., train_micro_batch_size_per_gpu=7, gradient_accumulation_steps=1)
    _configure_deepspeed(config, parse_args(['--mixed-precision', 'no', '--clip-grad', '3']))
    assert config['gradient_clipping'] == 3
    for key, flag in (('gradient_accumulation_steps', '--grad-accum-steps 4'), ('gradient_clipping', '--clip-grad 4')):
        with pytest.raises(InputError, match=f'has {key} 4, but the flags of the run set it; use {flag}'):
            _configure_deepspeed({key: 4}, parse_args(['--mixed-precision', 'no']))
    with pytest.raises(InputError, match='use --zero_stage 2'):
        _configure_deepspeed(dict(zero_optimization=dict(stage=3)), parse_args(['--mixed-precision', 'no']))
    with pytest.raises(InputError, match=message):
        _configure_deepspeed(config, parse_args(['--mixed-precision', 'no', *flags]))


@pytest.mark.parametrize('theirs', ['auto', '1'])
def test_gradients_accumulate_as_the_flag_says_whatever_the_launcher(tmp_path, monkeypatch, theirs):
    monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', theirs)  # of a DeepSpeed configuration
    result = main([*TINY, '--output', str(tmp_path), '--grad-accum-steps', '3'])
    assert result['updates'] == 1 and len(result['history']) == 1


def test_fsdp_in_16_bits_is_refused(monkeypatch):
    monkeypatch.setattr('train.engine.Accelerator.distributed_type', DistributedType.FSDP)
    args = parse_args(['--device', 'cpu', '--report-to', 'none'])
    assert args.channels_last
    create_accelerator(args)
    assert not args.channels_last  # which FSDP2 has no parameters in
    with pytest.raises(InputError, match='FSDP casts batch norms .* use --mixed-precision no'):
        create_accelerator(parse_args(['--device', 'cpu', '--report-to', 'none', '--mixed-precision', 'bf16']))


def test_script_ends_with_its_result_where_the_launcher_leaves_settings_open(tmp_path, forks):
    flags = ['--output', str(tmp_path), '--max-steps', '1']
    done = forks.run('train/train.py', *TINY, *flags, ACCELERATE_GRADIENT_ACCUMULATION_STEPS='auto')
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])['updates'] == 1


@pytest.mark.parametrize('version, efficient, fits', [(2, False, True), (1, False, False), (2, True, False)])
def test_fsdp_is_of_version_2_without_efficient_loading(monkeypatch, version, efficient, fits):
    monkeypatch.setattr('train.engine.Accelerator.distributed_type', DistributedType.FSDP)
    plugin = SimpleNamespace(fsdp_version=version, cpu_ram_efficient_loading=efficient)
    monkeypatch.setattr(AcceleratorState, 'fsdp_plugin', plugin, raising=False)
    with nullcontext() if fits else pytest.raises(InputError, match='train/accelerate/fsdp.yaml'):
        create_accelerator(parse_args(['--device', 'cpu', '--report-to', 'none']))


def test_fsdp_keeps_no_ema(monkeypatch):
    monkeypatch.setattr('train.engine.Accelerator.distributed_type', DistributedType.FSDP)
    with pytest.raises(InputError, match='--model-ema keeps whole weights, which FSDP and DeepSpeed divide'):
        create_accelerator(parse_args(['--device', 'cpu', '--report-to', 'none', '--model-ema']))


def test_trackers_know_the_run_and_whether_it_failed(monkeypatch):
    told, ended = {}, []
    accelerator = SimpleNamespace(
        is_main_process=True, init_trackers=lambda project, **kwargs: told.update(kwargs, project=project))
    args = parse_args(['--project', 'birds', '--report-to', 'wandb', 'mlflow', 'trackio'])
    start_trackers(accelerator, args, Path('output/run'), 'an id', 7)
    assert told['project'] == 'birds' and told['config']['report_to'] == "['wandb', 'mlflow', 'trackio']"
    wandb_run = SimpleNamespace(finish=lambda exit_code: ended.append(exit_code))
    accelerator.trackers = [
        SimpleNamespace(name='wandb', tracker=wandb_run),
        SimpleNamespace(name='tensorboard', finish=lambda: ended.append('tensorboard')), SimpleNamespace(name='mlflow')]
    monkeypatch.setitem(sys.modules, 'mlflow', SimpleNamespace(end_run=ended.append))
    fail_trackers(accelerator)
    assert ended == [1, 'tensorboard', 'FAILED']
    del wandb_run.finish  # as where its server is away
    fail_trackers(accelerator)
    assert ended[3:] == ['tensorboard', 'FAILED']
    del ended[3:]
    accelerator.is_main_process = False
    fail_trackers(accelerator)
    assert len(ended) == 3


def test_trackers_are_closed_one_by_one():
    ended = []

    def fail():
        raise ConnectionError

    finish_trackers(SimpleNamespace(
        trackers=[SimpleNamespace(name='a', finish=fail), SimpleNamespace(name='b', finish=lambda: ended.append('b'))],
        state=SimpleNamespace(destroy_process_group=lambda: ended.append('group'))))
    assert ended == ['b', 'group']


def test_tracker_that_does_not_close_leaves_the_run_complete(tmp_path, monkeypatch, capsys):
    def fail(self):
        raise ConnectionError('no route to the server\nat some line')

    monkeypatch.setattr('accelerate.tracking.TensorBoardTracker.finish', fail)
    result = main([
        *TINY, '--output', str(tmp_path), '--max-steps', '1', '--img-size', '8', '--report-to', 'tensorboard'])
    assert result['updates'] == 1 and (tmp_path / 'run' / 'result.json').is_file()
    assert 'tensorboard could not be closed (no route to the server); the run is complete.' in capsys.readouterr().err


def test_tracker_that_does_not_start_is_named():
    def fail(project, **kwargs):
        raise ConnectionError('no route to the server\nat some line')

    args = parse_args(['--report-to', 'wandb'])
    with pytest.raises(InputError, match=r'^The tracker \(wandb\) cannot be used: no route to the server; set it up'):
        start_trackers(SimpleNamespace(init_trackers=fail), args, Path('output/run'), 'an id', 0)


def test_fsdp_compiles_nothing(monkeypatch):
    monkeypatch.setattr('train.engine.Accelerator.distributed_type', DistributedType.FSDP)
    with pytest.raises(InputError, match='FSDP gathers .* use --torchcompile no'):
        create_accelerator(parse_args(['--device', 'cpu', '--report-to', 'none', '--torchcompile', 'aot_eager']))


@pytest.mark.parametrize('mode', ['value', 'agc'])
def test_fsdp_clips_by_the_norm_alone(monkeypatch, mode):
    monkeypatch.setattr('train.engine.Accelerator.distributed_type', DistributedType.FSDP)
    flags = ['--device', 'cpu', '--report-to', 'none', '--clip-grad', '1', '--clip-mode']
    create_accelerator(parse_args([*flags, 'norm']))
    with pytest.raises(InputError, match=f'clips by the norm alone, not by {mode}; use --clip-mode norm'):
        create_accelerator(parse_args([*flags, mode]))


def test_compiler_of_the_launcher_is_a_setting_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv('ACCELERATE_DYNAMO_BACKEND', 'eager')
    teach = ('--model', 'rn20', '--kd-model-name', 'rn26_tm')
    for flag, backend in (('', 'eager'), ('--torchcompile=AOT_EAGER', 'aot_eager'), ('--torchcompile=no', None)):
        trainer = Trainer(parse_args([*TINY, '--output', str(tmp_path), *teach, *filter(None, [flag])]))
        assert trainer.args.torchcompile == backend
        for model in (trainer.model, trainer.task.teachers[0].model):
            assert isinstance(model, torch._dynamo.OptimizedModule) is (backend is not None)
    monkeypatch.setenv('ACCELERATE_DYNAMO_BACKEND', 'cudagraphs')
    with pytest.raises(InputError, match='captures CUDA graphs, .* leave out one of the two'):
        Trainer(parse_args([*TINY, '--output', str(tmp_path), '--grad-accum-steps', '2']))


def test_launcher_that_has_another_device_than_the_flag_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')  # as accelerate launch --cpu does
    with pytest.raises(InputError, match='--device cuda was asked for, but Accelerate was set up for cpu'):
        create_accelerator(parse_args([*TINY, '--device', 'cuda']))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    with pytest.raises(InputError, match='8 processes were launched on a machine with 4 GPUs; launch one per GPU'):
        create_accelerator(parse_args([*TINY, '--device', 'cuda']))


def test_notebook_launcher_trains(tmp_path, forks):
    code = (
        'import accelerate, train.train\n'
        f'accelerate.notebook_launcher(train.train.main, ({[*TINY, "--output", str(tmp_path)]!r},), num_processes=1)\n')
    run = forks.run('-c', code)
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / 'run' / 'best.safetensors').is_file()
