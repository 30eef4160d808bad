"""Settings of a training run: flags, and YAML recipes that set them."""
import argparse
import math
import re
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NoReturn, Optional, Sequence, Tuple, Union

import yaml
from timm.utils import ParseKwargs

from timm_tmblock.errors import InputError, say_why_not_loaded
from train.data import add_set_options

SETTINGS = 'args.yaml'  # in the experiment folder
METRICS = ('top1', 'top5', 'balanced_accuracy', 'loss')  # of validation
INTERPOLATIONS = ['nearest', 'box', 'bilinear', 'hamming', 'bicubic', 'lanczos']
# a setting discards these alternatives to it where they come from a source of lower precedence
OVERRIDES = dict(
    lr_base=('lr',), epochs=('max_steps',), val_split=('val_fraction',), val_fraction=('val_split',),
    pool=('val_fraction',), kd_model_name=('kd_checkpoint',), kd_checkpoint=('kd_model_name',))

# settings that two runs of one recipe may differ in: the network, and where and how it ran
NO_RECIPE = (
    'config', 'model', 'device_modules', 'dataset', 'data_dir', 'dataset_download', 'input_key', 'target_key',
    'workers', 'val_split', 'val_fraction', 'val_batch_size', 'test_split', 'channels_last', 'grad_checkpointing',
    'torchcompile', 'torchcompile_mode', 'cuda_graph', 'output', 'experiment', 'resume', 'initial_checkpoint',
    'checkpoint_interval', 'checkpoint_hist', 'val_interval', 'log_interval', 'tta', 'eval_only', 'device',
    'push_to_hub', 'hub_private', 'report_to', 'project')

# settings that say which images are trained on, and others that cannot change when a run is resumed
DIVISION = ('train_split', 'val_fraction', 'pool', 'split_seed')
SETTLED = (
    'val_split', 'pretrained', 'initial_checkpoint', 'opt', 'opt_args', 'opt_betas', 'opt_eps', 'momentum',
    'weight_decay', 'filter_bias_and_bn', 'layer_decay', 'layer_decay_min_scale', 'layer_decay_no_opt_scale',
    'eval_metric', 'seed', 'experiment', 'output')


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """With the default of each flag that has one, unless its text says it."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        without = action.default is False or action.default in (None, {}, []) or '(default: ' in (action.help or '')
        return action.help if without else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Parser whose complaint is one sentence, without the usage, and whose help has the defaults."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{'allow_abbrev': False, 'formatter_class': HelpFormatter, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise InputError(f'{message}; see {self.prog} --help.')


def number(
        kind: type,
        low: float,
        high: float = math.inf,
        above: bool = False,
        below: bool = False,
        endless: bool = False,
) -> Callable[[str], Any]:
    """The type of a flag: an int or a float from `low` to `high`, or `above` low, `below` high; infinity if `endless`.
    """
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value != value or value in (math.inf, -math.inf) and not endless:
            raise argparse.ArgumentTypeError(f'must be a {"whole " if kind is int else ""}number, not {text!r}')
        if not low <= value <= high or above and value == low or below and value == high:
            bound = f'from {low} to {high}'
            if above or below or high == math.inf:
                bound = f'{"above" if above else "at least"} {low:g}'
                if high < math.inf:
                    bound += f' and {"below" if below else "at most"} {high:g}'
            raise argparse.ArgumentTypeError(f'must be {bound}, not {text}')
        return value

    return parse


positive, not_negative = number(int, 1), number(int, 0)
seed = number(int, 0, 2 ** 31 - 1)  # NumPy takes 32 bits, and each process adds its number
finite, fraction = number(float, -math.inf), number(float, 0, 1)
from_zero, above_zero = number(float, 0), number(float, 0, above=True)
share = number(float, 0, 1, above=True)
gigabytes = number(float, 0, endless=True)


class KeyValues(ParseKwargs):
    """timm's ParseKwargs, with a clear error for a word that is not KEY=VALUE."""

    def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: Optional[str] = None,
    ) -> None:
        for value in values:
            if value and '=' not in value:
                raise argparse.ArgumentError(self, f'must be KEY=VALUE, not {value}')
        super().__call__(parser, namespace, values, option_string)


