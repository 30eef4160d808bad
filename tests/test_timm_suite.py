"""timm's own model tests, from the source distribution of the installed version.

Two lists in them are others: the files whose models are tested for `forward_intermediates` are ours too, and the models
are ours alone, as thousands of tests would be collected and left out.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

CACHE = Path(__file__).parent.parent / '.cache'
KINDS = 10  # of tests that timm has for every model of this kind; fewer mean that some were not collected
OURS = '''
_list_all = list_models


def list_models(*args, **kwargs):
    return [name for name in _list_all(*args, **kwargs)
            if timm.model_entrypoint(name).__module__.startswith('timm_tmblock.')]


torch_device = '''


@pytest.fixture(scope='module')
def timm_source():
    folder = CACHE / f'timm-{timm.__version__}'
    if not (folder / 'tests' / 'test_models.py').is_file():
        CACHE.mkdir(exist_ok=True)
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm',
                   '--retries', '0', '--timeout', '10', '--dest', str(CACHE), f'timm=={timm.__version__}']
        download = subprocess.run(command, capture_output=True, text=True)
        if download.returncode and not os.environ.get('CI'):
            pytest.skip(f'the source distribution of timm cannot be fetched: {download.stderr.strip()[-200:]}')
        assert download.returncode == 0, download.stderr
        # and not timm/, which would be imported in place of what is installed
        subprocess.run(['tar', 'xzf', f'{folder}.tar.gz', '-C', str(CACHE), f'{folder.name}/tests'], check=True)
    tests = (folder / 'tests' / 'test_models.py').read_text()
    listed, after_imports = 'FEAT_INTER_FILTERS = [', '\ntorch_device = '
    assert tests.count(listed) == tests.count(after_imports) == 1
    tests = tests.replace(listed, f"{listed}'tm_resnet', 'tm_densenet', ").replace(after_imports, OURS)
    (folder / 'tests' / 'test_models_here.py').write_text(tests)
    return folder


def test_timm_model_tests_pass(timm_source):
    names = [n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith('timm_tmblock.')]
    assert names
    command = [sys.executable, '-m', 'pytest', 'tests/test_models_here.py', '-k', ' or '.join(f'{n}' for n in names),
               '-q', '-rp', '-p', 'no:cacheprovider', '--rootdir', str(timm_source)]
    run = subprocess.run(
        command, cwd=timm_source, capture_output=True, text=True,
        env={**os.environ, 'TORCH_BACKEND': 'timm_tmblock'})
    assert run.returncode == 0, run.stdout[-3000:]
    passed = re.findall(r'(?m)^PASSED \S+::(\w+)\[(?:\S+-)?([^\s-]+)\]$', run.stdout)
    kinds = {name: {kind for kind, model in passed if model == name} for name in names}
    assert len(kinds['rn26']) >= KINDS and all(tests == kinds['rn26'] for tests in kinds.values()), kinds
