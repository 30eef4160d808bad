"""Results on disk: JSON, text and figures, each written whole or not at all, and the same bytes each time."""
import json
import os
from pathlib import Path
from typing import Any

from timm_tmblock.checkpoint import writing


def write_text(path: Path, text: str) -> None:
    with writing(path) as tmp:
        tmp.write_text(text)
        os.replace(tmp, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + '\n')


def save_figure(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write a Matplotlib figure as the kind of file that the suffix names, without date or version in it."""
    from matplotlib import rc_context

    kind = path.suffix[1:]
    with writing(path) as tmp, rc_context({'svg.hashsalt': path.name}):
        figure.savefig(tmp, format=kind, dpi=dpi, metadata={'Date': None} if kind == 'svg' else {'Software': None})
        os.replace(tmp, path)
