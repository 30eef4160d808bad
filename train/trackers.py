"""Trackers of a run: what Accelerate logs to."""
import sys
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from timm_tmblock.errors import InputError, first_line


def resolve_trackers(names: List[str]) -> List[str]:
    """The trackers of `--report-to`, of which Accelerate leaves out what is not installed without a word.

    Raises:
        InputError: If one is unknown or not installed.
    """
    if 'none' in names:
        return []
    available = list(map(str, get_available_trackers()))
    if 'all' in names:
        return available
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f'There is no tracker {name!r}; --report-to takes {", ".join(LOGGER_TYPE_TO_CLASS)}.')
        if name not in available:
            raise InputError(f'The tracker {name!r} is not installed; pip install {name}, or use --report-to none.')
    return names


def start_trackers(accelerator: Accelerator, args: Namespace, folder: Path, run_id: str, step: int) -> None:
    """Begin the run in every tracker or, where that knows it by `run_id` or its folder, take it up."""
    config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(args).items()}
    settings: Dict[str, Dict[str, Any]] = {
        # what a resumed run repeats is not shown twice; the values of the checkpoint's step were written before it
        'tensorboard': {'purge_step': step + 1},
        'wandb': {'name': folder.name, 'id': run_id, 'resume': 'allow', 'dir': str(folder)},
        'mlflow': {'run_name': folder.name},
        'trackio': {'name': folder.name, 'resume': 'allow'},
    }
    try:
        accelerator.init_trackers(args.project, config=config, init_kwargs=settings)
    except Exception as e:  # each has errors of its own
        raise InputError(
            f'The tracker ({" ".join(args.report_to)}) cannot be used: {first_line(e)}; set it up, or use --report-to '
            f'none.') from e


def fail_trackers(accelerator: Accelerator) -> None:
    """End the run in every tracker, as one that failed where it knows the difference."""
    for tracker in accelerator.trackers if accelerator.is_main_process else ():
        with suppress(Exception):  # its server may be what failed
            if tracker.name == 'wandb':
                tracker.tracker.finish(exit_code=1)
            elif tracker.name == 'mlflow':
                import mlflow  # type: ignore[import-not-found]
                mlflow.end_run('FAILED')
            else:
                tracker.finish()


def finish_trackers(accelerator: Accelerator) -> None:
    """End the run in every tracker, as `Accelerator.end_training`; one that cannot spoils nothing of a complete run."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as e:  # each has errors of its own
            print(f'{tracker.name} could not be closed ({first_line(e)}); the run is complete.', file=sys.stderr)
    accelerator.state.destroy_process_group()
