"""Processes that end together: one of them says why, and none waits for one that is gone."""
import os
import time
from contextlib import contextmanager
from typing import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils.distributed import world_info_from_env
from torch.distributed import DistError

from timm_tmblock.errors import InputError

PATIENCE = 10.  # seconds in which the launcher ends the others, once a process has said what is wrong
LOST = ('Connection closed by peer', 'Connection reset by peer', 'Broken pipe')  # what Gloo says of one that is gone
TASKS = ('SLURM_STEP_NUM_TASKS', 'WORLD_SIZE', 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE')  # of srun, a cluster and mpirun


def join_tasks() -> None:
    """Let processes that srun, mpirun or a cluster started train together, as timm's script does.

    Raises:
        InputError: If nobody said where they meet.
    """
    said = {name: int(os.environ.get(name) or 1) for name in TASKS}
    tasks = max(said.values())
    if 'LOCAL_RANK' in os.environ or tasks == 1:  # torchrun and accelerate launch set it
        return
    if 'MASTER_ADDR' not in os.environ:
        raise InputError(
            f'{tasks} tasks were started, and each would train by itself; export MASTER_ADDR, the host of the first, '
            f'to train together, or start one task per machine that runs torchrun or accelerate launch; for separate '
            f'runs unset {" and ".join(name for name in TASKS if said[name] > 1)}.')
    local_rank, rank, world_size = world_info_from_env()
    if said['OMPI_COMM_WORLD_SIZE'] == tasks > said['SLURM_STEP_NUM_TASKS']:  # timm would take Slurm's numbers
        local_rank, rank, world_size = (
            int(os.environ[f'OMPI_COMM_WORLD_{name}']) for name in ('LOCAL_RANK', 'RANK', 'SIZE'))
    if torch.cuda.device_count() == 1:  # each task sees its own alone
        local_rank = 0
    os.environ.update(LOCAL_RANK=str(local_rank), RANK=str(rank), WORLD_SIZE=str(world_size))
    job, step = (int(os.environ.get(name) or 0) for name in ('SLURM_JOB_ID', 'SLURM_STEP_ID'))
    os.environ.setdefault('MASTER_PORT', str(15000 + (7 * job + step) % 15000))  # jobs may share a machine
    if 'SLURM_STEP_NUM_TASKS' in os.environ:  # Accelerate divides the cores among mpirun's tasks, not among srun's
        cores = os.environ.get('SLURM_CPUS_PER_TASK') or str(torch.get_num_threads())
        torch.set_num_threads(int(os.environ.setdefault('OMP_NUM_THREADS', cores)))


@contextmanager
def agreeing(accelerator: Accelerator) -> Iterator[None]:
    """End all processes where what one does here ends it. All of them enter.

    Raises:
        InputError: On all, the one of the first process that has one.
    """
    error = None
    try:
        yield
    except InputError as e:
        error = e
    if accelerator.num_processes > 1:
        said = [text for text in gather_object(['' if error is None else str(error)]) if text]
        error = InputError(said[0]) if said else None
    if error is not None:
        raise error


@contextmanager
def leaving_it_to_the_first() -> Iterator[None]:
    """Let the first process of a machine fail at once; the others wait for the launcher to end them, so one is told."""
    try:
        yield
    except (InputError, OSError):
        if os.environ.get('LOCAL_RANK', '0') != '0':
            time.sleep(PATIENCE)
        raise
    except RuntimeError as e:
        if 'LOCAL_RANK' in os.environ and (isinstance(e, DistError) or any(words in str(e) for words in LOST)):
            time.sleep(PATIENCE)
        raise
