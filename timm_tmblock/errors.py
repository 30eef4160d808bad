"""The error of bad input, and how the command lines end."""
import codecs
import errno
import io
import os
import select
import signal
import sys
from contextlib import contextmanager
from typing import Iterator, Optional, Tuple, Type

# of files that the user names: nobody may enter their folder, their name is too long, the disk is read-only
_OF_FILES = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EROFS)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class InputError(ValueError):
    """Input that cannot be used. The message is one sentence: what is wrong, and what to do.

    The command lines print it without a traceback and exit with its code.
    """
    exit_code = 2


class InterruptedWork(InputError):
    """Work that a signal ended, and how it is taken up again."""

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        """
        Args:
            message: The sentence.
            signum: Number of the signal; the exit code is this + 128, as a shell tells it.
        """
        super().__init__(message)
        self.exit_code = 128 + signum


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its name where it says nothing."""
    lines = [line.strip() for line in str(error).split('\n') if line.strip()]
    if lines[1:] and getattr(error, 'response', None) is not None:  # the Hub begins with a number of the request
        return lines[1]
    return lines[0] if lines else type(error).__name__


def say_why_not_loaded(error: BaseException) -> str:
    """The last line of PyTorch's error of weights, whose first is a headline; `first_line` of any other error."""
    text = str(error).strip()
    return text.split('\n')[-1].strip() if text.startswith('Error(s) in loading') else first_line(error)


def make_names_printable() -> None:
    """Let standard output take names of files that are not UTF-8, and what its encoding lacks as its code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        is_utf8 = codecs.lookup(sys.stdout.encoding).name == 'utf-8'
        sys.stdout.reconfigure(errors='surrogateescape' if is_utf8 else 'backslashreplace')


@contextmanager
def exiting_on_input_error(*others: Type[Exception]) -> Iterator[None]:
    """What each command line does with an InputError, or one of `others`, and when nobody reads on (`... | head`)."""
    kinds: Tuple[Type[Exception], ...] = (InputError, *others)
    make_names_printable()
    try:
        yield
    except kinds as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(getattr(e, 'exit_code', 2))
    except BrokenPipeError:
        if not _is_unread():  # it was another pipe
            raise
        sys.exit(1)
    except OSError as e:
        if e.errno not in FULL_DISK and (e.errno not in _OF_FILES or e.filename is None):
            raise
        print(f'error: {e.filename or "A file"} cannot be used: {e.strerror}.', file=sys.stderr)
        sys.exit(2)
    finally:
        full: Optional[OSError] = None
        try:
            sys.stdout.flush()
        except (BrokenPipeError, AttributeError, ValueError):  # gone; none at all; closed
            pass
        except OSError as e:
            full = e
        if full or _is_unread():  # Python would complain at exit of what it could not write
            with open(os.devnull, 'wb') as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if full:
            print(f'error: The output cannot be written: {full.strerror}.', file=sys.stderr)
            sys.exit(2)


def _is_unread() -> bool:
    """Whether the reader of standard output has gone."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)  # macOS watches nothing that is not asked for
    except (AttributeError, OSError, ValueError):  # Windows; no file, as where output is captured; closed
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
