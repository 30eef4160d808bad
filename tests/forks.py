"""Python programs in processes of their own that do not import PyTorch anew: forked from one that has.

Start-up takes longer than most runs of the tests. What a module reads from its environment when it is imported has to
be in that of the server. Modules that start a thread to be joined at the end, as onnxruntime, cannot be in the server.
A program that forgets to import a module that the server has loaded does not fail here.
"""
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from itertools import count
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Forks:
    """A process that has imported modules, and of which programs are forked; a context manager that ends it.

    All have one hash seed, so their sets have one order, which processes of a user do not.
    """

    def __init__(self, *modules: str, env=None) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.numbers = count()
        self.lock = threading.Lock()
        self.server = subprocess.Popen(
            [sys.executable, __file__, *modules], stdin=subprocess.PIPE, text=True, cwd=ROOT, env=env)

    def __enter__(self) -> 'Forks':
        return self

    def __exit__(self, *exception) -> None:
        self.server.terminate()
        self.server.communicate()
        self.folder.cleanup()

    def run(self, *command, processes: int = 1, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
        """Run a command as `python COMMAND` does: a script, '-m' and a module, or '-c' and code, and its arguments.

        Of several processes each has its rank in the environment, and one that fails ends the others, as with torchrun;
        its code is the code.
        """
        folder = Path(self.folder.name) / str(next(self.numbers))
        folder.mkdir()
        job = dict(
            folder=str(folder), command=list(map(str, command)), processes=processes, cwd=str(cwd), env=env)
        with self.lock:
            self.server.stdin.write(json.dumps(job) + '\n')
            self.server.stdin.flush()
        try:
            while not (folder / 'code').exists():
                assert self.server.poll() is None, 'the process to fork from has ended'
                time.sleep(0.02)
        except BaseException:  # as of a test that takes too long
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                os.killpg(int((folder / 'group').read_text()), signal.SIGKILL)
            raise
        code, out, err = ((folder / name).read_text() for name in ('code', 'out', 'err'))
        return subprocess.CompletedProcess(command, int(code), out, err)


def serve() -> dict:
    """Fork for each job; returns in the process that is to run one."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for programs
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            job = json.loads(line)
            rank = start(job)
            return become(job, rank)
    sys.exit()


def start(job: dict) -> int:
    """Fork the processes of a job and wait for them; returns the rank in each of these."""
    if job['processes'] > 1:
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            job['env'].update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]))
    os.setsid()
    write(job, 'group', os.getpid())
    running = set()
    for rank in range(job['processes']):
        pid = os.fork()
        if pid == 0:
            return rank
        running.add(pid)
    code = 0
    while running:
        pid, status = os.wait()
        running.remove(pid)
        code = code or os.waitstatus_to_exitcode(status)
        for other in running if code else ():
            os.kill(other, signal.SIGTERM)
            # where it waits for the one that is gone, as torchrun does
            signal.signal(signal.SIGALRM, lambda *_: [os.kill(other, signal.SIGKILL) for other in running])
            signal.alarm(30)
    write(job, 'code', code)
    os._exit(0)


def write(job: dict, name: str, value: int) -> None:
    path = Path(job['folder']) / name
    path.with_suffix('.tmp').write_text(str(value))
    path.with_suffix('.tmp').rename(path)


def become(job: dict, rank: int) -> dict:
    """Take the environment and the files of a program."""
    for fd, name, flags in (
            (0, os.devnull, os.O_RDONLY), (1, f'{job["folder"]}/out', os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            (2, f'{job["folder"]}/err', os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        file = os.open(name, flags, 0o600)
        os.dup2(file, fd)
        os.close(file)
    os.chdir(job['cwd'])
    os.environ.update(job['env'])
    if job['processes'] > 1:
        for name, value in (('RANK', rank), ('WORLD_SIZE', job['processes'])):
            os.environ[name] = os.environ[f'LOCAL_{name}'] = str(value)
    return job


def execute(first: str, *arguments: str) -> None:
    """What `python` does with its command line."""
    sys.path[0] = '' if first in ('-c', '-m') else str(Path(first).parent)
    if first == '-c':
        sys.argv = ['-c', *arguments[1:]]
        exec(compile(arguments[0], '<string>', 'exec'), {'__name__': '__main__'})
    elif first == '-m':
        sys.argv = [first, *arguments[1:]]
        runpy.run_module(arguments[0], run_name='__main__', alter_sys=True)
    else:
        sys.argv = [first, *arguments]
        runpy.run_path(first, run_name='__main__')


if __name__ == '__main__':
    sys.path[0] = str(ROOT)
    for module in sys.argv[1:]:
        __import__(module)
    execute(*serve()['command'])