def create_parser() -> Parser:
    parser = Parser(
        prog='train.py',
        description='Train an image classifier registered with timm on small images.',
        usage='%(prog)s [-c RECIPE] [--flag value ...]',
    )
    boolean = argparse.BooleanOptionalAction
    parser.add_argument('-c', '--config', metavar='FILE', help=(
        "YAML recipe; its key 'base' may name another recipe to start from; command-line flags override both"))

    group = parser.add_argument_group('data')
    add_set_options(group)
    group.add_argument('--train-split', default='train', help='training split')
    group.add_argument('--val-split', help=(
        "validation split, which selects the best weights (default: a part of the training split; '': none)"))
    group.add_argument('--val-fraction', type=number(float, 0, 1, below=True), help=(
        'fraction of the training split held out for validation (default: 0.1, but 0 if --eval-only evaluates weights '
        'that may have been trained on it); 0: train on everything and keep the last weights'))
    group.add_argument('--test-split', help='test split, evaluated once, at the end, with the selected weights')
    group.add_argument('--pool', type=from_zero, nargs=3, metavar='SIZE', help=(
        'merge the named splits and divide them again into training, validation and test; 65 15 20 in the paper'))
    group.add_argument('--split-seed', type=seed, default=0, help='seed of the division by --val-fraction and --pool')
    group.add_argument('--memory-limit', type=gigabytes, default=4., help=(
        'load splits of up to this many GB (decoded) into memory, that of the training device except for training '
        'images with --aa or changes of color; dividing and padding them temporarily takes as much again'))
    group.add_argument('-j', '--workers', type=not_negative, default=4, help=(
        'worker processes that decode images and apply augmentation policies'))
    group.add_argument('-b', '--batch-size', type=positive, default=128, help='images per process and step')
    group.add_argument('-vb', '--val-batch-size', '--validation-batch-size', type=positive, default=256, help=(
        'images per process and step in evaluation'))
    group.add_argument('--interpolation', choices=INTERPOLATIONS, help=(
        "interpolation used for resizing (default: the model's)"))
    group.add_argument('--crop-pct', type=above_zero, help=(
        "fraction of a resized image kept by the center crop, in training too unless random resized crops are used "
        "(default: the model's)"))
    group.add_argument('--crop-mode', choices=['center', 'squash', 'border'], help=(
        "how images of another aspect ratio are fitted to the input (default: the model's): 'center' cuts off what "
        "does not fit, 'squash' changes the proportions, 'border' pads (such models cannot be exported)"))

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='rn26_tm', help='name of a model registered with timm')
    group.add_argument('--device-modules', nargs='+', metavar='MODULE', help=(
        'Python modules to import first, for models or devices that timm does not have'))
    group.add_argument('--pretrained', action=boolean, default=False, help="start from the model's pretrained weights")
    group.add_argument('--initial-checkpoint', metavar='FILE', help=(
        'weights to start from; checkpoints of timm are accepted, too'))
    group.add_argument('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', help=(
        'arguments for timm.create_model'))
    group.add_argument('--img-size', type=positive, nargs='+', metavar='SIZE', help=(
        "image size to resize to and to configure the model for, one number or height and width (default: the "
        "model's)"))
    group.add_argument('--aux-head', action=boolean, default=False, help=(
        'supervise the patches of a baseline too (RN26-aux in the paper); the auxiliary classifier is not saved'))
    group.add_argument('--drop', type=fraction, default=0., help='dropout rate before the classifier')
    group.add_argument('--drop-path', type=fraction, help='stochastic depth rate of the last block (ResNets only)')
    group.add_argument('--patch-loss-weight', type=fraction, default=0.5, help=(
        'weight of the patch loss, lambda in equation 3.1 of the paper'))
    group.add_argument('--channels-last', action=boolean, default=True, help='use the channels_last memory layout')
    group.add_argument('--grad-checkpointing', action=boolean, default=False, help=(
        "recompute activations to save memory; running statistics of batch norms are then updated twice per batch"))
    group.add_argument('--sync-bn', action=boolean, default=False, help=(
        'synchronize batch norm statistics over all processes (GPUs only)'))
    group.add_argument('--dist-bn', choices=['broadcast', 'reduce'], default='broadcast', help=(
        "running statistics to validate and save: those of the main process, or the mean over all processes after the "
        "last batch"))
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help=(
        "compile the model (backend if no name is given: 'inductor')"))
    group.add_argument('--torchcompile-mode', help="for example 'reduce-overhead', which uses CUDA graphs")
    group.add_argument('--cuda-graph', action=boolean, default=False, help=(
        'capture whole training steps, including the optimizer, in a CUDA graph'))
    group.add_argument('--mean', type=finite, nargs='+', help=(
        "mean of the pixels per channel, in [0, 1] (default: the model's)"))
    group.add_argument('--std', type=above_zero, nargs='+', help=(
        "standard deviation of the pixels per channel (default: the model's)"))

    group = parser.add_argument_group('optimizer (timm)')
    group.add_argument('--opt', default='adam', help='name of an optimizer of timm')
    group.add_argument('--lr', type=from_zero, help='learning rate (default: 0.001, unless --lr-base is given)')
    group.add_argument('--lr-base', type=from_zero, help='learning rate for a global batch size of --lr-base-size')
    group.add_argument('--lr-base-size', type=positive, default=256, help='global batch size that --lr-base refers to')
    group.add_argument('--lr-base-scale', choices=['linear', 'sqrt'], help=(
        "how the rate scales with the batch size (default: 'sqrt' for Adam and similar optimizers, else 'linear')"))
    group.add_argument('--weight-decay', type=from_zero, default=1e-4, help='weight decay')
    group.add_argument('--momentum', type=from_zero, default=0.9, help='momentum, for optimizers that have one')
    group.add_argument('--opt-eps', type=from_zero, help="epsilon (default: the optimizer's)")
    group.add_argument('--opt-betas', type=fraction, nargs='+', help="betas (default: the optimizer's)")
    group.add_argument(
        '--opt-args', '--opt-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='other arguments of the optimizer')
    group.add_argument('--filter-bias-and-bn', action=boolean, default=True, help=(
        'exclude biases and norms from weight decay'))
    group.add_argument('--layer-decay', type=above_zero, help=(
        'layer-wise learning rate decay: factor from each layer to the one below'))
    group.add_argument('--layer-decay-min-scale', type=from_zero, help='lower bound of the scale by --layer-decay')
    group.add_argument('--layer-decay-no-opt-scale', type=from_zero, help=(
        'layers with a scale below this are not trained'))
    group.add_argument('--clip-grad', type=from_zero, help='clip gradients at this value (0: off)')
    group.add_argument('--clip-mode', choices=['norm', 'value', 'agc'], default='norm', help='what --clip-grad limits')
    group.add_argument('--grad-accum-steps', type=positive, default=1, help=(
        'batches per update, in each process; those at the end of an epoch that do not fill one are left out'))

    group = parser.add_argument_group('schedule (timm), stepped after each update')
    group.add_argument('--epochs', type=positive, default=30, help='length of the schedule')
    group.add_argument('--max-steps', type=positive, help='length of the schedule in updates, instead of --epochs')
    group.add_argument('--sched', default='cosine', help='cosine, poly, step, multistep, tanh, wsd, rsqrt or constant')
    group.add_argument('--warmup-epochs', type=from_zero, default=0., help='epochs of warmup')
    group.add_argument('--warmup-lr', type=from_zero, default=1e-5, help='learning rate at the start of the warmup')
    group.add_argument('--warmup-prefix', action=boolean, default=False, help='add the warmup to --epochs')
    group.add_argument('--cooldown-epochs', type=from_zero, default=0., help=(
        'epochs at the lowest rate, in addition to --epochs'))
    group.add_argument('--min-lr', type=from_zero, default=0., help='lowest learning rate')
    group.add_argument('--decay-rate', type=from_zero, default=0.1, help=(
        "factor of 'step' and 'multistep', power of 'poly'"))
    group.add_argument('--decay-epochs', type=above_zero, help=(
        "'step': epochs between steps (default: 90); 'wsd', 'rsqrt': length of the final decay, a fraction of the "
        'schedule if below 1 (default: 0.2)'))
    group.add_argument('--decay-milestones', type=not_negative, nargs='+', help=(
        "'multistep': epochs of the steps (default: 90 180 270)"))
    group.add_argument('--lr-noise', type=fraction, nargs='+', help=(
        'fractions of the schedule at which noise starts and ends'))
    group.add_argument('--lr-noise-pct', type=above_zero, default=0.67, help='limit of the noise, relative to the rate')
    group.add_argument('--lr-noise-std', type=from_zero, default=1., help='standard deviation of the noise')
    group.add_argument('--lr-cycle-mul', type=above_zero, default=1., help=(
        'length of each cycle relative to the previous one'))
    group.add_argument('--lr-cycle-decay', type=from_zero, default=0.5, help=(
        'peak rate of each cycle relative to the previous one'))
    group.add_argument('--lr-cycle-limit', type=positive, default=1, help='number of cycles')
    group.add_argument('--lr-k-decay', type=above_zero, default=1., help='exponent of k-decay')

    group = parser.add_argument_group('augmentation')
    group.add_argument('--aug', action=boolean, default=True, help=(
        'augment the training images; --no-aug turns off crops, flips, policies and erasing, but not --mixup and '
        '--cutmix'))
    group.add_argument('--padding', type=not_negative, default=4, help=(
        'random crop after padding by this many pixels; datasets above --memory-limit use random resized crops '
        'instead'))
    group.add_argument('--padding-mode', choices=['reflect', 'constant'], default='reflect', help=(
        "fill the padding with the mirrored image, or with the mean color"))
    group.add_argument('--scale', type=share, nargs=2, metavar=('MIN', 'MAX'), help=(
        'area of the random resized crop, for datasets above --memory-limit (default: 0.08 to 1, as in timm)'))
    group.add_argument('--ratio', type=above_zero, nargs=2, metavar=('MIN', 'MAX'), help=(
        'aspect ratio of that crop (default: 3/4 to 4/3, as in timm)'))
    group.add_argument('--train-crop-mode', choices=['rrc', 'rkrc', 'rkrr'], help=(
        "crop for datasets above --memory-limit: random resized crop ('rrc', the default), or timm's resize keep ratio "
        "with a random or a random resized crop"))
    group.add_argument('--train-interpolation', choices=['random', *INTERPOLATIONS], help=(
        'interpolation of that crop (default: --interpolation)'))
    group.add_argument('--hflip', type=fraction, default=0.5, help='probability of a horizontal flip')
    group.add_argument('--vflip', type=fraction, default=0., help='probability of a vertical flip')
    group.add_argument('--aa', metavar='POLICY', help=(
        "'trivial' (TrivialAugment Wide), or a policy of timm: 'rand-m9-mstd0.5-inc1', 'original', 'augmix-m3-w3', "
        "'3a' (with --color-jitter 0.3), ..."))
    group.add_argument('--color-jitter', type=from_zero, nargs='+', metavar='FACTOR', help=(
        'strength of the jitter of brightness, contrast and saturation: one number for all, three, or four with hue; '
        "unlike in timm's script, it is also applied together with a policy"))
    group.add_argument('--color-jitter-prob', type=fraction, help='probability of color jitter (default: 1)')
    group.add_argument('--grayscale-prob', type=fraction, default=0., help='probability of conversion to grayscale')
    group.add_argument('--gaussian-blur-prob', type=fraction, default=0., help='probability of a Gaussian blur')
    group.add_argument('--reprob', type=fraction, default=0., help='probability of random erasing')
    group.add_argument('--remode', choices=['const', 'rand', 'pixel'], default='const', help=(
        'fill erased parts with the mean color, a random color, or noise'))
    group.add_argument('--recount', type=positive, default=1, help='maximum number of erased rectangles')
    group.add_argument('--mixup', type=from_zero, default=0., help='mixup alpha (0: off)')
    group.add_argument('--cutmix', type=from_zero, default=0., help='cutmix alpha (0: off)')
    group.add_argument('--cutmix-minmax', type=fraction, nargs=2, metavar=('MIN', 'MAX'), help=(
        'range of the side of the cut part, as a fraction of the image'))
    group.add_argument('--mixup-prob', type=fraction, default=1., help=(
        'probability of applying mixup or cutmix to a batch'))
    group.add_argument('--mixup-switch-prob', type=fraction, default=0.5, help=(
        'probability of cutmix when both are enabled'))
    group.add_argument('--mixup-mode', choices=['batch', 'pair', 'elem'], default='batch', help=(
        'draw one mixing ratio per batch, pair or image'))
    group.add_argument('--mixup-off-epoch', type=not_negative, default=0, help=(
        'turn off mixup and cutmix from this epoch on (0: never)'))
    group.add_argument('--smoothing', type=fraction, default=0., help='label smoothing')

    group = parser.add_argument_group('exponential moving average of the weights (timm)')
    group.add_argument('--model-ema', action=boolean, default=False, help='track an EMA, and validate and save it too')
    group.add_argument('--model-ema-decay', type=fraction, default=0.998, help='decay of the EMA per update')
    group.add_argument('--model-ema-warmup', action=boolean, default=True, help='start with a smaller decay')

    group = parser.add_argument_group('distillation')
    group.add_argument('--kd-model-name', nargs='*', metavar='NAME', help=(
        'teacher: a pretrained model of timm or from the Hub; the logits of several teachers are averaged'))
    group.add_argument('--kd-checkpoint', nargs='*', metavar='FILE', help=(
        'weight file of the teacher, or one per teacher; files written by train.py record which model they are of'))
    group.add_argument('--kd-temperature', type=above_zero, default=4., help='temperature of both softmaxes')
    group.add_argument('--task-loss-weight', type=from_zero, help='weight of the loss on the labels (default: 1)')
    group.add_argument('--distill-loss-weight', type=from_zero, help=(
        'weight of the distillation loss (default: 1 - task-loss-weight if that is given, else 1)'))

    group = parser.add_argument_group('run')
    group.add_argument('--output', default='output', help='parent of the experiment folder')
    group.add_argument('--experiment', help='name of the experiment folder (default: date, time and model)')
    group.add_argument('--resume', metavar='FOLDER', help=(
        "resume the run in this experiment folder, with its settings; 'auto': resume --experiment if it has begun, for "
        'requeued jobs'))
    group.add_argument('--checkpoint-interval', type=not_negative, default=0, help=(
        'updates between checkpoints (0: one per epoch)'))
    group.add_argument('--checkpoint-hist', type=not_negative, default=0, help=(
        'keep the weights of this many of the best epochs'))
    group.add_argument('--val-interval', type=positive, default=1, help='epochs between validations')
    group.add_argument('--eval-metric', choices=METRICS, default='top1', help=(
        'metric that selects the best weights (balanced_accuracy: mean of the top-1 accuracies of the classes); ties '
        'are broken by the loss'))
    group.add_argument('--log-interval', type=not_negative, default=50, help=(
        'updates between values logged to trackers (0: none)'))
    group.add_argument('--tta', choices=['none', 'flip'], default='none', help=(
        "'flip': also report the accuracy averaged over the image and its mirror image"))
    group.add_argument('--eval-only', action=boolean, default=False, help='evaluate the model without training')
    group.add_argument('--seed', type=seed, default=42, help='seed of initialization, data order and augmentation')
    group.add_argument('--device', choices=['auto', 'cpu', 'cuda', 'mps'], default='auto', help=(
        "'auto': a GPU if there is one, but not a Mac's ('mps'), else the CPU"))
    group.add_argument('--mixed-precision', choices=['no', 'fp16', 'bf16'], help=(
        'default: the setting of accelerate launch, else no'))
    group.add_argument('--push-to-hub', metavar='USER/NAME', help='publish the selected weights at the end')
    group.add_argument('--hub-private', action=boolean, default=False, help='create a private repository')
    group.add_argument('--report-to', nargs='+', default=['tensorboard'], metavar='TRACKER', help=(
        "trackers of Accelerate: tensorboard, wandb, mlflow, trackio, ...; 'all' that are installed, or 'none'"))
    group.add_argument('--project', default='timm-tmblock', help='project name in the trackers')
    return parser


@contextmanager
def refusing(settings: str) -> Iterator[None]:
    """Turn what a library says of settings it cannot take into one sentence."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError, AssertionError, LookupError, ArithmeticError, ImportError) as e:
        reason = say_why_not_loaded(e)
        unknown = re.search(r"unexpected keyword argument '(\w+)'", reason)
        reason = f'there is no argument {unknown[1]!r}' if unknown else reason
        raise InputError(f'{settings} cannot be used: {reason}') from e


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Read flags, which override the recipe they name, which overrides the settings of the run they resume.

    Raises:
        InputError: For an unknown flag, an unknown key of the recipe, or a value of the wrong kind.
    """
    parser = create_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    unset = object()  # argparse keeps what a namespace has
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset))))
    given = {k: v for k, v in given.items() if v is not unset}
    named = {**(_read_known(parser, Path(args.config)) if args.config else {}), **given}
    automatic = named.get('resume') == 'auto'
    if named.get('resume') is not None:  # a recipe may say so, too
        args.resume = _find_begun(named, args.output) if automatic else named['resume']
        argv = [*argv, '--resume', args.resume]
    recipes = [str(Path(args.resume) / SETTINGS)] if args.resume and (Path(args.resume) / SETTINGS).is_file() else []
    recipes += [args.config] if args.config else []
    settings: Dict[str, Any] = {}
    for recipe in recipes:
        settings = _override(settings, _read_known(parser, Path(recipe)))
    settings = {k: v for k, v in _override(settings, given).items() if k not in given}
    args = parser.parse_args(_make_flags(parser, settings) + argv)
    args.img_size = _settle_size(args.img_size)
    if automatic and args.resume:  # to those of the command an --initial-checkpoint may have added its own
        added = _read_known(parser, Path(recipes[0]))['model_kwargs']
        for key, value in yaml.safe_load(yaml.safe_dump(args.model_kwargs)).items():
            if added.get(key) != value:
                raise InputError(
                    f'--model-kwargs {key} cannot change in a run that is resumed; begin another --experiment.')
        args.model_kwargs = added
    _check_given(given, args)
    return args


