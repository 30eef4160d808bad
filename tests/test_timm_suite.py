"""timm's own model tests, from the source distribution of the installed version.

One list in them is longer: that of the files whose models are tested for `forward_intermediates`.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

CACHE = Path(__file__).parent.parent / '.cache'
TESTS_PER_MODEL = 14  # of those timm runs for every model of this kind; a lower count means some were not collected


@pytest.fixture(scope='module')
def timm_source():
    folder = CACHE / f'timm-{timm.__version__}'
    if not (folder / 'tests' / 'test_models.py').is_file():
        CACHE.mkdir(exist_ok=True)
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm',
                   '--dest', str(CACHE), f'timm=={timm.__version__}']
        download = subprocess.run(command, capture_output=True, text=True)
        if download.returncode and not os.environ.get('CI'):
            pytest.skip(f'the source distribution of timm cannot be had: {download.stderr.strip()[-200:]}')
        assert download.returncode == 0, download.stderr
        subprocess.run(['tar', 'xzf', f'{folder}.tar.gz', '-C', str(CACHE)], check=True)
    tests = (folder / 'tests' / 'test_models.py').read_text()
    listed = 'FEAT_INTER_FILTERS = ['
    assert tests.count(listed) == 1
    (folder / 'tests' / 'test_models_here.py').write_text(
        tests.replace(listed, f"{listed}'tm_resnet', 'tm_densenet', "))
    return folder


def test_timm_model_tests_pass(timm_source):
    names = [n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith('timm_tmblock.')]
    assert names
    command = [sys.executable, '-m', 'pytest', 'tests/test_models_here.py', '-k', ' or '.join(f'{n}' for n in names),
               '-q', '-p', 'no:cacheprovider', '--rootdir', str(timm_source)]
    run = subprocess.run(
        command, cwd=timm_source, capture_output=True, text=True,
        env={**os.environ, 'TORCH_BACKEND': 'timm_tmblock', 'HF_HUB_OFFLINE': '1'})
    summary = run.stdout[-3000:]
    assert run.returncode == 0, summary
    passed = re.search(r'(\d+) passed', summary)
    assert passed and int(passed[1]) >= TESTS_PER_MODEL * len(names), summary
