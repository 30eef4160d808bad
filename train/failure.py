"""What can end a run early, each in one sentence that says what to do."""
import re
import shutil
from argparse import Namespace
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator

import torch
from accelerate.utils.memory import should_reduce_batch_size

from timm_tmblock.errors import FULL_DISK, InputError
from train.checkpoint import KEEP
from train.engine import captures_graphs


def advise_on_memory(args: Namespace) -> str:
    """What a training run can do about too little memory."""
    half = args.batch_size // 2
    on_gpu = args.device != 'cpu' and torch.cuda.is_available()
    if on_gpu and args.model.startswith('dn100') and 'memory_efficient' not in args.model_kwargs:
        other = '--model-kwargs memory_efficient=True or --grad-checkpointing'
    else:
        other = 'a smaller --img-size' if args.grad_checkpointing else '--grad-checkpointing'
    if not half:
        return f'use a smaller model or image size, or {other}'
    fails = f'{args.model} with a batch of {args.batch_size} does not fit; try --batch-size {half}'
    if captures_graphs(args):  # which add up no gradients
        return f'{fails}, for updates of half as many images, or {other}'
    return (
        f'{fails} --grad-accum-steps {2 * args.grad_accum_steps}{" --no-cuda-graph" if args.cuda_graph else ""}, '
        f'which keeps the images of an update (batch norm sees fewer at a time), or {other}')


def advise_on_images(args: Namespace) -> str:
    """What a training run can do about too little memory for its images."""
    if args.pool:  # which are divided in memory
        return 'the images do not fit; use a smaller --img-size, or --device cpu'
    return 'the images do not fit; lower --memory-limit, so that they are read while training'


@contextmanager
def naming_failures(memory_advice: str) -> Iterator[None]:
    """Say what an error of the data or the device means.

    Args:
        memory_advice: What to do where memory runs out.

    Raises:
        InputError: For memory that ran out, a worker that died, an image that cannot be read, a set that is gone.
    """
    try:
        yield
    except InputError as e:
        # a worker's error arrives with its traceback; the last line is the error itself
        lines = str(e).strip().split('\n')
        raise e if len(lines) == 1 else InputError(re.sub(r'^[\w.]*Error: ', '', lines[-1])) from e
    except MemoryError as e:  # of NumPy
        raise InputError(f'There is too little memory: {memory_advice}.') from e
    except (RuntimeError, OSError) as e:
        text = str(e)
        if isinstance(e, torch.OutOfMemoryError) or should_reduce_batch_size(e):
            raise InputError(f'The device has too little memory: {memory_advice}.') from e
        died = re.search(r'DataLoader worker \(pid[^)]*\)[^.]*', text)
        if 'shared memory(shm)' in text or died and 'Bus error' in text:
            raise InputError(
                'There is too little shared memory for the processes that load data; raise it (docker run --shm-size '
                '2g), or use fewer --workers or a smaller --batch-size.') from e
        if died:
            raise InputError(
                f'A process that loads data died ({died[0]}); the machine may be short of memory, so try fewer '
                f'--workers.') from e
        if isinstance(e, OSError) and e.filename is not None and e.errno not in FULL_DISK:
            raise InputError(f'{e.filename} can no longer be read ({e.strerror}); is the data still there?') from e
        raise


def estimate_disk_space(model: torch.nn.Module, args: Namespace) -> int:
    """Bytes that weights and checkpoints of a run take at most."""
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    ema = weights if args.model_ema else 0
    checkpoint = 3 * weights + ema  # weights, and at most two moments in the optimizer
    # one more of each while it is replaced; each checkpoint has the best weights of its time
    return (KEEP + 1) * checkpoint + (3 + KEEP + args.checkpoint_hist) * weights


def check_disk_space(folder: Path, model: torch.nn.Module, args: Namespace) -> None:
    """Refuse a run whose weights and checkpoints will not find room, beside what it has written already.

    Raises:
        InputError: If the disk of the folder has too little free space.
    """
    there = 0  # which is replaced
    with suppress(OSError):  # of files that another run removes meanwhile
        files = [p.stat() for p in (*folder.glob('checkpoints/**/*'), *folder.glob('**/*.safetensors')) if p.is_file()]
        there = sum({(file.st_dev, file.st_ino): file.st_size for file in files}.values())
    needed = estimate_disk_space(model, args) - there
    parent = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if parent is None:  # a drive of Windows that is not there, which is told by what is written
        return
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f'{folder} needs up to {needed / 1e6:.0f} MB more for weights and checkpoints and its disk has '
            f'{free / 1e6:.0f} MB free; make room or choose another --output.')
