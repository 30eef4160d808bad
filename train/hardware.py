"""What a result was measured on, and with."""
import platform
import re
import subprocess
from pathlib import Path
from typing import Dict, Optional

import timm
import torch

import timm_tmblock
from timm_tmblock.errors import InputError


def resolve_device(name: str) -> torch.device:
    """PyTorch's device of 'auto' (a CUDA device, or the CPU), 'cpu', 'cuda' or 'mps'.

    Raises:
        InputError: If there is none here.
    """
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    if (name == 'cuda' and not torch.cuda.is_available()) or (name == 'mps' and not torch.backends.mps.is_available()):
        raise InputError(f'There is no {name} device here; use --device cpu.')
    return torch.device(name)


def emulates_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is far slower than float32: PyTorch has fast kernels for it on x86 from AVX-512 on."""
    return device.type == 'cpu' and torch.backends.cpu.get_cpu_capability() in ('AVX2', 'NO AVX')


def describe_hardware(device: torch.device, processes: int = 1) -> str:
    """What one process or several, on a GPU each, run on."""
    if device.type not in ('cpu', 'mps'):
        return f'{processes} x {torch.get_device_module(device).get_device_name(device)}'
    name = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').is_file():
        names = re.findall(r'^model name\s*: (.+)', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
        name = names[0] if names else name
    threads = torch.get_num_threads()
    return f'{name}, ' + ('its GPU by Metal' if device.type == 'mps' else f'{threads} thread{"s" * (threads != 1)}')


def describe_versions() -> Dict[str, str]:
    return dict(
        timm_tmblock=timm_tmblock.__version__, torch=torch.__version__, timm=timm.__version__,
        python=platform.python_version())


def find_commit() -> Optional[str]:
    """Commit of the checkout, with '-dirty' where it has changes that are in none; None outside of one."""
    command = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
