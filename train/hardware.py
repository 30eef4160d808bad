"""What a result was measured on, and with."""
import platform
import re
import subprocess
from pathlib import Path
from typing import Dict, Optional

import timm
import torch

import timm_tmblock


def describe_hardware(device: torch.device) -> str:
    if device.type == 'cuda':
        return f'{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}'
    name = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').is_file():
        names = re.findall(r'^model name\s*: (.+)', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
        name = names[0] if names else name
    return f'{name}, {torch.get_num_threads()} threads'


def describe_versions() -> Dict[str, str]:
    return dict(
        timm_tmblock=timm_tmblock.__version__, torch=torch.__version__, timm=timm.__version__,
        python=platform.python_version())


def find_commit() -> Optional[str]:
    """Commit of the checkout, None outside of one."""
    command = ['git', '-C', str(Path(__file__).parent), 'rev-parse', 'HEAD']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
