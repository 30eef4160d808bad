"""What ends a run early is named in one sentence, and nothing bad is written down."""
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import needs_fork
from PIL import Image
from safetensors.torch import load_file

import train.data
import train.loader
from timm_tmblock.errors import InputError
from train.checkpoint import find_checkpoints
from train.config import parse_args
from train.failure import advise_on_memory, estimate_disk_space, naming_failures
from train.train import Trainer, main

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures('fresh_accelerate')
TINY = ['--train-split', 'train[:36]', '--val-split', 'test[:15]', '--batch-size', '12', '--epochs', '2',
        '--device', 'cpu', '--report-to', 'none', '--experiment', 'run', '--checkpoint-interval', '1']


def fail_at(monkeypatch, n, action):
    step, calls = Trainer.step, []

    def failing(self, images, targets):
        calls.append(1)
        if len(calls) == n:
            images = action(images)
        step(self, images, targets)

    monkeypatch.setattr(Trainer, 'step', failing)


def assert_stops(tmp_path, match, *flags):
    with pytest.raises(InputError, match=match) as error:
        main([*TINY, '--output', str(tmp_path), *flags])
    assert '\n' not in str(error.value)
    return tmp_path / 'run'


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_loss_that_is_not_finite_is_named_and_never_saved(tmp_path, monkeypatch, value):
    fail_at(monkeypatch, 5, lambda images: images * value)
    folder = assert_stops(
        tmp_path, r'not finite in update 5, at learning rate 0\.0002.*; the last good checkpoint is update-00000004, '
        r'continue with --resume .*--clip-grad', '--epochs', '2')
    weights = load_file(find_checkpoints(folder)[-1] / 'model.safetensors')
    assert all(w.isfinite().all() for w in weights.values())


@pytest.mark.parametrize('interval', ['0', '1'])
@pytest.mark.parametrize('spoilt', ['conv1.weight', 'layer1.blocks.0.norm1.running_var'])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, interval, spoilt):
    step = Trainer.step

    def spoil(self, images, targets):
        step(self, images, targets)
        if self.state.update == 6:  # the last of an epoch: no loss is taken after it
            self.plain_model.state_dict()[spoilt][0] = torch.nan

    monkeypatch.setattr(Trainer, 'step', spoil)
    last = 'update-00000005' if interval == '1' else 'update-00000003'
    folder = assert_stops(tmp_path, f'a weight was not finite in update 6, .* last good checkpoint is {last}, continue',
                          '--checkpoint-interval', interval)
    for file in (find_checkpoints(folder)[-1] / 'model.safetensors', *folder.glob('*.safetensors')):
        assert all(w.isfinite().all() for w in load_file(file).values())


def test_memory_that_runs_out_names_the_batch_size_to_try(tmp_path, monkeypatch):
    fail_at(monkeypatch, 2, lambda images: torch.empty(2 ** 60))
    assert_stops(tmp_path, r'too little memory: rn26_tm with a batch of 12 .*; try --batch-size 6 --grad-accum-steps 2')


def test_memory_of_a_gpu_that_runs_out_is_named_too(tmp_path, monkeypatch):
    def out_of_memory(images):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.')

    fail_at(monkeypatch, 2, out_of_memory)
    assert_stops(tmp_path, r'try --batch-size 6')


@pytest.mark.parametrize('place', ['load_parts', 'create_loader'])
def test_images_that_do_not_fit_are_not_blamed_on_the_batch(tmp_path, monkeypatch, place):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.')

    monkeypatch.setattr(f'train.train.{place}', out_of_memory)
    with pytest.raises(InputError, match='too little memory: the images do not fit; lower --memory-limit') as error:
        main([*TINY, '--output', str(tmp_path)])
    assert '--batch-size' not in str(error.value)


def test_device_without_memory_to_measure_with_gets_a_batch_size_of_measuring(tmp_path, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.')

    monkeypatch.setattr('train.train.validate', out_of_memory)
    assert_stops(tmp_path, 'too little memory: try --val-batch-size 128')


@pytest.mark.parametrize('model, on_gpu, told', [
    ('dn100_tm', True, True), ('dn100_tm', False, False), ('rn26_tm', True, False)])
def test_dense_networks_can_take_less_memory_of_a_gpu(monkeypatch, model, on_gpu, told):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: on_gpu)
    advice = advise_on_memory(parse_args(['--model', model]))
    assert ('--model-kwargs memory_efficient=True' in advice) is told and '--grad-checkpointing' in advice


def test_advice_on_memory_can_be_followed_with_graphs():
    captured = advise_on_memory(parse_args([
        '--torchcompile', '--torchcompile-mode', 'reduce-overhead', '--batch-size', '8']))
    assert '--batch-size 4, for updates of half as many images, or --grad-checkpointing' in captured
    assert '--grad-accum-steps' not in captured  # which it cannot have
    advice = advise_on_memory(parse_args(['--cuda-graph', '--batch-size', '8']))
    assert '--batch-size 4 --grad-accum-steps 2 --no-cuda-graph, which' in advice


