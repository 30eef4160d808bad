#!/usr/bin/env python3
"""Speed of training as ratios, side by side in one run: the input path, a whole epoch, timm's own script, memory
that is kept or handed back.

    python benchmarks/training.py --dataset hfds/uoft-cs/cifar10 --input-key img --timm-train CLONE/train.py \
        --output benchmarks/results/training_cpu            # writes training_cpu.json and training_cpu.md
    python benchmarks/training.py --only input              # some of it, on the embedded sample, printed

Both sides of a ratio take turns; a side's time is the fastest of its turns, as whatever else the machine does only adds
to it. `CLONE` is a clone of https://github.com/huggingface/pytorch-image-models. Ratios are of images per second, ours
over theirs.
"""
import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List

if __package__ in (None, ''):  # run as a script: find the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import timm
import torch
import torchvision.transforms as T
from timm.data import create_loader
from timm.optim import create_optimizer_v2, optimizer_kwargs

from timm_tmblock import TemplateMatchingTask
from timm_tmblock.errors import InputError, exiting_on_input_error
from train.augment import DataConfig
from train.config import parse_args, positive
from train.data import SAMPLE, decode, open_dataset
from train.files import write_report
from train.hardware import describe_hardware, describe_versions, find_commit, resolve_device
from train.loader import InMemoryLoader
from train.train import Trainer

ROOT = Path(__file__).resolve().parent.parent
Turn = Callable[[], float]  # images per second


def compare(name: str, ours: Turn, theirs: Turn, rounds: int, goal: float, note: str) -> Dict[str, Any]:
    speeds: List[List[float]] = [[], []]
    for _ in range(rounds):
        for side, turn in enumerate((ours, theirs)):
            speeds[side].append(turn())
    a, b = (max(s) for s in speeds)
    row = dict(
        name=name, ratio=a / b, goal=goal, ours=a, theirs=b, rounds=rounds,
        ratios=[x / y for x, y in zip(*speeds)], note=note)
    print(f'{name}: {a:,.0f} against {b:,.0f} images/s, ratio {a / b:.3f} (goal {goal:g})', flush=True)
    return row


class InMemoryEpochs:
    """A new epoch each time it is iterated over."""

    def __init__(self, loader: InMemoryLoader) -> None:
        self.loader = loader
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        return self.loader.epoch(self.epoch)


def draw_all(batches: Iterable[Any]) -> float:
    start, images = time.perf_counter(), 0
    for x, _ in batches:
        images += len(x)
    return images / (time.perf_counter() - start)


def input_path(args: argparse.Namespace, device: torch.device) -> Iterator[Dict[str, Any]]:
    """The batches of an epoch alone, cropped, flipped and normalised."""
    cfg = timm.get_pretrained_cfg('rn26_tm')
    config = DataConfig((3, 32, 32), cfg.mean, cfg.std)
    dataset = open_dataset(args.dataset, args.split, input_key=args.input_key)
    ours = InMemoryLoader(decode(dataset, config), config, args.batch_size, device, training=True, channels_last=True)
    steps = [T.RandomCrop(32, 4, padding_mode='reflect'), T.RandomHorizontalFlip(), T.ToTensor(),
             T.Normalize(cfg.mean, cfg.std)]
    for workers in args.workers:
        theirs = create_loader(
            dataset, (3, 32, 32), args.batch_size, is_training=True, num_workers=workers, use_prefetcher=False,
            device=device)
        dataset.transform = T.Compose(steps)  # the same crop and flip, which timm does not have
        yield compare(
            f"input path over timm's loader, {workers} workers", partial(draw_all, InMemoryEpochs(ours)),
            partial(draw_all, theirs), args.rounds, 20., f'batches of {args.batch_size}, {len(dataset)} images; '
            f'timm decodes each image in each epoch, ours were decoded once before')


