"""What a result was measured on."""
import platform
import re
from pathlib import Path

import torch


def describe_hardware(device: torch.device) -> str:
    if device.type == 'cuda':
        return f'{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}'
    name = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').is_file():
        names = re.findall(r'^model name\s*: (.+)', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
        name = names[0] if names else name
    return f'{name}, {torch.get_num_threads()} threads'
