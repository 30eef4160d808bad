#!/usr/bin/env python3
"""Train an image classifier of timm's registry on small images.

On the embedded sample of 2,000 CIFAR-10 images, one process:

    python train/train.py --epochs 5

With a recipe, in bfloat16, on all GPUs of this machine:

    accelerate launch --mixed_precision bf16 train/train.py -c train/recipes/cifar10/rn26_tm.yaml \
        --dataset hfds/uoft-cs/cifar10

Continue a run that was stopped:

    python train/train.py --resume output/EXPERIMENT

Models with patch logits (`rn26_tm`, ...) are trained with equation 3.1 of the paper, the others with cross-entropy.
The last line of output is the result as JSON.
"""
import csv
import json
import math
import platform
import re
import signal
import sys
import time
from argparse import Namespace
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

if __package__ in (None, ''):  # run as a script: find the checkout, not this folder's train.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list, set_seed
from timm.data import Mixup
from timm.models import PretrainedCfg
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationEvaluator, ClassificationTask, TrainingTask, evaluation_sample_limit
from timm.utils import ModelEmaV3, unwrap_model
from tqdm import tqdm

import timm_tmblock
from timm_tmblock.checkpoint import save_weights, writing
from timm_tmblock.errors import InputError, exiting_on_input_error
from timm_tmblock.task import TemplateMatchingTask
from train import checkpoint
from train.checkpoint import TrainState
from train.config import SETTINGS, dump_args, parse_args, refusing
from train.data import (
    DataConfig,
    InMemoryLoader,
    Loader,
    StreamingLoader,
    decode,
    fits_in_memory,
    get_class_names,
    open_dataset,
)
from train.meter import Meter
from train.model import check_model_name, create_model, network, resolve_img_size


def create_accelerator(args: Namespace) -> Accelerator:
    if args.device != 'auto' and args.device != 'cpu':
        available = torch.cuda.is_available() if args.device == 'cuda' else torch.backends.mps.is_available()
        if not available:
            raise InputError(f'There is no {args.device} device here; leave out --device or use --device cpu.')
    with refusing('These settings of Accelerate'):
        accelerator = Accelerator(
            cpu=args.device == 'cpu',
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.grad_accum_steps,
            log_with=None if args.report_to == 'none' else args.report_to,
            project_dir=args.output,  # trackers want one; the experiment folder's name needs an accelerator first
        )
    if accelerator.mixed_precision == 'fp16' and accelerator.device.type == 'cpu':
        raise InputError('fp16 needs a GPU; use --mixed-precision bf16 or no on the CPU.')
    return accelerator


