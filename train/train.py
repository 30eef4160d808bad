#!/usr/bin/env python3
"""Train an image classifier of timm's registry on small images.

On the embedded sample of 2,000 CIFAR-10 images, one process:

    python train/train.py --epochs 5

With a recipe, most of which are for one process, on the first GPU:

    python train/train.py -c train/recipes/cifar10/rn26_tm.yaml

On all GPUs of this machine, with the learning rate scaled to the global batch size:

    accelerate launch --mixed_precision bf16 train/train.py --dataset hfds/uoft-cs/cifar10 --input-key img \
        --lr-base 0.001

In a notebook, where there is no command line:

    accelerate.notebook_launcher(train.train.main, (["--epochs", "5"],), num_processes=1)

Continue a run that was stopped, or measure what it has:

    python train/train.py --resume output/EXPERIMENT
    python train/train.py --resume output/EXPERIMENT --eval-only --test-split test

Models with patch logits (`rn26_tm`, ..., and others with --aux-head) are trained with equation 3.1 of the paper, the
rest with cross-entropy; a teacher adds a loss of its own.
The last line of output is the result as JSON.
"""
import math
import signal
import sys
import time
import uuid
from argparse import Namespace
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

if __package__ in (None, ''):  # run as a script: find the checkout, not this folder's train.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from accelerate import PartialState
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3, distribute_bn
from tqdm import tqdm

from timm_tmblock.checkpoint import load_model, save_weights
from timm_tmblock.errors import InputError, InterruptedWork, exiting_on_input_error
from timm_tmblock.files import remove, write_text
from train import checkpoint, record
from train.augment import PREPROCESSING
from train.checkpoint import TrainState
from train.config import (
    METRICS,
    SETTINGS,
    check_resumed,
    dump_args,
    find_changes,
    find_changes_of_finished,
    import_modules,
    parse_args,
    refusing,
    to_flag,
)
from train.data import get_class_names
from train.engine import create_accelerator
from train.failure import advise_on_images, advise_on_memory, check_disk_space, naming_failures
from train.files import to_json, write_json
from train.graph import GraphedStep, set_capturable
from train.hardware import describe_hardware, describe_versions, emulates_bf16, find_commit
from train.inputs import create_data_config, create_loader, create_mixup
from train.loader import Loader
from train.meter import Meter
from train.model import (
    check_loads_back,
    check_model_name,
    check_weights,
    create_model,
    network,
    network_weights,
    take_up_checkpoint,
)
from train.optim import clip_gradients, create_optimizer, create_schedule, resolve_lr
from train.processes import agreeing, join_tasks, leaving_it_to_the_first
from train.publish import check_exportable, check_push, leave_hanging, publish
from train.signals import stopping_at_signals
from train.splits import find_missing_classes, load_parts, open_splits
from train.task import create_task, create_teachers
from train.trackers import fail_trackers, finish_trackers, start_trackers
from train.validation import validate

ASK_SECONDS = 2.  # after which processes ask each other whether one is to stop
STOP = 'SIGTERM came to a process'