def epoch(args: argparse.Namespace, device: torch.device) -> Iterator[Dict[str, Any]]:
    """Epochs of the trainer and of a bare loop over batches that are already augmented and in place."""
    images = args.steps * args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        flags = ['--dataset', args.dataset, '--input-key', args.input_key, '--val-fraction', '0',
                 '--train-split', f'train[:{images}]', '--batch-size', str(args.batch_size), '--opt', 'muon', '--lr',
                 '0.01', '--mixed-precision', 'bf16', '--report-to', 'none', '--output', folder, '--epochs', '1000',
                 '--device', device.type]
        trainer = Trainer(parse_args(flags))
        settings = trainer.args
        torch.manual_seed(0)
        model = timm.create_model('rn26_tm').to(device).to(memory_format=torch.channels_last).train()
        task = TemplateMatchingTask(model, device=device)
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(settings))
        ready = list(trainer.train_loader.epoch(0))
        images = sum(len(x) for x, _ in ready)  # the set may have fewer

        def ours() -> float:
            with contextlib.redirect_stderr(io.StringIO()):  # the progress bar draws, but not here
                trainer.train_epoch()
            trainer.state.epoch, trainer.state.batch = trainer.state.epoch + 1, 0
            return trainer.images_per_second or 0.

        def theirs() -> float:
            start = time.perf_counter()
            for x, y in ready:
                with torch.autocast(device.type, torch.bfloat16):
                    loss = task(x, y)['loss']
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            return images / (time.perf_counter() - start)

        ours(), theirs()  # the first steps choose kernels
        yield compare(
            'epoch over a bare loop', ours, theirs, args.rounds, 0.97,
            f'rn26_tm, Muon, bfloat16, channels last, {len(ready)} batches of {args.batch_size}')


def timm_script(args: argparse.Namespace, device: torch.device) -> Iterator[Dict[str, Any]]:
    """Our script and timm's, with cross-entropy on the baseline, which both can do. Rates are of the second epoch."""
    dataset, key = (f'hfds/{SAMPLE}', 'img') if args.dataset == 'sample' else (args.dataset, args.input_key)
    common = ['--model', 'rn26', '--dataset', dataset, '--input-key', key, '--opt', 'momentum', '--lr', '0.05',
              '--epochs', '2', '--batch-size', str(args.batch_size), '--warmup-epochs', '0', '--channels-last',
              '--workers', '2', '--device', device.type]
    images = args.steps * args.batch_size

    def run(command: List[str]) -> str:
        env = {**os.environ, 'PYTHONPATH': str(ROOT)}
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=env)
        if done.returncode:
            sys.exit(f'{command[0]} failed: {done.stderr[-1500:]}')
        return done.stdout + done.stderr

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            output = run([
                str(ROOT / 'train' / 'train.py'), *common, '--train-split', f'train[:{images}]', '--val-split',
                'test[:256]', '--mixed-precision', 'bf16', '--output', folder, '--report-to', 'none'])
        result = json.loads(next(line for line in output.splitlines() if line.startswith('{"model"')))
        return result['images']['train'] // args.batch_size * args.batch_size / result['epoch_seconds'][1]

    def theirs() -> float:
        with tempfile.TemporaryDirectory() as folder:
            output = run([
                args.timm_train, *common, '--train-split', f'train[:{images}]', '--val-split', 'test[:256]', '--amp',
                '--amp-dtype', 'bfloat16', '--output', folder, '--device-modules', 'timm_tmblock', '--num-classes',
                '10', '--color-jitter', '0', '--log-interval', '1', '--smoothing', '0'])
        rates = re.findall(r'Train: 1 .*?Time: [\d.]+s,\s*[\d.]+/s\s*\(\s*[\d.]+s,\s*([\d.]+)/s\)', output)
        return float(rates[-1])

    yield compare(
        "train.py over timm's train.py", ours, theirs, args.rounds, 1.1,
        f'rn26, momentum, bfloat16, channels last, {args.steps} batches of {args.batch_size}, two workers')