def _settle_size(size: Optional[List[int]]) -> Optional[Union[int, List[int]]]:
    """Height and width, or one number where they are the same."""
    if size and len(size) > 2:
        raise InputError('--img-size takes one number, or height and width.')
    return size[0] if size and size[0] == size[-1] else size


def _find_begun(named: Dict[str, Any], output: str) -> str:
    """The folder of the experiment that settings name, '' if there is nothing in it to go on from.

    Raises:
        InputError: If they name none, or it is to be measured and has not begun.
    """
    from train.checkpoint import find_checkpoints
    if not named.get('experiment'):
        raise InputError('--resume auto resumes the run of --experiment or begins it; add --experiment NAME.')
    folder = Path(named.get('output') or output) / named['experiment']
    if find_checkpoints(folder):
        return str(folder)
    if named.get('eval_only'):
        raise InputError(f'{folder} has nothing to measure yet; train first, without --eval-only.')
    return ''


VALIDATING = 'images held out for validation'
ADVICE = 'give --val-split, --val-fraction above 0, or a second size of --pool above 0'


def _check_given(given: Dict[str, Any], args: argparse.Namespace) -> None:
    """Refuse flags of the command line that would change nothing; recipes may have them for others to build on.

    Raises:
        InputError: For those.
    """
    has_teacher = args.kd_model_name or args.kd_checkpoint
    mixes = args.mixup or args.cutmix
    validates = args.pool[1] if args.pool else args.val_split or count_held_out(vars(args))
    for flags, needed, have in (
            (['kd_temperature', 'task_loss_weight', 'distill_loss_weight'],
             'a teacher, --kd-model-name or --kd-checkpoint', has_teacher),
            (['hub_private'], '--push-to-hub', args.push_to_hub),
            (['torchcompile_mode'], '--torchcompile', args.torchcompile),
            (['model_ema_decay', 'model_ema_warmup'], '--model-ema', args.model_ema),
            (['clip_mode'], '--clip-grad', args.clip_grad),
            (['mixup_prob', 'mixup_mode', 'mixup_off_epoch'], '--mixup or --cutmix', mixes),
            (['mixup_switch_prob'], '--mixup and --cutmix', args.mixup and args.cutmix),
            (['remode', 'recount'], '--reprob', args.reprob),
            (['color_jitter_prob'], '--color-jitter', any(args.color_jitter or ())),
            (['lr_base_size', 'lr_base_scale'], '--lr-base', args.lr_base is not None),
            (['decay_epochs'], '--sched step, wsd or rsqrt', args.sched in ('step', 'wsd', 'rsqrt')),
            (['decay_milestones'], '--sched multistep', args.sched == 'multistep'),
            (['decay_rate'], '--sched step, multistep or poly', args.sched in ('step', 'multistep', 'poly')),
            (['layer_decay_min_scale', 'layer_decay_no_opt_scale'], '--layer-decay', args.layer_decay is not None),
            (['checkpoint_hist'] if args.checkpoint_hist else [], VALIDATING, validates),
            (['val_interval'] if args.val_interval > 1 else [], VALIDATING, validates),
            (['eval_metric'], VALIDATING, validates),
            (['warmup_lr', 'warmup_prefix'], '--warmup-epochs', args.warmup_epochs)):
        for flag in flags:
            if flag in given and not have:
                add = ADVICE if needed == VALIDATING else 'add it'
                raise InputError(f'{to_flag(flag)} only applies with {needed}; {add}.')
    if 'push_to_hub' in given and args.eval_only:
        raise InputError('--eval-only trains nothing to publish; leave out --push-to-hub.')