def test_cache_on_a_full_disk_is_not_data_that_is_gone(tmp_path, monkeypatch):
    def fill(*args, **kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device', 'cache/model.safetensors')

    monkeypatch.setattr('train.model.timm.create_model', fill)
    with pytest.raises(OSError, match='No space left on device'):  # of which the command says that
        main([*TINY, '--output', str(tmp_path), '--model', 'rn26', '--pretrained'])


@needs_fork
def test_worker_that_dies_is_named(tmp_path, monkeypatch):
    """Killed for real, as the kernel does it when memory is short."""
    parent = os.getpid()

    def create_policy(config):
        def policy(image):
            if os.getpid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
            return image
        return policy

    monkeypatch.setattr(train.loader, 'create_policy', create_policy)
    assert_stops(tmp_path, r'A process that loads data died \(DataLoader worker.*try fewer --workers', '--aa', 'v0')


@pytest.fixture
def images(tmp_path):
    for split in ('train', 'validation'):
        for label, name in enumerate(('ant', 'bee')):
            (tmp_path / 'images' / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(10 * label + i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / 'images' / split / name / f'{i}.png')
    return tmp_path / 'images'


STREAM = ['--train-split', 'train', '--val-split', 'validation', '--batch-size', '2', '--memory-limit', '0',
          '--workers', '1']


def test_processes_ask_each_other_every_two_seconds():
    """Of three, whose updates take an eighth of a second, then 5; at the end of an epoch none was made since."""
    questions, seconds, terminated = [], [0.], [False]

    def reduce(told):
        questions.append(trainer.state.update)
        return torch.tensor([float(terminated[0]), 3 * seconds[0]])

    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=3, device='cpu', reduce=reduce), asked=lambda: False,
        state=SimpleNamespace(update=0, batch=1), next_question=0, last_question=(0, 0.))
    for update in range(1, 100):
        made = update - trainer.last_question[0]
        seconds[0] = made / 8 if update <= 49 else 5. * made
        trainer.state.update = update
        assert not Trainer.is_asked_to_stop(trainer)
        if update == 49:
            trainer.state.batch, seconds[0] = 0, 0.2
            assert not Trainer.is_asked_to_stop(trainer)
            trainer.state.batch = 1
    assert questions == [1, 17, 33, 49, 49, *range(50, 100)]
    trainer.state.update, terminated[0] = 100, True
    assert Trainer.is_asked_to_stop(trainer)  # though not this process


def test_worker_that_had_sigterm_too_is_no_failure(tmp_path, monkeypatch):
    def terminate(images):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError('DataLoader worker (pid 1) is killed by signal: Terminated. ')

    fail_at(monkeypatch, 3, terminate)
    with pytest.raises(InputError, match='^Interrupted in epoch 1 at update 2; .*continue with --resume'):
        main([*TINY, '--output', str(tmp_path)])


@pytest.mark.parametrize('text', [
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out",
    'Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to allocate shared memory(shm) for'])
def test_worker_without_shared_memory_is_told_apart(text):
    with pytest.raises(InputError, match='There is too little shared memory'), naming_failures(''):
        raise RuntimeError(text)


def test_error_in_a_worker_is_no_death():
    with pytest.raises(RuntimeError, match='a transform failed'), naming_failures(''):
        raise RuntimeError('Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: a transform failed')


@needs_fork
def test_lack_of_shared_memory_ends_a_run_that_would_wait_for_the_batch(tmp_path, monkeypatch):
    def fail(tensor):
        raise RuntimeError('unable to allocate shared memory(shm) for file </torch_7_8_9>')

    monkeypatch.setattr(torch.Tensor, 'share_memory_', fail)
    assert_stops(tmp_path, 'There is too little shared memory', '--aa', 'v0', '--workers', '1')


def test_worker_that_is_stuck_does_not_keep_a_run_from_ending():
    """It ignores the SIGTERM that multiprocessing sends at the end, before it waits for it."""
    code = (
        'import sys, time\n'
        'from torch.utils.data import DataLoader, Dataset\n'
        'from train.signals import init_worker\n'
        'class Stuck(Dataset):\n'
        '    def __len__(self): return 9\n'
        '    def __getitem__(self, i): time.sleep(1000)\n'
        'batches = iter(DataLoader(Stuck(), num_workers=1, worker_init_fn=init_worker))\n'
        'time.sleep(1)\n'
        'sys.exit(2)\n')
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, timeout=120).returncode == 2