def memory(args: argparse.Namespace, device: torch.device) -> Iterator[Dict[str, Any]]:
    """Steps on a CPU with the memory of freed tensors kept, as train.py does, and with glibc as it is."""
    steps = 7

    def run(model: str, keep: bool) -> float:
        done = subprocess.run(
            [sys.executable, '-c', STEPS.format(
                root=str(ROOT), keep=keep, model=model, batch_size=args.batch_size, steps=steps)],
            capture_output=True, text=True, check=True)
        return float(done.stdout)

    for model in ('rn26_tm', 'dn100_tm'):
        yield compare(
            f"{model}, freed memory kept, over glibc's default", partial(run, model, True), partial(run, model, False),
            args.rounds, 1., f'SGD, bfloat16, channels last, {steps} batches of {args.batch_size}, 2 of them not timed')


STEPS = '''
import sys, time
sys.path.insert(0, {root!r})
import timm, torch
import timm_tmblock
from train.memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
model = timm.create_model({model!r}).to(memory_format=torch.channels_last).train()
optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
images = torch.randn({batch_size}, 3, 32, 32).to(memory_format=torch.channels_last)
targets = torch.randint(0, 10, ({batch_size},))
for i in range({steps}):
    if i == 2:
        start = time.perf_counter()
    with torch.autocast('cpu', torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(model(images), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(({steps} - 2) * {batch_size} / (time.perf_counter() - start))
'''
GROUPS = {'input': input_path, 'epoch': epoch, 'timm': timm_script, 'memory': memory}


def render(result: Dict[str, Any]) -> str:
    versions = ', '.join(f'{k} {v}' for k, v in result['versions'].items())
    lines = [
        '# Speed of training', '',
        f'`{result["command"]}` on {result["hardware"]}; {versions}. The two sides took turns; a rate is that of the '
        f'fastest turn, in brackets are the smallest and largest ratio of a round. Above 1 ours is faster.', '',
        '| | ratio | goal | ours, images/s | theirs, images/s | rounds | |', '|---|---|---|---|---|---|---|']
    lines += [
        f'| {r["name"]} | {r["ratio"]:.3f} [{min(r["ratios"]):.3f}, {max(r["ratios"]):.3f}] | ≥ {r["goal"]:g} | '
        f'{r["ours"]:,.0f} | {r["theirs"]:,.0f} | {r["rounds"]} | {r["note"]} |' for r in result['rows']]
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--dataset', default='sample')
    parser.add_argument('--input-key', default='image')
    parser.add_argument('--split', default='train', help='images of the input path')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--batch-size', type=positive, default=128)
    parser.add_argument('--steps', type=positive, default=20, help='batches of a turn of training')
    parser.add_argument('--rounds', type=positive, default=4)
    parser.add_argument('--workers', type=int, nargs='+', default=[2], help="processes of timm's loader")
    parser.add_argument('--timm-train', help="timm's train.py, for the comparison with it")
    parser.add_argument('--only', nargs='+', choices=GROUPS)
    parser.add_argument('--output', help='write NAME.json and NAME.md')
    args = parser.parse_args()
    if 'timm' in (args.only or ()) and not args.timm_train:
        raise InputError("The comparison with timm needs its script; name it with --timm-train.")
    device = resolve_device(args.device)
    groups = args.only or [g for g in GROUPS if dict(timm=args.timm_train, memory=device.type == 'cpu').get(g, True)]
    rows: List[Dict[str, Any]] = []
    result = dict(
        command=' '.join(['python benchmarks/training.py', *sys.argv[1:]]), hardware=describe_hardware(device),
        versions=describe_versions(), commit=find_commit(), rows=rows)
    for group in groups:
        rows += GROUPS[group](args, device)
        if args.output:  # as far as it has come
            write_report(args.output, result, render(result))


if __name__ == '__main__':
    with exiting_on_input_error():
        main()
