"""Signals that end a run."""
import atexit
import multiprocessing
import signal
import sys
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Callable, Iterator, Optional, Type


@contextmanager
def stopping_at_signals(at_once: bool = True) -> Iterator[Callable[[], bool]]:
    """Let SIGTERM, which schedulers send, stop what runs.

    Args:
        at_once: As Ctrl-C does; otherwise what runs asks whether it came, and stops by itself.

    Yields:
        Function that tells whether it came. It may cause other errors too, as data-loading processes may get it.
    """
    asked = False

    def stop(signum: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it, and the scheduler that ends the launcher
        if at_once:
            raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread, as in a notebook
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, previous)


def init_worker(worker: int) -> None:
    """Ignore SIGTERM, which schedulers send to every process, in one that loads data: its parent ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = _print_exception


def _print_exception(kind: Type[BaseException], error: BaseException, traceback: Optional[TracebackType]) -> None:
    # the thread of a worker that hands over batches gets these when a signal interrupted the parent
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


@atexit.register
def _kill_workers() -> None:
    # multiprocessing, whose turn comes next, would send them SIGTERM and wait for ever
    if hasattr(signal, 'SIGCHLD'):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would raise an error in whatever runs then
    for process in multiprocessing.active_children():
        if process.daemon:  # it waits for the others
            process.kill()
