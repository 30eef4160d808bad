"""Reports of commands: JSON for programs, Markdown for people."""
import json
import os
from pathlib import Path
from typing import Any

from timm_tmblock.checkpoint import writing


def write_report(name: Any, result: Any, table: str) -> None:
    """Write NAME.json and NAME.md.

    Raises:
        InputError: If they cannot be written.
    """
    for suffix, text in (('json', json.dumps(result, indent=1) + '\n'), ('md', table)):
        path = Path(f'{name}.{suffix}')
        with writing(path) as tmp:
            tmp.write_text(text)
            os.replace(tmp, path)
