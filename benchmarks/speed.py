#!/usr/bin/env python3
"""Speed and memory of the networks as ratios, each measured side by side in one run.

    python benchmarks/speed.py --output benchmarks/results/cpu        # writes cpu.json and cpu.md
    python benchmarks/speed.py --device cuda --output benchmarks/results/cuda
    python benchmarks/speed.py --only dense --seconds 5               # some of it, printed

Times are of steps that alternate between the two sides of a ratio; a side's time is the 10th percentile over the
rounds, as whatever else the machine does only adds to it. Peak memory is what one training step takes above what the
process held before, each in a process of its own. Images are random; nothing here depends on what they show.
"""
import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

if __package__ in (None, ''):  # run as a script: find the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import timm
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d
from timm.models.densenet import DenseBlock, DenseTransition
from timm.task import ClassificationTask
from torch.utils.benchmark import Timer

from timm_tmblock import TemplateMatchingTask
from timm_tmblock.errors import InputError, exiting_on_input_error
from train.files import write_report
from train.hardware import describe_hardware, describe_versions, find_commit

PAIRS = [('rn26_tm', 'rn26'), ('rn38_tm', 'rn38'), ('wrn16_tm', 'wrn16'), ('dn100_tm', 'dn100'),
         ('dn100_tm_cat', 'dn100')]
FORMATS = {'NCHW': torch.contiguous_format, 'channels_last': torch.channels_last}
PRECISIONS = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
Step = Callable[[], None]


