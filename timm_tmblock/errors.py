"""The error of bad input."""
import sys
from contextlib import contextmanager
from typing import Iterator, Tuple, Type


class InputError(ValueError):
    """Input that cannot be used. The message is one sentence: what is wrong, and what to do.

    The command lines print it alone and exit with code 2.
    """


@contextmanager
def exiting_on_input_error(*others: Type[Exception]) -> Iterator[None]:
    """What each command line does with an InputError, or one of `others`."""
    kinds: Tuple[Type[Exception], ...] = (InputError, *others)
    try:
        yield
    except kinds as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(2)
