"""Settings of a training run: flags, and YAML recipes that set them."""
import argparse
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, NoReturn, Optional

import yaml
from timm.utils import ParseKwargs

from timm_tmblock.errors import InputError

SETTINGS = 'args.yaml'  # in the experiment folder


class Parser(argparse.ArgumentParser):
    """Parser whose complaint is one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f'{message}; see {self.prog} --help.')


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, not {value}')
    return value


def create_parser() -> Parser:
    parser = Parser(
        prog='train.py',
        description='Train an image classifier registered with timm on small images.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    boolean = argparse.BooleanOptionalAction
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML recipe; flags on the command line override it')

    group = parser.add_argument_group('data')
    group.add_argument('--dataset', default='sample', help=(
        "'sample' (2,000 images of CIFAR-10 that come with the project), torch/<name>, hfds/<hub id or folder>, or a "
        'folder with train/ and validation/ class folders'))
    group.add_argument('--data-dir', help='root folder of a torch/ set, cache folder of a hub set')
    group.add_argument('--dataset-download', action=boolean, default=False, help='let torchvision download the set')
    group.add_argument('--train-split', default='train')
    group.add_argument('--val-split', default='test')
    group.add_argument('--input-key', default='image', help='image column of an hfds/ set')
    group.add_argument('--target-key', default='label', help='label column of an hfds/ set')
    group.add_argument('--memory-limit', type=float, default=4., help='decode sets up to this many GB into memory')
    group.add_argument('--workers', type=int, default=4, help='decoding processes of larger sets')
    group.add_argument('--batch-size', type=positive, default=128, help='images per process and step')
    group.add_argument('--val-batch-size', type=positive, default=256)

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='rn26_tm', help='a name registered with timm')
    group.add_argument('--pretrained', action=boolean, default=False)
    group.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    group.add_argument('--img-size', type=positive, help=(
        "side the images are resized to and the model is laid out for; the model's if not given"))
    group.add_argument('--aux-head', action=boolean, default=False, help=(
        'supervise the patches of a baseline too, as RN26-aux; the classifier for it is left out of the weights'))
    group.add_argument('--drop', type=float, default=0., help='dropout rate before the classifier')
    group.add_argument('--patch-loss-weight', type=float, default=0.5, help='lambda of equation 3.1')
    group.add_argument('--channels-last', action=boolean, default=True)
    group.add_argument('--mean', type=float, nargs='+', help="of the set's pixels in [0, 1]; the model's if not given")
    group.add_argument('--std', type=float, nargs='+')

    group = parser.add_argument_group('optimizer, by timm')
    group.add_argument('--opt', default='adam')
    group.add_argument('--lr', type=float, default=1e-3)
    group.add_argument('--weight-decay', type=float, default=1e-4)
    group.add_argument('--momentum', type=float, default=0.9)
    group.add_argument('--opt-args', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    group.add_argument('--filter-bias-and-bn', action=boolean, default=True, help='no weight decay on 1-d parameters')
    group.add_argument('--clip-grad', type=float, help='largest gradient norm')
    group.add_argument('--grad-accum-steps', type=positive, default=1)

    group = parser.add_argument_group('schedule, by timm, stepped each update')
    group.add_argument('--epochs', type=positive, default=30)
    group.add_argument('--sched', default='cosine')
    group.add_argument('--warmup-epochs', type=float, default=0.)
    group.add_argument('--warmup-lr', type=float, default=1e-5)
    group.add_argument('--min-lr', type=float, default=0.)
    group.add_argument('--decay-rate', type=float, default=0.1, help="factor of 'step', power of 'poly'")
    group.add_argument('--decay-epochs', type=float, default=90)
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270])

    group = parser.add_argument_group('augmentation')
    group.add_argument('--padding', type=int, default=4, help='random crop after padding by this many pixels')
    group.add_argument('--padding-mode', choices=['reflect', 'constant'], default='reflect')
    group.add_argument('--hflip', type=float, default=0.5)
    group.add_argument('--mixup', type=float, default=0., help='alpha of mixup, 0 for none')
    group.add_argument('--cutmix', type=float, default=0., help='alpha of cutmix, 0 for none')
    group.add_argument('--smoothing', type=float, default=0., help='label smoothing')

    group = parser.add_argument_group('EMA of the weights, by timm')
    group.add_argument('--model-ema', action=boolean, default=False, help='validate and keep the averaged weights')
    group.add_argument('--model-ema-decay', type=float, default=0.998)
    group.add_argument('--model-ema-warmup', action=boolean, default=True)

    group = parser.add_argument_group('run')
    group.add_argument('--output', default='output', help='parent of the experiment folder')
    group.add_argument('--experiment', help='name of the experiment folder, made of date and model if not given')
    group.add_argument('--resume', metavar='FOLDER', help='continue this experiment, with its settings')
    group.add_argument('--checkpoint-interval', type=int, default=0, help='updates between checkpoints; 0: each epoch')
    group.add_argument('--seed', type=int, default=42)
    group.add_argument('--device', choices=['auto', 'cpu', 'cuda', 'mps'], default='auto')
    group.add_argument('--mixed-precision', choices=['no', 'fp16', 'bf16'], help="accelerate launch's if not given")
    group.add_argument('--report-to', choices=['tensorboard', 'none'], default='tensorboard')
    return parser


@contextmanager
def refusing(settings: str) -> Iterator[None]:
    """Turn what a library says of settings it cannot take into one sentence."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError, AssertionError, KeyError) as e:
        reason = str(e).strip().split('\n')[0] or type(e).__name__
        raise InputError(f'{settings} cannot be used: {reason}') from e


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Read flags, below them the recipe they name, and below it the settings of the run they resume.

    Raises:
        InputError: For an unknown flag, an unknown key of the recipe, or a value of the wrong kind.
    """
    parser = create_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    recipes = [str(Path(args.resume) / SETTINGS)] if args.resume and (Path(args.resume) / SETTINGS).is_file() else []
    recipes += [args.config] if args.config else []
    flags = [flag for recipe in recipes for flag in _recipe_flags(parser, recipe)]
    return parser.parse_args(flags + argv)


def dump_args(args: argparse.Namespace) -> str:
    """The settings as a recipe that repeats the run."""
    return yaml.safe_dump({k: v for k, v in vars(args).items() if k not in ('config', 'resume')})


def _recipe_flags(parser: Parser, path: str) -> List[str]:
    """A YAML recipe as the flags it stands for, so that both pass the same checks."""
    try:
        with open(path) as f:
            recipe = yaml.safe_load(f) or {}
    except (OSError, yaml.YAMLError) as e:
        raise InputError(f'Cannot read the recipe {path}: {" ".join(str(e).split())}') from e
    if not isinstance(recipe, dict):
        raise InputError(f'The recipe {path} must map setting names to values.')
    known = {a.dest: a for a in parser._actions if a.dest not in ('help', 'config')}
    unknown = sorted(str(k) for k in recipe if k not in known)
    if unknown:
        raise InputError(f'The recipe {path} has unknown keys: {", ".join(unknown)}; see train.py --help.')
    flags: List[str] = []
    for key, value in recipe.items():
        flags += _flag(known[key], value)
    return flags


def _flag(action: argparse.Action, value: Any) -> List[str]:
    option = action.option_strings[0]
    if value is None:
        return []
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise InputError(f'{action.dest} must be true or false, not {value!r}.')
        return [option if value else action.option_strings[1]]
    if isinstance(value, dict):
        value = [f'{k}={v}' for k, v in value.items()]
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [f'{option}={value}']
