"""Files and folders that are written whole or not at all."""
import errno
import os
import shutil
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator

from safetensors import SafetensorError

from .errors import InputError


@contextmanager
def writing(path: Path, unique: bool = False, cleanup: bool = True) -> Iterator[Path]:
    """Write `path` under a temporary name, so that nothing is ever half-written.

    Args:
        path: File or folder to write.
        unique: Take a name that no other writer has, as another may write `path` meanwhile. Otherwise all processes
            of a run use the same name, so what a killed run left is overwritten by the next.
        cleanup: Remove what is left; of processes that write the same together, only the one that renames it may.

    Yields:
        The temporary name. Renaming it to `path` is the caller's last step; whatever is left of it is removed.

    Raises:
        InputError: If the disk is full or not writable.
    """
    tmp = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}.tmp' if unique else f'.{path.name}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
    except (OSError, SafetensorError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not _is_of_writing(e):
            raise
        raise InputError(f'Cannot write {path}: {_reason(e)}; files already there are intact.') from e
    finally:
        if cleanup:
            remove(tmp)


def check_writable(path: Path) -> None:
    """Tell before long work that its result could not be written.

    Raises:
        InputError: If the folder of `path` is not writable, or cannot be made.
    """
    with writing(path, unique=True) as tmp:
        tmp.touch()


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        InputError: If the disk is full or not writable.
    """
    with writing(path) as tmp:
        tmp.write_text(text, encoding='utf-8', newline='\n')
        os.replace(tmp, path)


def _is_of_writing(error: RuntimeError) -> bool:
    """Whether it is of torch.save, not of a GPU or another process."""
    return _is_of_a_full_disk(str(error)) or 'Parent directory' in str(error)


def _is_of_a_full_disk(text: str) -> bool:
    return any(words in text for words in ('No space left', 'PytorchStreamWriter', 'inline_container'))


def _reason(error: Exception) -> str:
    text = str(error)
    if getattr(error, 'errno', None) == errno.ENOSPC or _is_of_a_full_disk(text):
        return 'the disk is full, free some space'
    return getattr(error, 'strerror', None) or text.split('\n')[0]


def remove(path: Path) -> None:
    """Remove a file or folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
