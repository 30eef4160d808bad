"""Publishing the weights a run chose on the Hugging Face Hub; a push that fails never loses the run."""
import os
import shlex
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import List, Optional

import torch.nn as nn

from timm_tmblock.errors import InputError, first_line
from train.augment import DataConfig
from train.data import to_set_flags
from train.files import hash_file

PRECISIONS = ('fp32', 'fp16')
INSTALL = 'pip install -e ".[export,hub,ort]" in the checkout'


def check_push(name: str, private: bool = False) -> None:
    """Ask before a run for what its push at the end needs: packages, a name and, in the first process, a token.

    Raises:
        InputError: For what would fail for certain. A Hub that cannot be asked now may be there at the end.
    """
    try:
        from export.publish import create_files  # noqa: F401
        from export.push import PushError, PushOptions, check_access
    except ImportError as e:
        raise InputError(f'--push-to-hub needs more than is installed ({e}); {INSTALL}.') from e
    options = PushOptions(name, private)
    options.validate()
    if os.environ.get('RANK', '0') != '0':
        return
    try:
        check_access(options)
    except PushError as e:
        print(f'The Hub could not be asked about the token ({e}); the push at the end will be tried.', file=sys.stderr)


def check_exportable(model: nn.Module, config: DataConfig) -> None:
    """Ask before a run whether its network can become the ONNX files that are pushed beside the weights.

    Raises:
        InputError: If it cannot.
    """
    from export.load import check_network
    from export.metadata import check_preprocessing
    from export.network import check_deterministic
    try:
        check_network(model, 'The model')
        check_deterministic(model)
        check_preprocessing(vars(config))
    except InputError as e:
        raise InputError(f'--push-to-hub cannot export this network: {e}') from e


def publish(weights: Path, args: Namespace) -> Optional[str]:
    """Push weights with ONNX files and a card.

    Args:
        weights: File of the run.
        args: Settings of the run.

    Returns:
        Address of the commit, or of a repository that has these weights already; None if it failed, which is said on
        stderr with the command that tries again.
    """
    flags = [
        str(weights), '--repo', args.push_to_hub, '--precisions', *PRECISIONS, *to_set_flags(args),
        '--check-split', args.test_split or args.val_split or args.train_split,
        *(['--private'] if args.hub_private else [])]
    from export.images import add_image_options, load_images
    from export.load import load
    from export.publish import create_files, save_model
    from export.push import WEIGHTS, PushError, PushOptions, check_access, find_weights_hash, get_endpoint, push
    parser = ArgumentParser()
    add_image_options(parser)
    image_args = parser.parse_known_args(flags)[0]
    options = PushOptions(args.push_to_hub, args.hub_private)
    try:
        check_access(options)
        model = load(str(weights))
        with tempfile.TemporaryDirectory() as name:
            save_model(model, Path(name))
            if find_weights_hash(options) == hash_file(Path(name) / WEIGHTS):
                # of an earlier end of this run: its exports and its card may have been added to since
                print(f'{args.push_to_hub} has these weights already and is left as it is.', file=sys.stderr)
                return f'{get_endpoint()}/{args.push_to_hub}'
        images = load_images(image_args, model, calibrate=False)
        with tempfile.TemporaryDirectory() as name:
            files = create_files(Path(name), model, args.push_to_hub, PRECISIONS, [], images, weights_file=weights)
            return push(Path(name), files, options, lambda line: None)
    except (InputError, PushError) as e:
        _say(str(e), flags)
    except Exception as e:  # a full disk, an exporter: nothing of it is worth losing the result of the run
        _say(f'{type(e).__name__}: {first_line(e)}.', flags)
    return None


def leave_hanging() -> None:
    """End the process if a push was given up whose threads would be waited for; the run is complete."""
    module = sys.modules.get('export.push')
    if module is not None:
        module.leave_hanging(0)


def _say(reason: str, flags: List[str]) -> None:
    words = ['python', '-m', 'export', 'push', *flags]
    command = subprocess.list2cmdline(words) if os.name == 'nt' else shlex.join(words)
    print(f'The run is complete but was not pushed: {reason} Push it with: {command}', file=sys.stderr)