def import_modules(names: Optional[Sequence[str]]) -> None:
    """
    Raises:
        InputError: If there is no such module, or it fails.
    """
    with refusing('--device-modules'):
        for name in names or ():
            import_module(name)


def find_changes(args: argparse.Namespace, path: Path, keys: Optional[Sequence[str]] = None) -> List[str]:
    """Settings that differ from those `dump_args` wrote: of those named, or of the recipe."""
    before = yaml.safe_load(path.read_text(encoding='utf-8'))
    now = yaml.safe_load(dump_args(args))
    asked = (k for k in now if (k not in NO_RECIPE if keys is None else k in keys))
    return [k for k in asked if k in before and now[k] != before[k]]


def find_changes_of_finished(args: argparse.Namespace, path: Path) -> List[str]:
    """Settings of the recipe, and which images train, that differ from those of a finished run."""
    before = yaml.safe_load(path.read_text(encoding='utf-8'))
    changes = find_changes(args, path)
    if count_held_out(before) != count_held_out(vars(args)):
        changes.append('val_fraction')
    if Path(before['dataset']).name != Path(args.dataset).name:  # another copy is no change
        changes.append('dataset')
    return changes


def to_flag(setting: str) -> str:
    return f'--{setting.replace("_", "-")}'


def count_held_out(settings: Dict[str, Any]) -> float:
    """Share of the training images that a run holds out, beside splits and pools of their own."""
    if settings.get('val_split') or settings.get('pool'):
        return 0.
    if settings['val_fraction'] is None:
        return 0. if settings.get('val_split') == '' else 0.1  # which is none, as in timm's script
    return settings['val_fraction']


