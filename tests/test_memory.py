"""A training on the CPU takes the memory of one step again in the next."""
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = '''
import resource, sys
sys.path.insert(0, {root!r})
import torch
from train.memory import keep_freed_memory
assert {keep} == 0 or keep_freed_memory()
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2 ** 23) for _ in range(4)]  # 32 MB each
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
'''


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="glibc's allocator")
def test_freed_blocks_are_taken_again_without_page_faults():
    faults = []
    for keep in (0, 1):
        run = subprocess.run(
            [sys.executable, '-c', SCRIPT.format(root=str(ROOT), keep=keep)], capture_output=True, text=True,
            env={key: os.environ[key] for key in ('LD_LIBRARY_PATH',) if key in os.environ})
        assert run.returncode == 0, run.stderr
        faults.append(int(run.stdout))
    assert faults[1] < 50 < faults[0]  # huge pages alone, of 2 MB, would be 64
