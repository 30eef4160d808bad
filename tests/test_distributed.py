"""Two processes do what one does with twice the batch, and count every image once."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import recall_score

from timm_tmblock.checkpoint import load_model
from timm_tmblock.errors import InputError
from train.augment import DataConfig
from train.checkpoint import find_checkpoints
from train.data import decode, open_dataset
from train.processes import join_tasks

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / 'train' / 'accelerate' / 'cpu_2_processes.yaml'
FLAGS = ['--train-split', 'train[:24]', '--val-split', 'test[:15]', '--epochs', '1', '--report-to', 'none',
         '--experiment', 'run']
# statistics of half the batch differ from those of the whole, so the step is made with the running ones
STEP = '''
import sys
sys.path.insert(0, {root!r})
import torch
from train.config import parse_args
from train.train import Trainer
from safetensors.torch import save_file
trainer = Trainer(parse_args(sys.argv[2:]))
batches = trainer.train_loader.epoch(0)
for _ in range(2):
    for m in trainer.model.modules():
        m.training = not isinstance(m, torch.nn.BatchNorm2d)
    trainer.step(*next(batches))
if trainer.main_process:
    save_file({{k: v.contiguous() for k, v in trainer.plain_model.state_dict().items()}}, sys.argv[1])
trainer.accelerator.end_training()
'''
# the second process with a dataset of its own, or an experiment folder of its own
APART = '''
import os, sys
sys.path.insert(0, {root!r})
import train.record
from train import train
from train.processes import leaving_it_to_the_first
from timm_tmblock.errors import exiting_on_input_error
if os.environ['RANK'] == '1' and sys.argv[1] == 'dataset':
    sys.argv[sys.argv.index('train[:24]')] = 'train[:30]'
if os.environ['RANK'] == '1' and sys.argv[1] == 'teacher':
    sys.argv += ['--kd-checkpoint', 'missing.safetensors']
if os.environ['RANK'] == '1' and sys.argv[1] == 'output':
    check = train.record.check_shared
    train.record.check_shared = lambda settings: check(settings.with_name('none') / settings.name, seconds=1)
with exiting_on_input_error(), leaving_it_to_the_first():
    train.main(sys.argv[2:])
'''
# writes down the weights that each process had at the end of its epoch
RECORDED = '''
import os, sys
sys.path.insert(0, {root!r})
from safetensors.torch import save_file
from train import train
networks, distribute = [], train.distribute_bn
def record(model, *args):
    networks.append(model)
    save_file({{k: v.contiguous() for k, v in model.state_dict().items()}},
              f'{{sys.argv[1]}}/{{os.environ["RANK"]}}.{{len(networks)}}.safetensors')
    distribute(model, *args)
train.distribute_bn = record
train.main(sys.argv[2:])
'''


def launch_by_accelerate(script, *flags, code=0):
    # its --cpu --num_processes 2 starts one process where there is no MPI; its config file starts two
    command = ['-m', 'accelerate.commands.launch', '--config_file', str(CONFIG), '--main_process_port', '0']
    run = subprocess.run(
        [sys.executable, *command, str(script), *flags],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''},
        capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == code, run.stderr[-3000:]
    return run


@pytest.fixture
def launch(forks):
    """A function that runs a script in one process or in two, which takes less than the launcher does."""
    def run(processes, script, *flags, code=0):
        run = forks.run(script, *flags, processes=processes, CUDA_VISIBLE_DEVICES='')
        assert run.returncode == code, run.stderr[-3000:]
        return run

    return run


def measure(path: Path, dataset) -> dict:
    """Loss and accuracies of weights, by plain PyTorch in float64."""
    model = load_model(path).double()
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[k], dtype=torch.float64).view(1, 3, 1, 1) for k in ('mean', 'std'))
    with torch.no_grad():
        logits = model((dataset.images.double() / 255 - mean) / std)
    order = logits.argsort(1, descending=True)
    hits = (order == dataset.targets[:, None]).double().mean(0) * 100
    return dict(
        loss=F.cross_entropy(logits, dataset.targets).item(), top1=hits[0].item(),
        top5=hits[:5].sum().item(),
        balanced_accuracy=100 * recall_score(
            dataset.targets, order[:, 0], labels=dataset.targets.unique(), average='macro'))


@pytest.mark.parametrize('clip', [[], ['--clip-grad', '1']], ids=['unclipped', 'clipped'])
def test_updates_equal_those_of_one_process_with_the_doubled_batch(tmp_path, launch, clip):
    (tmp_path / 'step.py').write_text(STEP.format(root=str(ROOT)))
    flags = [*FLAGS, '--opt', 'momentum', '--lr', '0.1', '--weight-decay', '0', '--padding', '0', '--hflip', '0', *clip]
    weights = []
    for processes, batch_size in ((1, 12), (2, 6)):
        file = tmp_path / f'{processes}.safetensors'
        launch(processes, tmp_path / 'step.py', str(file), *flags, '--batch-size', str(batch_size),
               '--output', str(tmp_path / str(processes)))
        weights.append(load_file(file))
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-3, atol=1e-6)


@pytest.fixture(scope='module')
def folder_of_images(tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    for split, n in (('train', 8), ('validation', 5)):
        for label, name in enumerate(('ant', 'bee', 'cat')):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.random.default_rng(100 * label + i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f'{i}.png')
    return root


@pytest.mark.parametrize('memory', ['in memory', 'streamed'])
def test_metrics_of_two_processes_are_those_of_the_weights_that_are_written(tmp_path, launch, folder_of_images, memory):
    flags = ['--dataset', str(folder_of_images), '--val-split', 'validation', '--batch-size', '4', '--model-ema',
             '--val-batch-size', '4', '--workers', '1', '--memory-limit', '4' if memory == 'in memory' else '0',
             '--epochs', '2', '--report-to', 'none', '--experiment', 'run', '--checkpoint-hist', '2']
    command = [ROOT / 'train' / 'train.py', *flags, '--output', str(tmp_path)]
    run = launch_by_accelerate(*command) if memory == 'in memory' else launch(2, *command)
    assert run.stdout.count('writing to') == run.stdout.count('{"model"') == 1
    result = json.loads(run.stdout.splitlines()[-1])
    assert result['processes'] == 2 and result['updates'] == 2 * (24 // 8)
    state = json.loads((find_checkpoints(tmp_path / 'run')[-1] / 'state.json').read_text())
    assert len(state['layout']) == 4 and state['update'] == 6
    config = DataConfig((3, 32, 32), (0,) * 3, (1,) * 3)
    dataset = decode(open_dataset(str(folder_of_images), 'validation'), config, progress=False)
    expected = measure(tmp_path / 'run' / 'last.safetensors', dataset)  # of the EMA
    for key, value in expected.items():
        assert result['last'][f'eval_ema_{key}'] == pytest.approx(value, rel=1e-4)
    expected = measure(tmp_path / 'run' / 'best.safetensors', dataset)
    for key, value in expected.items():
        assert result['best'][key] == pytest.approx(value, rel=1e-4)
    if memory == 'in memory':  # one process goes on where two stopped
        run = launch(1, ROOT / 'train' / 'train.py', '--resume', str(tmp_path / 'run'), '--epochs', '3')
        resumed = json.loads(run.stdout.splitlines()[-1])
        assert resumed['processes'] == 1 and resumed['history'][:2] == result['history']


def test_images_of_a_stream_are_held_out_by_two_processes_as_by_one(tmp_path, launch, folder_of_images):
    (tmp_path / 'parts.py').write_text(
        f'import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom train import train\n'
        f'train.create_loader = lambda part, *args, **kwargs: sys.exit(print(sorted(part.indices)))\n'
        f'train.main(sys.argv[1:])\n')
    flags = ['--dataset', str(folder_of_images), '--memory-limit', '0', '--val-fraction', '0.25', '--output',
             str(tmp_path), '--workers', '0', '--report-to', 'none']
    found = [part for n in (1, 2) for part in re.findall(r'\[.*?\]', launch(n, tmp_path / 'parts.py', *flags).stdout)]
    assert len(found) == 3 and len(set(found)) == 1 and len(json.loads(found[0])) == 6


@pytest.mark.parametrize('mode', ['broadcast', 'reduce'])
def test_statistics_are_those_of_the_first_process_or_the_mean_of_both_in_the_ema_too(tmp_path, launch, mode):
    (tmp_path / 'recorded.py').write_text(RECORDED.format(root=str(ROOT)))
    flags = [*FLAGS, '--batch-size', '6', '--model-ema', '--dist-bn', mode, '--output', str(tmp_path)]
    launch(2, tmp_path / 'recorded.py', str(tmp_path), *flags)
    assert len(list(tmp_path.glob('?.?.safetensors'))) == 4  # the network and its EMA, of two processes
    network = find_checkpoints(tmp_path / 'run')[-1] / 'model.safetensors'
    for number, file in enumerate((network, tmp_path / 'run' / 'last.safetensors'), 1):  # the latter of the EMA
        first, second = (load_file(tmp_path / f'{rank}.{number}.safetensors') for rank in range(2))
        for name, values in load_file(file).items():
            if name.endswith(('running_mean', 'running_var')):
                assert not torch.equal(first[name], second[name]), name
                expected = (first[name].double() + second[name]) / 2 if mode == 'reduce' else first[name]
                torch.testing.assert_close(values, expected.to(values.dtype), rtol=1e-6, atol=1e-7)
            else:
                torch.testing.assert_close(values, first[name], rtol=0, atol=0)


FAILURES = [
    (['--model', 'nothing'], "timm has no model 'nothing'"),
    (['--dataset', 'hfds/me/nothing'], "Cannot open split 'train[:24]' of dataset 'hfds/me/nothing'"),
    (['--output', f'{ROOT}/README.md'], 'Cannot write'),
    (['--opt', 'sgd', '--lr', '1e20'], 'The loss or a weight was not finite'),
]


@pytest.mark.parametrize('flags, message', FAILURES)
def test_what_ends_a_run_is_said_once_and_by_no_other_process(tmp_path, launch, flags, message):
    script = ROOT / 'train' / 'train.py'
    run = launch(2, script, *FLAGS, '--batch-size', '6', '--output', str(tmp_path), *flags, code=2)
    assert run.stderr.count('error: ') == 1 and f'error: {message}' in run.stderr, run.stderr
    assert 'Traceback' not in run.stderr


def test_launcher_tells_that_it_was_the_input(tmp_path):
    flags, message = FAILURES[0]
    run = launch_by_accelerate(ROOT / 'train' / 'train.py', '--output', str(tmp_path), *flags, code=1)
    own, _, launcher = run.stderr.partition('multiprocessing/api.py')  # which adds its report
    assert own.count('error: ') == 1 and f'error: {message}' in own and 'Traceback' not in own
    assert 'exitcode  : 2' in launcher


def test_machines_with_other_datasets_teachers_or_folders_are_refused(tmp_path, launch):
    (tmp_path / 'apart.py').write_text(APART.format(root=str(ROOT)))
    for what, message in (
            ('dataset', 'has other images or classes on some machines'), ('teacher', 'missing.safetensors'),
            ('output', 'is not the same folder on all machines; name an --output that they share')):
        flags = [*FLAGS, '--batch-size', '6', '--output', str(tmp_path / what)]
        run = launch(2, tmp_path / 'apart.py', what, *flags, code=2)
        assert run.stderr.count('error: ') == 1 and message in run.stderr, run.stderr


def test_tasks_of_srun_train_together(tmp_path, launch):
    (tmp_path / 'srun.py').write_text(
        f'import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom train.train import main\n'
        f'rank, size = os.environ.pop("RANK"), os.environ.pop("WORLD_SIZE")\ndel os.environ["LOCAL_RANK"]\n'
        f'os.environ.update(SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NTASKS=size, SLURM_STEP_NUM_TASKS=size)\n'
        f'main(sys.argv[1:])\n')
    launch(2, tmp_path / 'srun.py', *FLAGS, '--batch-size', '6', '--max-steps', '1', '--output', str(tmp_path))
    assert json.loads((tmp_path / 'run' / 'result.json').read_text())['processes'] == 2


def test_tasks_that_cannot_meet_are_refused(monkeypatch):
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '4')
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    message = '^4 tasks were started, and each would train by itself; export MASTER_ADDR.*for separate runs unset '
    with pytest.raises(InputError, match=f'{message}SLURM_STEP_NUM_TASKS.$'):
        join_tasks()
    monkeypatch.setenv('PMI_SIZE', '4')
    with pytest.raises(InputError, match=f'{message}SLURM_STEP_NUM_TASKS and PMI_SIZE.$'):
        join_tasks()


def test_tasks_of_two_jobs_on_one_machine_meet_at_two_ports_and_keep_to_their_cores(monkeypatch):
    ports, threads = [], torch.get_num_threads()
    own = dict(
        MASTER_ADDR='localhost', SLURM_STEP_NUM_TASKS='2', SLURM_NTASKS='2', SLURM_PROCID='1', SLURM_LOCALID='1',
        SLURM_CPUS_PER_TASK='3')
    try:
        for job in ('8123456', '8123457'):
            monkeypatch.setattr(os, 'environ', dict(own, SLURM_JOB_ID=job))
            join_tasks()
            ports.append(int(os.environ['MASTER_PORT']))
            assert os.environ['OMP_NUM_THREADS'] == '3' and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert len(set(ports)) == 2 and all(15000 <= port < 30000 for port in ports)


@pytest.mark.parametrize('daemons', ['1', '2'])  # of mpirun, which it starts by srun on other machines
def test_tasks_of_mpirun_in_a_job_of_sbatch_have_its_numbers(monkeypatch, daemons):
    monkeypatch.setattr(os, 'environ', dict(
        MASTER_ADDR='localhost', SLURM_PROCID='0', SLURM_LOCALID='0', SLURM_NTASKS='4', SLURM_STEP_NUM_TASKS=daemons,
        OMPI_COMM_WORLD_SIZE='4', OMPI_COMM_WORLD_RANK='3', OMPI_COMM_WORLD_LOCAL_RANK='1'))
    threads = torch.get_num_threads()
    try:
        join_tasks()
    finally:
        torch.set_num_threads(threads)
    assert [os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')] == ['3', '1', '4']


def test_processes_that_accelerate_does_not_join_are_refused(tmp_path, launch):
    (tmp_path / 'alone.py').write_text(
        f'import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train.engine\nfrom train.train import main\n'
        f'train.engine._has_collectives = lambda: True\nmain(sys.argv[1:])\n')  # as of a device that joins none
    run = launch(2, tmp_path / 'alone.py', '--output', str(tmp_path / 'output'), code=1)
    assert '2 processes were launched, but Accelerate joins none' in run.stderr
    assert not (tmp_path / 'output').exists()