def check_resumed(args: argparse.Namespace, path: Path) -> None:
    """
    Raises:
        InputError: For settings that a run which goes on, or its measurement, cannot change.
    """
    if not path.is_file():
        return
    division = DIVISION + (('val_split', 'test_split') if args.pool else ())  # which are pooled
    changes = find_changes(args, path, division + (() if args.eval_only else SETTLED))
    if Path(args.output, args.experiment or '').resolve() == path.parent.resolve():  # as another path to it, as a link
        changes = [name for name in changes if name not in ('output', 'experiment')]
    before, now = map(count_held_out, (yaml.safe_load(path.read_text(encoding='utf-8')), vars(args)))
    if 'val_fraction' in changes and now <= before:  # then those that are left were held out before, too
        changes.remove('val_fraction')
    if changes:
        reason = 'its checkpoint fixes that'
        if changes[0] in division:
            reason = 'the images would be divided anew, and it would be measured on some it was trained on'
        raise InputError(
            f'{to_flag(changes[0])} cannot change in a run that is resumed: {reason}; leave it out, or begin a new run '
            f'with --initial-checkpoint.')


def dump_args(args: argparse.Namespace) -> str:
    """The settings as a recipe that repeats the run, under another --experiment."""
    return yaml.safe_dump({k: v for k, v in vars(args).items() if k not in ('config', 'resume')})