@pytest.mark.skipif(not hasattr(socket, 'AF_UNIX'), reason='needs the sockets of Unix')
@pytest.mark.parametrize('init', ['init_worker', 'print'])
def test_batch_that_is_not_taken_to_the_end_leaves_no_traceback(init):
    """As when a signal interrupts who takes it."""
    code = (
        'import multiprocessing, os, socket, sys, time\n'
        'from multiprocessing.reduction import DupFd\n'
        'from train.signals import init_worker\n'
        'def serve(queue):\n'
        f'    {init}(0)\n'
        '    queue.put(DupFd(os.open(os.devnull, os.O_RDONLY))._id)\n'
        '    time.sleep(1000)\n'
        'context = multiprocessing.get_context("fork")\n'
        'queue = context.Queue()\n'
        'process = context.Process(target=serve, args=(queue,), daemon=True)\n'
        'process.start()\n'
        'address, key = queue.get()\n'
        'for _ in range(2):\n'  # the second is served after the first has failed
        '    client = socket.socket(socket.AF_UNIX)\n'
        '    client.connect(address)\n'
        '    client.recv(1)\n'
        '    client.close()\n'  # with bytes that it has not read: the other side gets ECONNRESET
        'client = socket.socket(socket.AF_UNIX)\n'
        'client.connect(address)\n'
        'client.recv(1)\n'
        'process.kill()\n')
    error = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, timeout=120, stderr=subprocess.PIPE, text=True).stderr
    assert ('ConnectionResetError' in error) == (init == 'print'), error


def test_unreadable_image_of_a_streamed_set_is_named(tmp_path, images):
    (images / 'train' / 'bee' / '2.png').write_bytes(b'not an image')
    assert_stops(tmp_path, r'Image 6 of the dataset cannot be read.*bee/2\.png', '--dataset', str(images), *STREAM)


def test_unreadable_image_that_another_process_decodes_is_named(tmp_path, images, monkeypatch):
    monkeypatch.setattr(train.data, 'WORTH_A_PROCESS', 1)
    (images / 'train' / 'bee' / '2.png').write_bytes(b'not an image')
    flags = ['--train-split', 'train', '--val-split', 'validation', '--batch-size', '2', '--workers', '1']
    assert_stops(tmp_path, r'^Image 6 of the dataset cannot be read.*bee/2\.png', '--dataset', str(images), *flags)
    assert not (tmp_path / 'run').exists()


def test_set_that_is_lost_while_training_is_named(tmp_path, images, monkeypatch):
    def lose(batch):
        shutil.rmtree(images / 'train', ignore_errors=True)
        return batch

    fail_at(monkeypatch, 4, lose)
    assert_stops(tmp_path, r'cannot be read.*images/train', '--dataset', str(images), *STREAM)


def test_disk_without_room_for_the_checkpoints_is_refused_before_training(tmp_path, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(10 ** 9, 10 ** 9 - 10 ** 7, 10 ** 7))
    assert_stops(tmp_path, r'run needs up to \d+ MB more for weights and checkpoints and its disk has 10 MB free')
    assert not (tmp_path / 'run').exists()


def test_run_that_goes_on_needs_no_room_for_what_it_has_written(tmp_path, monkeypatch):
    flags = [*TINY, '--img-size', '8', '--output', str(tmp_path), '--epochs', '1']
    main(flags)
    needed = estimate_disk_space(timm.create_model('rn26_tm'), parse_args(flags))
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(2 * needed, needed, needed * 3 // 4))
    assert main(['--resume', str(tmp_path / 'run'), '--epochs', '2'])['epochs'] == 2
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(2 * needed, needed, needed // 10))
    with pytest.raises(InputError, match='MB more for weights and checkpoints'):
        main(['--resume', str(tmp_path / 'run'), '--epochs', '3'])


def test_room_that_is_asked_for_is_room_that_is_used(tmp_path):
    """The estimate is above what a run with Adam, the largest optimizer, leaves, and not by far."""
    flags = [*TINY, '--output', str(tmp_path), '--opt', 'adam', '--model-ema']
    main(flags)
    files = [p.stat() for p in (tmp_path / 'run').rglob('*') if p.is_file()]
    used = sum({file.st_ino: file.st_size for file in files}.values())
    assert used < estimate_disk_space(timm.create_model('rn26_tm'), parse_args(flags)) < 2 * used


def test_failure_on_one_of_two_processes_ends_both(tmp_path, forks):
    script = tmp_path / 'failing.py'
    script.write_text(f'''
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from timm_tmblock.errors import exiting_on_input_error
from train import train
step = train.Trainer.step
def poisoned(self, images, targets):
    bad = self.state.update == 2 and os.environ["RANK"] == "1"
    step(self, images * torch.nan if bad else images, targets)
train.Trainer.step = poisoned
with exiting_on_input_error():
    train.main(sys.argv[1:])
''')
    flags = [f if f != '12' else '6' for f in TINY]
    run = forks.run(script, *flags, '--output', str(tmp_path), processes=2)
    assert run.returncode == 2
    assert 'error: The loss or a weight was not finite in update 3' in run.stderr
    weights = load_file(find_checkpoints(tmp_path / 'run')[-1] / 'model.safetensors')
    assert all(w.isfinite().all() for w in weights.values())


def test_workers_killed_at_the_end_disturb_nothing_else_that_ends():
    code = '''if True:
        import atexit, time
        atexit.register(time.sleep, 1)  # runs after what is registered later
        import torch.utils.data
        import train.signals
        loader = torch.utils.data.DataLoader(range(8), num_workers=1, persistent_workers=True,
                                             worker_init_fn=train.signals.init_worker)
        iterator = iter(loader)
        next(iterator)
    '''
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert (run.returncode, run.stderr) == (0, '')