class TimmDenseNet(nn.Module):
    """dn100 of timm's own DenseNet layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1, bias=False),
            DenseBlock(16, 24, bn_size=4, growth_rate=12), DenseTransition(216, 108),
            DenseBlock(16, 108, bn_size=4, growth_rate=12), DenseTransition(300, 150),
            DenseBlock(16, 150, bn_size=4, growth_rate=12),
            DenseBlock(16, 342, bn_size=4, growth_rate=12), BatchNormAct2d(534))
        self.fc = nn.Linear(534, 10)
        self.num_classes = 10

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).mean((2, 3)))


@dataclass
class Setting:
    device: str
    batch_size: int
    precision: str = 'bfloat16'
    memory_format: str = 'channels_last'

    def inputs(self) -> torch.Tensor:
        return torch.randn(self.batch_size, 3, 32, 32, device=self.device).to(
            memory_format=FORMATS[self.memory_format])

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, PRECISIONS[self.precision], enabled=self.precision != 'float32')

    def create(self, name: str, **kwargs) -> Any:
        torch.manual_seed(0)
        model: Any = TimmDenseNet() if name == 'timm' else timm.create_model(name, **kwargs)
        return model.to(self.device, memory_format=FORMATS[self.memory_format])


def train_step(setting: Setting, name: str, compiled: bool = False, **kwargs) -> Step:
    """Forward, loss, backward and update; with template matching, the loss of equation 3.1."""
    model = setting.create(name, **kwargs).train()
    task_cls = TemplateMatchingTask if getattr(model, 'has_template_matching', False) else ClassificationTask
    run: Any = torch.compile(model) if compiled else model
    task = task_cls(run, device=torch.device(setting.device))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    x, y = setting.inputs(), torch.randint(0, 10, (setting.batch_size,), device=setting.device)

    def step() -> None:
        with setting.autocast():
            loss = task(x, y)['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(setting: Setting, name: str, fused: bool = False, compiled: bool = False, **kwargs) -> Step:
    model = setting.create(name, **kwargs).eval()
    if fused:
        model.fuse()
    run = torch.compile(model) if compiled else model
    x = setting.inputs()

    def step() -> None:
        with torch.inference_mode(), setting.autocast():
            run(x)

    return step


@dataclass
class Ratio:
    """`ratio` of the times, or of the peak memory, of two sides; the goal is an upper bound."""
    group: str
    name: str
    setting: Dict[str, Any]
    ratio: float
    quartiles: Tuple[float, float]
    numerator: float  # seconds, 10th percentile; or bytes, median
    denominator: float
    rounds: int
    goal: Optional[float] = None


def compare(group: str, name: str, setting: Setting, steps: Tuple[Step, Step], seconds: float, goal=None) -> Ratio:
    """Time two steps in short turns of at least 50 ms, so that what else the machine does meets both."""
    timers = [Timer('step()', globals={'step': step}, num_threads=torch.get_num_threads()) for step in steps]
    numbers = []
    for timer in timers:  # warms up too
        timer.timeit(2)
        numbers.append(max(1, round(0.05 / timer.timeit(1).median)))
    times: List[List[float]] = []
    start = time.perf_counter()
    while len(times) < 7 or time.perf_counter() - start < seconds:
        times.append([timer.timeit(n).median for timer, n in zip(timers, numbers)])
    quartiles = statistics.quantiles([a / b for a, b in times], n=4)
    numerator, denominator = (statistics.quantiles(t, n=10, method='inclusive')[0] for t in zip(*times))
    return Ratio(
        group, name, asdict(setting), numerator / denominator, (quartiles[0], quartiles[2]), numerator, denominator,
        len(times), goal)


def compare_memory(group: str, name: str, setting: Setting, models: Tuple[str, str], rounds: int = 2,
                   goal=None) -> Ratio:
    peaks = [[measure_in_process(setting, model) for model in models] for _ in range(rounds)]
    ratios = [a / b for a, b in peaks]
    numerator, denominator = (statistics.median(p) for p in zip(*peaks))
    return Ratio(
        group, name, asdict(setting), numerator / denominator, (min(ratios), max(ratios)), numerator, denominator,
        rounds, goal)


def measure_in_process(setting: Setting, model: str) -> int:
    command = [sys.executable, __file__, '--peak-memory-of', json.dumps([asdict(setting), model])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_memory(setting: Setting, model: str) -> int:
    """Bytes that a training step takes above what was held before. `model` may carry JSON arguments after a space."""
    name, _, kwargs = model.partition(' ')
    arguments = json.loads(kwargs or '{}')
    train_step(replace(setting, batch_size=2), name, **arguments)()  # what libraries take once is not counted
    step = train_step(setting, name, **arguments)
    if setting.device == 'cuda':
        step()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - held
    Path('/proc/self/clear_refs').write_text('5')  # the peak so far is forgotten
    held = resident('VmRSS')
    step()
    return resident('VmHWM') - held


def resident(key: str) -> int:
    """Resident memory of this process in bytes, now (VmRSS) or at its peak (VmHWM)."""
    status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    return int(status[key].split()[0]) * 1024


def template_matching(args: argparse.Namespace) -> Iterator[Ratio]:
    setting, single = Setting(args.device, args.batch_size), Setting(args.device, 1, 'float32')
    for name, baseline in PAIRS:
        label = f'{name} / {baseline}'
        yield compare('Template matching over its baseline, training step', label, setting,
                      (train_step(setting, name), train_step(setting, baseline)), args.seconds, 1.05)
        for s in (setting, single):
            yield compare('Template matching over its baseline, inference', label, s,
                          (inference(s, name), inference(s, baseline)), args.seconds, 1.03)
            yield compare('Template matching over its baseline, inference, both fused', label, s,
                          (inference(s, name, fused=True), inference(s, baseline, fused=True)), args.seconds, 1.03)


def fused(args: argparse.Namespace) -> Iterator[Ratio]:
    for setting in (Setting(args.device, args.batch_size), Setting(args.device, args.batch_size, 'float32'),
                    Setting(args.device, 1, 'float32')):
        for name in ('rn26_tm', 'wrn16_tm', 'dn100_tm'):
            yield compare('Fused over unfused, inference', name, setting,
                          (inference(setting, name, fused=True), inference(setting, name)), args.seconds)


def dense(args: argparse.Namespace) -> Iterator[Ratio]:
    for precision in PRECISIONS:
        for memory_format in FORMATS:
            setting = Setting(args.device, args.batch_size, precision, memory_format)
            group = "dn100 with memory_efficient=True over timm's DenseNet layers, training step"
            yield compare(group, 'time', setting,
                          (train_step(setting, 'dn100', memory_efficient=True), train_step(setting, 'timm')),
                          args.seconds, 0.9)
            yield compare_memory(group, 'peak memory', setting, ('dn100 {"memory_efficient": true}', 'timm'), goal=0.9)


def compiled(args: argparse.Namespace) -> Iterator[Ratio]:
    setting = Setting(args.device, args.batch_size)
    for name in ('rn26_tm', 'wrn16_tm'):
        yield compare('Eager over compiled', f'{name}, training step', setting,
                      (train_step(setting, name), train_step(setting, name, compiled=True)), args.seconds)
        yield compare('Eager over compiled', f'{name}, inference', setting,
                      (inference(setting, name), inference(setting, name, compiled=True)), args.seconds)


def maximizers(args: argparse.Namespace) -> Iterator[Ratio]:
    group = 'Maximizers in rn20, training step'
    setting = Setting(args.device, 32, 'float32', 'NCHW')  # the paper's batch size

    yield compare(group, 'softmax / bn_relu, time', setting,
                  (train_step(setting, 'rn20', maximizer='softmax'), train_step(setting, 'rn20')), args.seconds)


GROUPS = {f.__name__: f for f in (template_matching, fused, dense, maximizers, compiled)}


def render(result: Dict[str, Any]) -> str:
    """The result as Markdown."""
    machine, lines = result['machine'], []
    lines.append(
        f'`{result["command"]}` on {machine["hardware"]}; torch {machine["torch"]}, timm {machine["timm"]}, '
        f'timm-tmblock {machine["timm_tmblock"]}, Python {machine["python"]}. Images of 32×32. The two sides of '
        f'a ratio took turns; a time is the 10th percentile over the rounds, in brackets are the quartiles of the '
        f"rounds' own ratios (of memory, smallest and largest). Below 1 the first side is faster or smaller.")
    ratios = [Ratio(**r) for r in result['ratios']]
    groups = list(dict.fromkeys(r.group for r in ratios))
    group = None
    for ratio in sorted(ratios, key=lambda r: groups.index(r.group)):
        if ratio.group != group:
            group = ratio.group
            columns = ['', 'batch', 'precision', 'memory format', 'ratio', 'goal', 'first', 'second', 'rounds']
            lines += ['', f'## {group}', '', f'| {" | ".join(columns)} |', '|---' * len(columns) + '|']
        s, goal = ratio.setting, '' if ratio.goal is None else f'≤ {ratio.goal:.2f}'
        first, second = (
            f'{v / 2 ** 20:.0f} MiB' if 'memory' in ratio.name else f'{v * 1e3:.3g} ms' if v < 1 else f'{v:.2f} s'
            for v in (ratio.numerator, ratio.denominator))
        lines.append(
            f'| {ratio.name} | {s["batch_size"]} | {s["precision"]} | {s["memory_format"]} '
            f'| {ratio.ratio:.3f} [{ratio.quartiles[0]:.3f}, {ratio.quartiles[1]:.3f}] | {goal} | {first} | {second} '
            f'| {ratio.rounds} |')
    return '# Speed and memory\n\n' + '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--seconds', type=float, default=15., help='of measurement for each ratio of times')
    parser.add_argument('--only', nargs='+', choices=GROUPS, default=list(GROUPS))
    parser.add_argument('--output', type=Path, help='files to write, without their suffixes .json and .md')
    parser.add_argument('--peak-memory-of', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_memory_of:
        setting, model = json.loads(args.peak_memory_of)
        print(peak_memory(Setting(**setting), model))
        return
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise InputError('There is no CUDA device here; leave out --device.')
    result: Dict[str, Any] = dict(
        command=f'python benchmarks/speed.py {" ".join(sys.argv[1:])}'.strip(),
        machine=dict(hardware=describe_hardware(torch.device(args.device)), **describe_versions()),
        commit=find_commit(), ratios=[])
    for name in args.only:
        for ratio in GROUPS[name](args):
            print(f'{ratio.group}: {ratio.name}: {ratio.ratio:.3f}', file=sys.stderr, flush=True)
            result['ratios'].append(asdict(ratio))
            if args.output is not None:  # as far as it has come
                write_report(args.output, result, render(result))
            gc.collect()
        torch.compiler.reset()
    if args.output is None:
        print(render(result))


if __name__ == '__main__':
    with exiting_on_input_error():
        main()