def _read_recipe(path: Path, seen: Tuple[Path, ...] = ()) -> Dict[str, Any]:
    if path.resolve() in seen:
        raise InputError(f'The recipe {path} is its own base.')
    try:
        recipe = yaml.safe_load(path.read_text(encoding='utf-8')) or {}
    except FileNotFoundError as e:
        raise InputError(f'There is no recipe {path}.') from e
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f'Cannot read the recipe {path}: {" ".join(str(e).split())}') from e
    if not isinstance(recipe, dict):
        raise InputError(f'The recipe {path} must map setting names to values.')
    base = recipe.pop('base', None)
    if base is None:
        return recipe
    return _override(_read_recipe(path.parent / str(base), (*seen, path.resolve())), recipe)


def _override(below: Dict[str, Any], above: Dict[str, Any]) -> Dict[str, Any]:
    replaced = {other for key, others in OVERRIDES.items() if above.get(key) is not None for other in others}
    if above.get('kd_checkpoint') and below.get('kd_checkpoint'):
        replaced.discard('kd_model_name')  # of weights that name no network
    return {**{k: v for k, v in below.items() if k not in replaced}, **above}


def _read_known(parser: Parser, path: Path) -> Dict[str, Any]:
    recipe = _read_recipe(path)
    known = {
        name.lstrip('-').replace('-', '_'): a.dest for a in parser._actions if a.dest not in ('help', 'config')
        for name in (f'--{a.dest}', *a.option_strings) if name.startswith('--') and not name.startswith('--no-')}
    unknown = sorted(str(k) for k in recipe if k not in known)
    if unknown:
        raise InputError(f'The recipe {path} has unknown keys: {", ".join(unknown)}; see train.py --help.')
    return {known[key]: value for key, value in recipe.items()}


def _make_flags(parser: Parser, settings: Dict[str, Any]) -> List[str]:
    """Settings as the flags they stand for, so that both pass the same checks."""
    actions = {a.dest: a for a in parser._actions}
    return [flag for key, value in settings.items() for flag in _flag(actions[key], value)]


def _flag(action: argparse.Action, value: Any) -> List[str]:
    option = next(o for o in action.option_strings if o.startswith('--'))
    if value is None:
        return []
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise InputError(f'{action.dest} must be true or false, not {value!r}.')
        return [option if value else action.option_strings[1]]
    if value is False:
        value = 'no'  # which YAML reads as false
    if isinstance(value, dict):
        value = [f'{k}={v}' for k, v in value.items()]
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [f'{option}={value}']
