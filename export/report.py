"""Reports of commands: JSON for programs, Markdown for people."""
import json
from pathlib import Path
from typing import Any

from timm_tmblock.checkpoint import write_text


def write_report(name: Any, result: Any, table: str) -> None:
    """Write NAME.json and NAME.md.

    Raises:
        InputError: If they cannot be written.
    """
    for suffix, text in (('json', json.dumps(result, indent=1) + '\n'), ('md', table)):
        write_text(Path(f'{name}.{suffix}'), text)