class Trainer:
    """One run: everything it needs, set up from its settings."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        import_modules(args.device_modules)
        check_model_name(args.model)
        self.accelerator = accelerator = create_accelerator(args)
        with agreeing(accelerator):
            if args.push_to_hub and not args.eval_only:
                check_push(args.push_to_hub, args.hub_private)
            take_up_checkpoint(args)
        self.main_process = accelerator.is_main_process
        with agreeing(accelerator):
            self.folder = record.create_folder_name(args)
        accelerator.project_configuration = ProjectConfiguration(str(self.folder))  # where trackers write
        self.data_config = config = create_data_config(args)
        splits = open_splits(args, accelerator)
        self.class_names = get_class_names(splits['train'])
        self.memory_format = torch.channels_last if args.channels_last else torch.preserve_format
        with agreeing(accelerator), naming_failures(advise_on_memory(args)):
            check_weights(args, self.folder, self.class_names)
            if args.resume:
                check_resumed(args, self.folder / SETTINGS)
            set_seed(args.seed)  # the same initial weights on every process
            model = create_model(args, self.class_names).to(accelerator.device).to(memory_format=self.memory_format)
            if args.device_modules and not args.eval_only:
                check_loads_back(model, self.describe())
            teachers = [] if args.eval_only else create_teachers(
                args, self.class_names, config.input_size[0], accelerator.device)
        if args.sync_bn:
            model = convert_sync_batchnorm(model)
        self.ema = None
        if args.model_ema and not args.eval_only:
            self.ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup)

        with agreeing(accelerator), naming_failures(advise_on_images(args)):
            parts = load_parts(splits, args, config, accelerator)
            self.val_loader, self.test_loader = (
                None if part is None else create_loader(part, config, args, accelerator)
                for part in (parts.validation, parts.test))
        self.missing = find_missing_classes(parts.train, self.class_names)
        self.peak_lr = resolve_lr(args, args.batch_size * args.grad_accum_steps * accelerator.num_processes)
        optimizer = create_optimizer(args, model, self.peak_lr)
        if not args.eval_only:
            self.plan_epochs(parts.train, optimizer)
        with refusing('These settings of the compiler') if args.torchcompile else nullcontext():
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        checkpoint.store_plain_names(accelerator)
        self.begun_from: Optional[Path] = None  # checkpoint
        self.state = TrainState(run_id=uuid.uuid4().hex, sharding=checkpoint.name_sharding(accelerator))
        if not args.eval_only:
            self.set_up_training(teachers)
        here: List[Tuple[List[Any], Any]] = [  # a checkout may move on while it trains
            (self.state.hardware, describe_hardware(accelerator.device, accelerator.num_processes)),
            (self.state.versions, describe_versions()), (self.state.commits, find_commit())]
        for known, now in here:
            if now and now not in known:
                known.append(now)
        self.clock = time.perf_counter()
        self.asked: Callable[[], bool] = lambda: False  # whether SIGTERM came
        self.next_question, self.last_question = 0, (0, self.clock)  # updates, and a time
        self.images_per_second: Optional[float] = None  # of the last epoch; None where none were left of it

    def plan_epochs(self, train: Any, optimizer: torch.optim.Optimizer) -> None:
        """What an epoch is, and how many there are."""
        args, config, accelerator = self.args, self.data_config, self.accelerator
        with naming_failures(advise_on_images(args)):
            self.train_loader = create_loader(train, config, args, accelerator, training=True)
        self.mixup = create_mixup(args, min(config.input_size[1:]), len(self.class_names))
        updates_per_epoch = len(self.train_loader) // args.grad_accum_steps
        if updates_per_epoch == 0:
            raise InputError('An epoch has fewer batches than --grad-accum-steps; use a smaller number.')
        self.batches_per_epoch = updates_per_epoch * args.grad_accum_steps
        self.scheduler, self.updates = create_schedule(args, optimizer, updates_per_epoch)
        self.epochs = -(-self.updates // updates_per_epoch)
        self.layout = dict(
            processes=accelerator.num_processes, batch_size=args.batch_size, grad_accum_steps=args.grad_accum_steps,
            updates_per_epoch=updates_per_epoch)

    def set_up_training(self, teachers: List[Any]) -> None:
        """The loss, and where the run stands, after everything is prepared."""
        args, accelerator = self.args, self.accelerator
        self.task = create_task(args, self.model, accelerator, self.data_config, teachers)
        self.learn: Callable[[torch.Tensor, torch.Tensor], Dict[str, torch.Tensor]] = self._learn
        if args.cuda_graph:
            self.learn = GraphedStep(self._learn, self.optimizer, accelerator.device)
        set_seed(args.seed, device_specific=True)  # dropout, mixup and noise differ between processes
        self.state.layout = self.layout
        self.meter = Meter(accelerator.device)
        if args.resume:
            self.take_up()
        set_capturable(self.optimizer, args.cuda_graph or args.opt_args.get('capturable', False), accelerator.device)

    def take_up(self) -> None:
        """Go on from the newest checkpoint.

        Raises:
            InputError: If there is none that fits these settings.
        """
        args, accelerator, updates_per_epoch = self.args, self.accelerator, self.layout['updates_per_epoch']
        settings = self.folder / SETTINGS  # read before the first process may write it anew
        recounted = settings.is_file() and bool(find_changes(args, settings, ('max_steps',)))
        self.state, self.begun_from = checkpoint.load_checkpoint(self.folder, accelerator, self.ema, self.layout)
        if self.state.layout != self.layout:  # between epochs, or after a part of one, by --max-steps
            before = self.state.layout['updates_per_epoch']
            if args.max_steps and before != updates_per_epoch and not recounted:
                raise InputError(
                    f'--max-steps {args.max_steps} was counted in epochs of {before} updates, and an epoch has '
                    f'{updates_per_epoch} now; give another, or resume with the processes and batch size it had.')
            if self.main_process:
                self.tell_change(self.state.layout)
            done = self.state.update / self.state.layout['updates_per_epoch']
            self.state.rescale(round(done * updates_per_epoch), self.layout)
            accelerator.step = 0
        if self.state.update > self.updates:
            raise InputError(
                f'{self.folder} has {self.state.update} updates behind it, more than the {self.updates} of these '
                f'settings; use more --epochs.')
        self.meter.load_state_dict(self.state.running, accelerator.process_index)
        best = self.state.best
        if best is not None and best['images'] != self.num_held_out:
            self.state.best, self.state.kept = None, []  # other images chose them

    def tell_change(self, before: Dict[str, int]) -> None:
        """Say so where updates have another number of images than in the run that goes on."""
        was, now = (
            layout['processes'] * layout['batch_size'] * layout['grad_accum_steps'] for layout in (before, self.layout))
        if was != now:
            print(
                f'an update has {now} images now, which had {was} before (processes: {before["processes"]}); '
                f'learning rate up to {self.peak_lr:g}', flush=True)

    def describe(self) -> Dict[str, Any]:
        """What the weights are, for whoever loads them."""
        return dict(
            model=self.args.model,
            model_args=self.args.model_kwargs,
            num_classes=len(self.class_names),
            label_names=self.class_names,
            **{key: getattr(self.data_config, key) for key in PREPROCESSING},
        )

    def start_record(self, stack: ExitStack) -> None:
        """Begin the records, and hold the folder until the stack is closed."""
        args, accelerator = self.args, self.accelerator
        with agreeing(accelerator):
            if self.main_process:
                check_disk_space(self.folder, network(self.model), args)
                stack.enter_context(record.holding(self.folder))
                if self.begun_from is not None:
                    checkpoint.restore_best(self.folder, self.begun_from)
                finished = self.state.update >= self.updates and not self.state.batch
                settings = self.folder / SETTINGS
                if finished and settings.is_file() and (changes := find_changes_of_finished(args, settings)):
                    raise InputError(
                        f'{self.folder} is trained to its end, where {", ".join(map(to_flag, changes))} can change '
                        f'nothing; raise --epochs, or start another run with --initial-checkpoint.')
            start_trackers(accelerator, args, self.folder, self.state.run_id, self.state.tracker_step)
            if self.main_process:
                if not finished:
                    remove(self.folder / 'result.json')  # of a run that was shorter
                write_text(self.folder / SETTINGS, dump_args(args))
                processes = accelerator.num_processes
                warmup = args.warmup_epochs * self.layout['updates_per_epoch']
                never_falls = 0 < self.updates <= warmup and not args.warmup_prefix
                emulated = accelerator.mixed_precision == 'bf16' and emulates_bf16(accelerator.device)
                print(
                    f'{args.model}: {self.num_params:,} parameters, {len(self.class_names)} classes, '
                    f'images of {"x".join(map(str, self.data_config.input_size[1:]))}\n'
                    f'{args.dataset}: {self.train_loader.num_images} images to train on'
                    f'{f", {self.num_held_out} to choose the weights by" if self.num_held_out else ""}; classes '
                    f'{", ".join(self.class_names[:5])}{", ..." if len(self.class_names) > 5 else ""}\n'
                    f'{self.tell_missing()}'
                    f'{self.batches_per_epoch} batches of {args.batch_size} an epoch on each of '
                    f'{processes} processes, {self.updates} updates of '
                    f'{args.batch_size * args.grad_accum_steps * processes} images in {self.epochs} epochs\n'
                    f'{self.train_loader.augmentation}; {args.opt}, learning rate {self.peak_lr:g}, {args.sched} '
                    f'schedule{", all of it warmup" if never_falls else ""}; '
                    f'{describe_hardware(accelerator.device, processes)}, mixed precision '
                    f'{accelerator.mixed_precision}'
                    f'{" (many times slower than no on a CPU without AVX-512)" if emulated else ""}\n'
                    f'writing to {self.folder}' +
                    (f', then pushing to {args.push_to_hub} on the Hub' if args.push_to_hub else ''), flush=True)
        with agreeing(accelerator):
            record.check_shared(self.folder / SETTINGS)

    def tell_missing(self) -> str:
        if not self.missing:
            return ''
        names = ', '.join(self.missing[:5]) + (', ...' if len(self.missing) > 5 else '')
        advice = '' if self.args.pool else '; --pool divides a set that is sorted by class'
        return f'none of them is of {names}{advice}\n'

    def describe_resumption(self) -> str:
        return record.describe_resumption(self.folder)

    @property
    def epoch_of_all(self) -> str:
        number = self.state.epoch + 1
        return f'Epoch {number}/{max(number, self.epochs)}'  # more than planned where a part of one counts as one

    @property
    def num_held_out(self) -> int:
        return self.val_loader.num_images if self.val_loader is not None else 0

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in network(self.model).parameters())

    def run(self) -> Dict[str, Any]:
        """Train to the last update, measure the weights that were chosen, and return the result."""
        with ExitStack() as stack:
            self.start_record(stack)
            self.asked = asked = stack.enter_context(stopping_at_signals(at_once=False))
            self.last_question = self.state.update, time.perf_counter()
            try:
                with naming_failures(advise_on_memory(self.args)):
                    while self.state.update < self.updates or self.state.batch:  # the last may fall within an epoch
                        self.train_epoch()
                        self.finish_epoch()
                        if self.state.update < self.updates and self.is_asked_to_stop():
                            raise KeyboardInterrupt(STOP)
                    result = self.result(self.test())
                    if self.main_process:
                        write_json(self.folder / 'result.json', result)
                finish_trackers(self.accelerator)
                return result
            except (KeyboardInterrupt, Exception) as e:
                fail_trackers(self.accelerator)  # and no more, as the other processes would be waited for
                if isinstance(e, Exception) and not asked():
                    raise
                terminated = asked() or e.args == (STOP,)
                raise InterruptedWork(
                    f'Interrupted in epoch {self.state.epoch + 1} at update {self.state.update}; '
                    f'{self.describe_resumption()}.', signal.SIGTERM if terminated else signal.SIGINT) from None

    def train_epoch(self) -> None:
        """The rest of the epoch in progress."""
        args, state = self.args, self.state
        self.model.train()
        end = state.batch + (self.updates - state.update) * args.grad_accum_steps  # of a run that ends in the epoch
        bar = tqdm(
            desc=self.epoch_of_all, total=min(end, self.batches_per_epoch), initial=state.batch,
            unit='batch', disable=not self.main_process, mininterval=1., dynamic_ncols=True)
        start, images_seen, shown, before = time.perf_counter(), 0, 0., state.running_seconds
        with bar:
            done = state.update == self.updates or state.batch == self.batches_per_epoch  # when it was stopped
            rest = () if done else self.train_loader.epoch(state.epoch, start=state.batch)
            for images, targets in rest:
                self.step(images, targets)
                images_seen += len(images) * self.accelerator.num_processes
                bar.update()
                now = time.perf_counter()
                finished = state.batch == self.batches_per_epoch or state.update == self.updates
                if now - shown > 1 or finished:
                    shown = now
                    self.meter.check_finite(self.describe_resumption)
                    values = {k: f'{v:.3f}' for k, v in self.meter.means().items()}
                    bar.set_postfix(values | {'img/s': f'{images_seen / (now - start):.0f}'})
                asked = self.accelerator.sync_gradients and self.is_asked_to_stop()
                if finished and not asked:
                    break  # what is left does not fill an update
                if self.accelerator.sync_gradients:
                    if args.log_interval and state.update % args.log_interval == 0:
                        self.log({f'train/{k}': v for k, v in self.meter.means(self.accelerator).items()})
                    if asked or args.checkpoint_interval and state.update % args.checkpoint_interval == 0:
                        state.running_seconds = before + now - start
                        self.check_finite()
                        if finished:  # no forward pass follows, which would share those of the first process
                            self.distribute_statistics()
                        self.save()
                if asked:
                    raise KeyboardInterrupt(STOP)
        state.epoch_seconds.append(round(before + time.perf_counter() - start, 2))
        state.running_seconds = 0.
        self.images_per_second = images_seen / (time.perf_counter() - start) if images_seen else None

    def is_asked_to_stop(self) -> bool:
        """Whether SIGTERM came to any process; all of them ask after the same updates."""
        update, processes = self.state.update, self.accelerator.num_processes
        if processes == 1:
            return self.asked()
        if self.state.batch and update < self.next_question:  # they would wait for each other
            return False
        now = time.perf_counter()
        told = torch.tensor([self.asked(), now - self.last_question[1]], device=self.accelerator.device)
        asked, seconds = self.accelerator.reduce(told).tolist()
        made = update - self.last_question[0]  # none at the end of an epoch: the time is that of validation
        self.last_question = update, now
        self.next_question = update + max(1, int(ASK_SECONDS * made * processes / seconds))
        return asked > 0

    def step(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        """One batch: forward, backward and, where gradients are complete, an update."""
        args, state = self.args, self.state
        hard_targets = targets
        if self.mixup is not None:
            self.mixup.mixup_enabled = not args.mixup_off_epoch or state.epoch < args.mixup_off_epoch
            images, targets = self.mixup(images, hard_targets)
        self.scheduler.step_update(state.update)
        with self.accelerator.accumulate(self.model):
            result = self.learn(images, targets)
        self.meter.update(result, hard_targets, state.update, self.lr)
        state.batch += 1
        if self.accelerator.sync_gradients:
            state.update += 1
            if self.ema is not None:
                self.ema.update(self.plain_model, step=state.update)

    def _learn(self, images: torch.Tensor, targets: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Forward, backward and, where gradients are complete, an update, which may all be captured."""
        result = self.task(images, targets)
        self.accelerator.backward(result['loss'])
        if self.accelerator.sync_gradients and self.args.clip_grad:
            clip_gradients(self.accelerator, self.model, self.args)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return result

    @property
    def plain_model(self) -> torch.nn.Module:
        """The model as it is evaluated: without what distributes or compiles it, with its precision."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def candidates(self) -> Dict[str, torch.nn.Module]:
        """What is validated, by the prefix of its metrics."""
        return {'': self.plain_model, **({} if self.ema is None else {'ema_': self.ema.module})}

    def distribute_statistics(self) -> None:
        """Let all processes, which have statistics of their own images in batch norms, have the same."""
        if self.accelerator.num_processes > 1:
            for model in self.candidates.values():
                distribute_bn(model, self.accelerator.num_processes, self.args.dist_bn == 'reduce')

    @property
    def lr(self) -> float:
        return max(group['lr'] for group in self.optimizer.param_groups)  # they differ with --layer-decay

    def finish_epoch(self) -> None:
        """Validate, keep the weights that deserve it, and write everything down."""
        args, state = self.args, self.state
        self.check_finite()
        self.distribute_statistics()
        candidates = self.candidates
        metrics = self.meter.means(self.accelerator)
        evaluation: Dict[str, float] = {}
        last = state.update == self.updates
        if self.val_loader is not None and (last or (state.epoch + 1) % args.val_interval == 0):
            for prefix, model in candidates.items():
                values = self.measure(model, self.val_loader)
                evaluation.update({prefix + key: value for key, value in values.items()})
        state.history.append({
            'epoch': state.epoch, 'lr': self.lr, **{f'train_{k}': v for k, v in metrics.items()},
            **{f'eval_{k}': v for k, v in evaluation.items()},
        })
        self.keep_weights(candidates, evaluation)
        if self.main_process:
            record.write_summary(self.folder, state.history)
            figures = ', '.join(f'{k} {v:.4g}' for k, v in evaluation.items())
            print(
                f'{self.epoch_of_all}: training loss {metrics["loss"]:.4f}' +
                (f', {self.images_per_second:.0f} images/s' if self.images_per_second else '') +
                (f', validation {figures}' if figures else ''), flush=True)
        self.log({
            **{f'train/{k}': v for k, v in metrics.items()}, **{f'eval/{k}': v for k, v in evaluation.items()},
            **({'images_per_second': self.images_per_second} if self.images_per_second else {}),
        })
        state.epoch, state.batch = state.epoch + 1, 0
        self.meter = Meter(self.accelerator.device)
        self.save()

    def measure(self, model: torch.nn.Module, loader: Loader, desc: str = 'Validating') -> Dict[str, float]:
        half = self.args.val_batch_size // 2
        with naming_failures(f'try --val-batch-size {half}' if half else 'use a smaller model or image size'):
            return validate(model, loader, self.accelerator, flip=self.args.tta == 'flip', desc=desc)

    def keep_weights(self, candidates: Dict[str, torch.nn.Module], evaluation: Dict[str, float]) -> None:
        """Write the last weights and, where validation says so, the best."""
        state = self.state
        weights = {prefix: network_weights(model, self.accelerator) for prefix, model in candidates.items()}
        final = 'ema_' if self.ema is not None else ''
        metric = self.args.eval_metric
        sign = -1 if metric == 'loss' else 1

        def rank(values: Dict[str, float], prefix: str = '') -> Tuple[float, ...]:
            found = sign * values[prefix + metric], -values[f'{prefix}loss']  # few images are often a tie
            return tuple(-math.inf if math.isnan(value) else value for value in found)

        prefix = max(candidates, key=lambda p: rank(evaluation, p)) if evaluation else final
        improved = bool(evaluation) and (state.best is None or rank(evaluation, prefix) > rank(state.best))
        if improved:
            state.best = {
                'epoch': state.epoch, 'weights': 'ema' if prefix else 'model', 'images': self.num_held_out,
                **{k: evaluation[prefix + k] for k in METRICS},
            }
        if self.main_process:
            description = self.describe()
            if not state.kept:
                remove(self.folder / 'history')  # as the best, of a run that went on with other images held out
            save_weights(self.folder / 'last.safetensors', weights[final], description)
            if improved:
                save_weights(self.folder / 'best.safetensors', weights[prefix], description)
            elif state.best is None:
                remove(self.folder / 'best.safetensors')
            if evaluation and self.args.checkpoint_hist:
                record.keep_best(
                    self.folder, state, rank(evaluation, prefix), self.args.checkpoint_hist, weights[prefix],
                    description)

    def log(self, values: Dict[str, float]) -> None:
        self.accelerator.log({**values, 'lr': self.lr}, step=self.state.tracker_step)

    def check_finite(self) -> None:
        """Refuse to write down what has gone wrong, on any process."""
        self.meter.check_weights(self.model, self.state.update - 1, self.lr)
        self.meter.check_finite(self.describe_resumption, self.accelerator)

    def save(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self.clock
        self.clock = now
        self.state.running = gather_object([self.meter.state_dict()])  # of every process, in their order
        checkpoint.save_checkpoint(self.folder, self.accelerator, self.state, self.ema)

    @property
    def chosen(self) -> str:
        """Name of the weights the run is for: the best by validation, the last if nothing was validated."""
        known = self.args.eval_only or self.state.best is not None
        return 'best' if known and (self.folder / 'best.safetensors').is_file() else 'last'

    def test(self) -> Optional[Dict[str, Any]]:
        """Accuracy of the chosen weights on the test part, which nothing else has looked at."""
        if self.test_loader is None:
            return None
        self.accelerator.wait_for_everyone()
        path = self.folder / f'{self.chosen}.safetensors'
        model = load_model(path).to(self.accelerator.device).to(memory_format=self.memory_format)
        values = self.measure(model, self.test_loader, 'Testing')
        if self.main_process:
            print('Test: ' + ', '.join(f'{k} {v:.4g}' for k, v in values.items()), flush=True)
        self.log({f'test/{k}': v for k, v in values.items()})
        return {'weights': self.chosen, **values}

    def evaluate(self) -> Dict[str, Any]:
        """Measure the model as it is, on the validation and the test part."""
        args = self.args
        if self.val_loader is None and self.test_loader is None:
            raise InputError('There are no images to measure the weights on; name a split with --test-split.')
        weights = args.initial_checkpoint or ('pretrained' if args.pretrained else 'random')
        with naming_failures(advise_on_memory(args)):
            model = self.plain_model
            if args.resume:
                weights = str(self.folder / f'{self.chosen}.safetensors')
                model = load_model(weights, args.model).to(self.accelerator.device).to(memory_format=self.memory_format)
            loaders = {'validation': self.val_loader, 'test': self.test_loader}
            values = {
                part: self.measure(model, loader) for part, loader in loaders.items() if loader is not None
            }
        self.accelerator.end_training()
        return dict(self.describe_run(), weights=weights, **values)

    def describe_run(self) -> Dict[str, Any]:
        args = self.args
        return dict(
            model=args.model,
            parameters=self.num_params,
            dataset=args.dataset,
            num_classes=len(self.class_names),
            seed=args.seed,
            hardware=', then '.join(self.state.hardware),
            processes=self.accelerator.num_processes,
            mixed_precision=self.accelerator.mixed_precision,
            versions={
                name: ', then '.join(dict.fromkeys(v[name] for v in self.state.versions if name in v))
                for name in self.state.versions[-1]},
            commit=', then '.join(self.state.commits) or None,
        )

    def result(self, test: Optional[Dict[str, Any]]) -> Dict[str, Any]:
        state = self.state
        names = ('last',) if state.best is None else ('last', 'best')
        return dict(
            self.describe_run(),
            epochs=self.epochs,
            updates=self.updates,
            images={
                part: loader.num_images
                for part, loader in (
                    ('train', self.train_loader), ('validation', self.val_loader), ('test', self.test_loader))
                if loader is not None
            },
            last=state.history[-1],
            best=state.best,
            test=test,
            history=state.history,
            seconds=round(state.seconds, 1),
            epoch_seconds=state.epoch_seconds,
            weights={name: str(self.folder / f'{name}.safetensors') for name in names},
        )


def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    """Train as the flags say (the command line's if None) and return the result.

    Raises:
        InputError: For settings, data or a checkpoint that cannot be used.
    """
    args = parse_args(argv)
    join_tasks()
    with naming_failures(advise_on_memory(args)):
        trainer = Trainer(args)
    if args.eval_only:
        return trainer.evaluate()
    if args.push_to_hub:
        check_exportable(network(trainer.model), trainer.data_config)
    result = trainer.run()
    if args.push_to_hub and trainer.accelerator.is_main_process:
        result['pushed'] = publish(trainer.folder / f'{trainer.chosen}.safetensors', args)
    return result


if __name__ == '__main__':
    with exiting_on_input_error(), leaving_it_to_the_first():
        result = main()
    if PartialState().is_main_process:
        print(to_json(result))
    leave_hanging()
