"""`python -m timm_tmblock run`: other scripts find the models without importing the package."""
import runpy
import subprocess
import sys

import pytest

from timm_tmblock.__main__ import main
from timm_tmblock.errors import InputError

SCRIPT = """
import sys
import neighbour
import timm
assert __name__ == '__main__' and neighbour.here
print(timm.create_model('rn26_tm', device='meta').num_classes, *sys.argv[1:])
sys.exit(3)
"""


def test_script_finds_models_arguments_and_neighbours(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'neighbour.py').write_text('here = True')
    run = subprocess.run(
        [sys.executable, '-m', 'timm_tmblock', 'run', str(tmp_path / 'script.py'), '--model', 'x', '-b', '1', 'y'],
        capture_output=True, text=True)
    assert run.stdout.split() == ['10', '--model', 'x', '-b', '1', 'y'] and run.returncode == 3, run.stderr


def test_errors_of_a_script_are_its_own(tmp_path, monkeypatch):
    script = tmp_path / 'script.py'
    script.write_text("raise PermissionError(13, 'Permission denied', 'a cache')")
    monkeypatch.setattr(sys, 'argv', ['timm_tmblock', 'run', str(script)])
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.delitem(sys.modules, 'timm_tmblock.__main__')
    with pytest.raises(PermissionError, match='a cache'):
        runpy.run_module('timm_tmblock', run_name='__main__')


def test_missing_script_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match='There is no script'):
        main(['run', str(tmp_path / 'none.py')])
