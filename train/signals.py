"""Signals that end a run."""
import signal
from contextlib import contextmanager
from typing import Any, Iterator


@contextmanager
def stopping_at_signals() -> Iterator[None]:
    """Let SIGTERM, which schedulers send, stop what runs as Ctrl-C does."""
    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread, as in a notebook
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def outlive_sigterm(worker: int) -> None:
    """Leave a process that loads data to the one that started it, which tells of the end; some send SIGTERM to all."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
