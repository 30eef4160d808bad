"""Processes that end together: one of them says why, and none waits for one that is gone."""
import os
import time
from contextlib import contextmanager
from typing import Iterator

from accelerate import Accelerator
from accelerate.utils import gather_object

from timm_tmblock.errors import InputError

PATIENCE = 10.  # seconds in which the launcher ends the others, once a process has said what is wrong
LOST = ('Connection closed by peer', 'Connection reset by peer', 'Broken pipe')  # what Gloo says of one that is gone


@contextmanager
def agreeing(accelerator: Accelerator) -> Iterator[None]:
    """End all processes where what one does here ends it. All of them enter.

    Raises:
        InputError: On all, the one of the first process that has one.
    """
    error = None
    try:
        yield
    except InputError as e:
        error = e
    if accelerator.num_processes > 1:
        said = [text for text in gather_object(['' if error is None else str(error)]) if text]
        error = InputError(said[0]) if said else None
    if error is not None:
        raise error


@contextmanager
def leaving_it_to_the_first() -> Iterator[None]:
    """Let the first process of a machine say what ends all of them, and one that is gone what ends the others."""
    launched = 'LOCAL_RANK' in os.environ
    try:
        yield
    except (InputError, OSError):
        if os.environ.get('LOCAL_RANK', '0') != '0':
            time.sleep(PATIENCE)
        raise
    except RuntimeError as e:
        if launched and any(words in str(e) for words in LOST):
            time.sleep(PATIENCE)
        raise
