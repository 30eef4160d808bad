"""How the command lines end: by a sentence and 2, or quietly where nobody reads what they print."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / 'timm_tmblock'
BUFFERED = {k: v for k, v in os.environ.items() if k != 'PYTHONUNBUFFERED'}
PROGRAM = f'''
import sys, time
sys.path.insert(0, {str(PACKAGE)!r})  # the module alone, without torch
from errors import InputError, exiting_on_input_error
with exiting_on_input_error():
    print("first", flush=True)
'''


def run(body, cut=False, unbuffered=False):
    """Code, output and errors of a command line; its reader takes the first line and goes if `cut`."""
    process = subprocess.Popen(
        [sys.executable, *(['-u'] if unbuffered else []), '-c', f'{PROGRAM}    {body}'],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=BUFFERED)
    output = process.stdout.readline() if cut else process.stdout.read()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    return process.wait(timeout=60), output, errors


def test_bad_input_is_one_sentence_and_two():
    assert run('raise InputError("No; give another.")') == (2, 'first\n', 'error: No; give another.\n')


def test_file_that_nobody_may_use_is_one_sentence():
    name = 300 * 'x'
    assert run(f'open({name!r})') == (2, 'first\n', f'error: {name} cannot be used: File name too long.\n')
    code, output, errors = run('open("nothing")')  # which no message was written for
    assert code == 1 and 'Traceback' in errors


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no device that is always full')
def test_full_disk_is_one_sentence_where_the_output_is_written_last():
    body = f'{PROGRAM.replace(", flush=True", "")}    print("last")'
    with open('/dev/full', 'w') as full:
        run = subprocess.run([sys.executable, '-c', body], stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED)
    assert run.returncode == 2 and run.stderr == 'error: The output cannot be written: No space left on device.\n'


@pytest.mark.parametrize('unbuffered', [False, True])
@pytest.mark.parametrize('body', [
    '[print("x" * 1000) for _ in range(1000)]',
    'time.sleep(0.5); print("last")',
    'time.sleep(0.5); print("last"); sys.exit(0)',
])
def test_output_that_nobody_reads_is_no_error(body, unbuffered):
    code, output, errors = run(body, cut=True, unbuffered=unbuffered)
    assert output == 'first\n' and errors == '' and code in (0, 1)


def test_bad_input_is_told_where_nobody_reads_the_output():
    assert run('time.sleep(0.5); print("x"); raise InputError("No.")', cut=True) == (2, 'first\n', 'error: No.\n')


def test_another_pipe_that_breaks_is_an_error():
    code, output, errors = run('raise BrokenPipeError("of a connection")')
    assert code == 1 and output == 'first\n' and 'BrokenPipeError: of a connection' in errors