def create_folder_name(args: Namespace) -> Path:
    """The experiment folder, the same on every process.

    Raises:
        InputError: If there is no run to resume, or there is one that was not to be resumed.
    """
    if args.resume:
        if not Path(args.resume).is_dir():
            raise InputError(f'There is no experiment folder {args.resume} to resume.')
        return Path(args.resume)
    names = [args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{args.model}']
    folder = Path(args.output) / broadcast_object_list(names)[0]
    if checkpoint.find_checkpoints(folder):
        raise InputError(
            f'{folder} already holds a run; continue it with --resume {folder}, or choose another --experiment.')
    return folder


def create_loaders(args: Namespace, accelerator: Accelerator) -> Tuple[Loader, Loader, DataConfig, List[str]]:
    """Training and validation loader, the input they give, and the class names."""
    cfg = timm.get_pretrained_cfg(args.model) or PretrainedCfg()
    config = DataConfig(
        input_size=(args.model_kwargs.get('in_chans', cfg.input_size[0]), *resolve_img_size(args, cfg)),
        mean=tuple(args.mean or cfg.mean),
        std=tuple(args.std or cfg.std),
        interpolation=cfg.interpolation,
        crop_pct=cfg.crop_pct,
        padding=args.padding,
        padding_mode=args.padding_mode,
        hflip=args.hflip,
    )
    if not len(config.mean) == len(config.std) == config.input_size[0]:
        raise InputError(f'--mean and --std need {config.input_size[0]} values each, one a channel of the input.')
    loaders: List[Loader] = []
    names: List[List[str]] = []
    for split, training in ((args.train_split, True), (args.val_split, False)):
        with accelerator.main_process_first():  # one process fills the cache
            dataset = open_dataset(
                args.dataset,
                split,
                root=args.data_dir,
                input_key=args.input_key,
                target_key=args.target_key,
                download=args.dataset_download,
                channels=config.input_size[0],
            )
        names.append(get_class_names(dataset))
        batch_size = args.batch_size if training else args.val_batch_size
        if fits_in_memory(dataset, config, args.memory_limit):
            loaders.append(InMemoryLoader(
                decode(dataset, config, progress=accelerator.is_main_process),
                config,
                batch_size,
                accelerator.device,
                training=training,
                seed=args.seed,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                channels_last=args.channels_last,
            ))
        else:
            loaders.append(StreamingLoader(
                dataset,
                config,
                batch_size,
                accelerator.device,
                training=training,
                num_workers=args.workers,
                distributed=accelerator.num_processes > 1,
                channels_last=args.channels_last,
            ))
    if names[0] != names[1]:
        raise InputError(f'The classes of {args.train_split!r} and {args.val_split!r} differ; they must be the same.')
    return loaders[0], loaders[1], config, names[0]


def create_task(args: Namespace, model: torch.nn.Module, device: torch.device) -> TrainingTask:
    soft_targets = args.mixup > 0 or args.cutmix > 0
    criterion_kwargs = dict(smoothing=args.smoothing, soft_targets=soft_targets)
    with refusing('These settings of the loss'):
        if args.aux_head or getattr(unwrap_model(model), 'has_template_matching', False):
            return TemplateMatchingTask(
                model, criterion_kwargs=criterion_kwargs, patch_loss_weight=args.patch_loss_weight, device=device)
        return ClassificationTask(model, criterion_kwargs=criterion_kwargs, device=device)


class Trainer:
    """One run: everything it needs, set up from its settings."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        check_model_name(args.model)
        self.accelerator = accelerator = create_accelerator(args)
        self.folder = create_folder_name(args)
        accelerator.project_configuration = ProjectConfiguration(str(self.folder))  # where trackers write
        self.main_process = accelerator.is_main_process
        set_seed(args.seed)  # the same initial weights on every process
        self.train_loader, self.val_loader, self.data_config, self.class_names = create_loaders(args, accelerator)
        self.mixup = None
        if args.mixup > 0 or args.cutmix > 0:
            self.mixup = Mixup(
                args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=len(self.class_names))

        model = create_model(args, self.class_names).to(accelerator.device)
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.ema: Optional[ModelEmaV3] = None
        if args.model_ema:
            self.ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        with refusing(f'These settings of the optimizer {args.opt!r}'):
            optimizer = create_optimizer_v2(
                model, **optimizer_kwargs(args), filter_bias_and_bn=args.filter_bias_and_bn)
        self.updates_per_epoch = len(self.train_loader) // args.grad_accum_steps
        if self.updates_per_epoch == 0:
            raise InputError('An epoch has fewer batches than --grad-accum-steps; use a smaller number.')
        self.batches_per_epoch = self.updates_per_epoch * args.grad_accum_steps
        # timm's schedule is a function of the update count alone: nothing of it to prepare or to save
        with refusing(f'These settings of the schedule {args.sched!r}'):
            self.scheduler, self.epochs = create_scheduler_v2(
                optimizer,
                **{**scheduler_kwargs(args), 'step_on_epochs': False},
                updates_per_epoch=self.updates_per_epoch,
            )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.task = create_task(args, self.model, accelerator.device)
        set_seed(args.seed, device_specific=True)  # dropout and mixup differ between processes

        self.state = TrainState()
        self.meter = Meter(accelerator.device)
        if args.resume:
            self.state = checkpoint.load_checkpoint(self.folder, accelerator, self.ema)
            self.meter.load_state_dict(self.state.running)
        self.clock = time.perf_counter()

    def describe(self) -> Dict[str, Any]:
        """What the weights are, for whoever loads them."""
        data = self.data_config
        return dict(
            model=self.args.model,
            model_args=self.args.model_kwargs,
            num_classes=len(self.class_names),
            label_names=self.class_names,
            input_size=data.input_size,
            mean=data.mean,
            std=data.std,
            interpolation=data.interpolation,
            crop_pct=data.crop_pct,
        )

    def start_record(self) -> None:
        args = self.args
        if self.main_process:
            with writing(self.folder / SETTINGS) as tmp:
                tmp.write_text(dump_args(args))
                tmp.replace(self.folder / SETTINGS)
            print(
                f'{args.model}: {self.num_params:,} parameters, {len(self.class_names)} classes, '
                f'images of {"x".join(map(str, self.data_config.input_size[1:]))}\n'
                f'{args.dataset}: {self.batches_per_epoch} batches of {args.batch_size} an epoch on each of '
                f'{self.accelerator.num_processes} processes, {self.epochs} epochs\n'
                f'{args.opt}, learning rate {args.lr:g}, {args.sched} schedule; '
                f'{describe_hardware(self.accelerator.device)}, '
                f'mixed precision {self.accelerator.mixed_precision}\n'
                f'writing to {self.folder}', flush=True)
        if args.report_to != 'none':
            config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(args).items()}
            self.accelerator.init_trackers('log', config=config)

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in network(self.model).parameters())

    def run(self) -> Dict[str, Any]:
        """Train to the last epoch and return the result."""
        self.start_record()
        try:
            with stopping_at_signals():
                while self.state.epoch < self.epochs:
                    self.train_epoch()
                    self.finish_epoch()
        except KeyboardInterrupt:
            newest = checkpoint.find_checkpoints(self.folder)
            hint = f'continue with --resume {self.folder}' if newest else 'there was no checkpoint yet'
            raise InputError(
                f'Interrupted in epoch {self.state.epoch + 1} at update {self.state.update}; {hint}.') from None
        finally:
            self.accelerator.end_training()
        return self.result()

    def train_epoch(self) -> None:
        """The rest of the epoch in progress."""
        args, state = self.args, self.state
        self.model.train()
        bar = tqdm(
            desc=f'Epoch {state.epoch + 1}/{self.epochs}', total=self.batches_per_epoch, initial=state.batch,
            unit='batch', disable=not self.main_process, mininterval=1., dynamic_ncols=True)
        start, images_seen, shown = time.perf_counter(), 0, 0.
        with bar:
            for images, targets in self.train_loader.epoch(state.epoch, start=state.batch):
                self.step(images, targets)
                images_seen += len(images) * self.accelerator.num_processes
                bar.update()
                now = time.perf_counter()
                if now - shown > 1 or state.batch == self.batches_per_epoch:
                    shown = now
                    means = self.meter.means()
                    if not math.isfinite(means['loss']):
                        raise InputError(
                            f'The loss is {means["loss"]} by update {state.update} at learning rate {self.lr:g}; '
                            f'lower --lr or set --clip-grad.')
                    shown_values = {k: f'{v:.3f}' for k, v in means.items()}
                    bar.set_postfix(shown_values | {'img/s': f'{images_seen / (now - start):.0f}'})
                if self.accelerator.sync_gradients and args.checkpoint_interval \
                        and state.update % args.checkpoint_interval == 0:
                    self.save()
                if state.batch == self.batches_per_epoch:
                    break  # what is left does not fill an update
        self.images_per_second = images_seen / (time.perf_counter() - start)

    def step(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        """One batch: forward, backward and, where gradients are complete, an update."""
        hard_targets = targets
        if self.mixup is not None:
            even = len(images) // 2 * 2  # mixup pairs images
            images, hard_targets = images[:even], targets[:even]
            images, targets = self.mixup(images, hard_targets)
        if self.scheduler is not None:
            self.scheduler.step_update(self.state.update)
        with self.accelerator.accumulate(self.model):
            result = self.task(images, targets)
            self.accelerator.backward(result['loss'])
            if self.accelerator.sync_gradients and self.args.clip_grad is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.state.batch += 1
        if self.accelerator.sync_gradients:
            self.state.update += 1
            if self.ema is not None:
                self.ema.update(self.accelerator.unwrap_model(self.model), step=self.state.update)
        self.meter.update(result, hard_targets)

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]['lr']

    def finish_epoch(self) -> None:
        """Validate, keep the weights that deserve it, and write everything down."""
        state = self.state
        candidates = {'': self.accelerator.unwrap_model(self.model)}
        if self.ema is not None:
            candidates['ema_'] = self.ema.module
        evaluation = {
            prefix + key: value
            for prefix, model in candidates.items()
            for key, value in validate(model, self.val_loader, self.accelerator).items()
        }
        metrics = {**self.meter.means(self.accelerator), 'images_per_second': self.images_per_second}
        state.history.append({
            'epoch': state.epoch, 'lr': self.lr, **{f'train_{k}': v for k, v in metrics.items()},
            **{f'eval_{k}': v for k, v in evaluation.items()},
        })
        prefix = max(candidates, key=lambda p: evaluation[f'{p}top1'])
        improved = state.best is None or evaluation[f'{prefix}top1'] > state.best['top1']
        if improved:
            state.best = {
                'epoch': state.epoch, 'weights': 'ema' if prefix else 'model',
                **{k: evaluation[prefix + k] for k in ('loss', 'top1', 'top5')},
            }
        if self.main_process:
            description = self.describe()
            last = candidates['ema_' if self.ema is not None else '']
            save_weights(self.folder / 'last.safetensors', network(last).state_dict(), description)
            if improved:
                save_weights(
                    self.folder / 'best.safetensors', network(candidates[prefix]).state_dict(), description)
            self.write_summary()
            print(
                f'Epoch {state.epoch + 1}/{self.epochs}: training loss {metrics["loss"]:.4f}, validation '
                + ', '.join(f'{k} {v:.4g}' for k, v in evaluation.items()), flush=True)
        self.accelerator.log(
            {f'train/{k}': v for k, v in metrics.items()} | {f'eval/{k}': v for k, v in evaluation.items()}
            | {'lr': self.lr}, step=state.update)
        state.epoch, state.batch = state.epoch + 1, 0
        self.meter = Meter(self.accelerator.device)
        self.save()

    def write_summary(self) -> None:
        """One row an epoch. Written anew each time: a resumed run may repeat an epoch that is already in the file."""
        path = self.folder / 'summary.csv'
        with writing(path) as tmp:
            with tmp.open('w', newline='') as f:
                writer = csv.DictWriter(f, fieldnames=self.state.history[0])
                writer.writeheader()
                writer.writerows(self.state.history)
            tmp.replace(path)

    def save(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self.clock
        self.clock = now
        self.state.running = self.meter.state_dict()
        checkpoint.save_checkpoint(self.folder, self.accelerator, self.state, self.ema)

    def result(self) -> Dict[str, Any]:
        args, state = self.args, self.state
        return dict(
            model=args.model,
            parameters=self.num_params,
            dataset=args.dataset,
            num_classes=len(self.class_names),
            epochs=self.epochs,
            seed=args.seed,
            last=state.history[-1],
            best=state.best,
            history=state.history,
            seconds=round(state.seconds, 1),
            hardware=describe_hardware(self.accelerator.device),
            processes=self.accelerator.num_processes,
            mixed_precision=self.accelerator.mixed_precision,
            versions=dict(
                timm_tmblock=timm_tmblock.__version__, torch=torch.__version__, timm=timm.__version__,
                python=platform.python_version()),
            weights=dict(last=str(self.folder / 'last.safetensors'), best=str(self.folder / 'best.safetensors')),
        )


@torch.no_grad()
def validate(model: torch.nn.Module, loader: Loader, accelerator: Accelerator) -> Dict[str, float]:
    """Loss, top-1 and top-5 accuracy (%) over the whole set, each image counted once."""
    model.eval()
    evaluator = ClassificationEvaluator(
        accelerator.device, max_samples=evaluation_sample_limit(getattr(loader, 'loader', None)))
    batches = tqdm(
        loader.epoch(0), total=len(loader), desc='Validating', unit='batch', leave=False,
        disable=not accelerator.is_main_process)
    for images, targets in batches:
        with accelerator.autocast():
            output = model(images)
        evaluator.update(output, targets)
    return dict(evaluator.compute(distributed=accelerator.num_processes > 1))


@contextmanager
def stopping_at_signals() -> Iterator[None]:
    """Let SIGTERM, which schedulers send, stop the run as Ctrl-C does."""
    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread, as in a notebook
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def describe_hardware(device: torch.device) -> str:
    if device.type == 'cuda':
        return f'{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}'
    name = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').is_file():
        names = re.findall(r'^model name\s*: (.+)', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
        name = names[0] if names else name
    return f'{name}, {torch.get_num_threads()} threads'


def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    """Train as the flags say (the command line's if None) and return the result.

    Raises:
        InputError: For settings, data or a checkpoint that cannot be used.
    """
    return Trainer(parse_args(argv)).run()


if __name__ == '__main__':
    with exiting_on_input_error():
        result = main()
    if Accelerator().is_main_process:
        print(json.dumps(result))
