"""Results on disk: JSON, text and figures, each written whole or not at all, and the same bytes each time."""
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Optional, Union

from timm_tmblock.files import write_text, writing


def to_json(value: Any, indent: Optional[int] = None) -> str:
    """Numbers that JSON has none of, NaN and infinity, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    write_text(path, to_json(value, indent=1) + '\n')


def write_report(name: Any, result: Any, table: str) -> None:
    """Write NAME.json for programs and NAME.md for people."""
    write_json(Path(f'{name}.json'), result)
    write_text(Path(f'{name}.md'), table)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def hash_file(path: Union[None, str, Path]) -> Optional[str]:
    """sha256 of a file, None if there is none."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else None


def save_figure(figure: Any, path: Path, bbox_inches: Optional[str] = None) -> None:
    """Write a Matplotlib figure as the kind of file that the suffix names, without date or version in it."""
    from matplotlib import rc_context

    kind = path.suffix[1:]
    with writing(path) as tmp, rc_context({'svg.hashsalt': path.name}):
        metadata = {'Date': None} if kind == 'svg' else {'Software': None}
        figure.savefig(tmp, format=kind, dpi=110, bbox_inches=bbox_inches, metadata=metadata)
        os.replace(tmp, path)
