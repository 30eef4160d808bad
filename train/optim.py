"""Optimizer, schedule and gradient clipping, by timm."""
from argparse import Namespace
from typing import Any, Tuple

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils.agc import adaptive_clip_grad

from timm_tmblock.errors import InputError
from train.config import refusing
from train.model import network

# defaults of timm's script, which trains for 300 epochs
STEP, MILESTONES = 90, [90, 180, 270]
BY_EPOCHS = ('num_epochs', 'warmup_epochs', 'cooldown_epochs')


def resolve_lr(args: Namespace, images_per_update: int) -> float:
    """The learning rate: as given, or `--lr-base` scaled with the global batch size."""
    if args.lr is not None:
        return args.lr
    if args.lr_base is None:
        return 1e-3
    ratio = images_per_update / args.lr_base_size
    adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))  # as in timm's train.py
    scale = args.lr_base_scale or ('sqrt' if adaptive else 'linear')
    return args.lr_base * (ratio if scale == 'linear' else ratio ** 0.5)


def create_optimizer(args: Namespace, model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    if 'lr' in args.opt_args:
        raise InputError('The learning rate has flags of its own, --lr and --lr-base; leave it out of --opt-args.')
    with refusing(f'These settings of the optimizer {args.opt!r}'):
        optimizer = create_optimizer_v2(
            model, **{**optimizer_kwargs(args), 'lr': lr}, filter_bias_and_bn=args.filter_bias_and_bn)
    if getattr(optimizer, 'is_second_order', False):
        raise InputError(f'{args.opt} needs second derivatives, which are not taken here; choose another --opt.')
    return optimizer


def create_schedule(
        args: Namespace,
        optimizer: torch.optim.Optimizer,
        updates_per_epoch: int,
) -> Tuple[Any, int]:
    """timm's schedule in units of updates, and the number of updates it takes.

    It is a function of the update count alone, so there is nothing of it to prepare or to save.
    """
    kwargs = scheduler_kwargs(args)
    for key in BY_EPOCHS:
        kwargs[key] *= updates_per_epoch
    kwargs['decay_milestones'] = [epoch * updates_per_epoch for epoch in args.decay_milestones or MILESTONES]
    if args.sched == 'none':  # by which timm sets no rate at all, neither a new one in a run that goes on
        raise InputError("There is no schedule 'none'; for a rate that stays the same use --sched constant.")
    if args.cooldown_epochs and args.sched in ('step', 'multistep', 'constant'):
        raise InputError(f'The schedule {args.sched!r} has no lowest rate to stay at; leave out --cooldown-epochs.')
    if args.sched == 'rsqrt' and not args.warmup_epochs:
        raise InputError("The schedule 'rsqrt' takes its timescale from the warmup; set --warmup-epochs.")
    fraction = args.sched in ('wsd', 'rsqrt') and (kwargs['decay_epochs'] or 1) < 1  # of the whole schedule
    if kwargs['decay_epochs'] is None and args.sched == 'step':
        kwargs['decay_epochs'] = STEP
    if kwargs['decay_epochs'] is not None and not fraction:
        kwargs['decay_epochs'] *= updates_per_epoch
    if args.max_steps:
        kwargs['num_epochs'] = args.max_steps
    with refusing(f'These settings of the schedule {args.sched!r}'):
        scheduler, updates = create_scheduler_v2(
            optimizer, **{**kwargs, 'step_on_epochs': False, 'updates_per_epoch': 1})
    given = dict(step=args.decay_epochs, multistep=args.decay_milestones).get(args.sched, ())
    first = STEP + (args.warmup_epochs if args.warmup_prefix else 0)
    if given is None and first * updates_per_epoch >= updates:
        raise InputError(
            f'With --sched {args.sched} the rate would first drop after {first:g} epochs, but the run has '
            f'{updates / updates_per_epoch:g}; set --decay-{"epochs" if args.sched == "step" else "milestones"}, or '
            f'use --sched constant.')
    if updates < 1:
        raise InputError(f'The schedule {args.sched!r} has no updates; use more --epochs.')
    return scheduler, int(updates)


def clip_gradients(accelerator: Accelerator, model: torch.nn.Module, args: Namespace) -> None:
    """Bound the gradients of a complete update as `--clip-mode` says."""
    if args.clip_mode == 'norm':
        accelerator.clip_grad_norm_(model.parameters(), args.clip_grad)
    elif args.clip_mode == 'value':
        accelerator.clip_grad_value_(model.parameters(), args.clip_grad)
    else:
        accelerator.unscale_gradients()
        plain: Any = network(model)  # timm leaves out the last two parameters, but a network may have two heads
        heads = plain.get_classifier()  # of some networks of timm several
        head = {id(p) for m in (heads if isinstance(heads, (tuple, list)) else (heads,)) for p in m.parameters()}
        adaptive_clip_grad([p for p in model.parameters() if id(p) not in head], args.clip_grad)
