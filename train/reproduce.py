#!/usr/bin/env python3
"""Run the experiments of the paper and set their results beside its numbers.

    python train/reproduce.py table1 --datasets cifar10 cifar100 --seeds 0 1 2 --jobs 8
    python train/reproduce.py lambda                 # Figure 4: the weight of the patch loss
    python train/reproduce.py depth                  # section 4.1: two and three blocks a stage
    python train/reproduce.py maximizers             # Figure 3: soft maximizers in place of BN-ReLU

Each cell of an experiment is one run of train.py with a recipe of recipes/paper and one seed. `--jobs` cells run at
once, on one GPU or spread over several. What is finished is not run again, what was interrupted is taken up where it
stopped: the same command continues. Flags after -- go to every run:

    python train/reproduce.py table1 --rows rn26 rn26_tm --epochs 40 \
        --data cifar10=hfds/FOLDER/cifar10 -- --mixed-precision bf16       # a copy of the Hub's set

OUTPUT/EXPERIMENT/ holds a folder a cell with its result.json and log.txt, and the table and figure over all of them.
"""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any, Dict, List, Optional, Tuple

if __package__ in (None, ''):  # run as a script: find the checkout, not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from tqdm import tqdm

from timm_tmblock.errors import InputError, InterruptedWork, exiting_on_input_error
from timm_tmblock.files import write_text
from train.checkpoint import find_checkpoints
from train.config import Parser, positive
from train.config import create_parser as create_train_parser
from train.files import write_json
from train.paper import DATASETS, DEPTH, LAMBDAS, NUM_SAMPLES, TABLE_1
from train.signals import stopping_at_signals
from train.tables import TITLES, render

ROOT = Path(__file__).resolve().parent


NO_PROTOCOL = ('seed', 'checkpoint_interval', 'log_interval', 'workers', 'project', 'report_to')


@dataclass(frozen=True)
class Cell:
    """One run: a setting of an experiment, a set and a seed."""
    setting: str  # row of the table
    dataset: str
    seed: int
    recipe: str
    flags: Tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f'{self.setting}.{self.dataset}.seed{self.seed}'


def create_cells(experiment: str, args: argparse.Namespace) -> List[Cell]:
    """The cells of an experiment, seed by seed so that a table fills up evenly."""
    rows = [row for row in TABLE_1 if not args.rows or row in args.rows]
    settings: List[Tuple[str, str, Tuple[str, ...]]] = []  # name, recipe, flags
    if experiment == 'table1':
        settings = [(row, row, ()) for row in rows]
    elif experiment == 'depth':
        settings = [(row, row, ()) for row in DEPTH if row in rows]
    elif experiment == 'lambda':
        settings = [
            (f'lambda{weight:g}', 'rn26_tm', ('--patch-loss-weight', f'{weight:g}'))
            for weight in args.lambdas or LAMBDAS]
    else:
        for batch_size in (8, 32):
            for maximizer in ('bn_relu', 'softmax', 'perturbed'):
                if (maximizer, batch_size) == ('perturbed', 32) and not args.perturbed_32:
                    continue  # left out in the paper, too, for its demand of memory
                kwargs: Tuple[str, ...] = () if maximizer == 'bn_relu' else ('--model-kwargs', f'maximizer={maximizer}')
                name = maximizer
                if maximizer == 'perturbed' and args.num_samples != NUM_SAMPLES:
                    kwargs += (f'maximizer_kwargs={{"num_samples":{args.num_samples}}}',)
                    name += str(args.num_samples)  # a row of its own
                settings.append((
                    f'{name}.batch{batch_size}', 'rn26',
                    ('--model', 'rn20', '--batch-size', str(batch_size), *kwargs)))
    cells = [
        Cell(name, dataset, seed, f'{recipe}.{dataset}', tuple(
            f'{flag}.{dataset}' if flag == 'rn20' and dataset == 'mini_imagenet' else flag for flag in flags))
        for seed in args.seeds for dataset in args.datasets for name, recipe, flags in settings
    ]
    return list({cell.name: cell for cell in cells}.values())  # a seed or weight that is named twice is run once


def is_begun(path: Path) -> bool:
    """Whether something of a cell was trained, which a run with other settings would spoil."""
    return (path / 'cell.json').is_file() and (
        (path / 'result.json').is_file() or bool(find_checkpoints(path)))


def is_finished(path: Path) -> bool:
    """Whether a cell has its result: not only the one that train.py wrote, which nobody has labelled yet."""
    result = path / 'result.json'
    return result.is_file() and 'setting' in json.loads(result.read_text(encoding='utf-8'))


def _find_protocol(flags: str, dataset: str) -> Dict[str, Any]:
    """Settings that flags give, but for what does not change the result; of the set the name, wherever it or a copy is.

    Raises:
        InputError: For flags that train.py does not take.
    """
    parser = create_train_parser()
    unset = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))  # argparse keeps what a namespace has
    given = vars(parser.parse_args(shlex.split(flags.removeprefix('train.py ')), unset))
    given['dataset'] = Path(given['dataset'] or dataset).name
    return {k: v for k, v in given.items() if v is not None and k not in NO_PROTOCOL}


def check_flags(folder: Path, dataset: str, flags: List[str]) -> None:
    """Refuse to set runs beside others of the set that had other flags, as if they were of one protocol.

    Raises:
        InputError: If there are such runs.
    """
    wanted = _find_protocol(shlex.join(flags), dataset)
    for path in sorted(path.parent for path in folder.glob('*/cell.json') if is_begun(path.parent)):
        cell = json.loads((path / 'cell.json').read_text(encoding='utf-8'))
        if cell.get('data') == dataset and _find_protocol(cell['flags'], dataset) != wanted:
            raise InputError(
                f'{path} was begun with the flags "{cell["flags"]}", not "{shlex.join(flags)}"; all runs of a set '
                f'need the same flags to be compared, so choose another --output.')


def check_test_part(flags: List[str]) -> None:
    """
    Raises:
        InputError: If the flags leave no images to test on, of which the table is.
    """
    third = flags[flags.index('--pool') + 3:][:1] if '--pool' in flags else []
    if third and not third[0].strip('0.'):  # 0, 0.0, ...
        raise InputError('The table needs a test part, which --pool leaves empty; give it a third size above 0.')


def check_settings(cells: List[Cell], flags: List[str]) -> None:
    """
    Raises:
        InputError: If the flags set what tells the runs apart, or where they are.
    """
    own = {
        '-c', '--config', '--seed', '--output', '--experiment', '--resume', '--model', '--aux-head', '--no-aux-head',
        '--dataset', '--pretrained', '--initial-checkpoint', '--eval-only'}
    own.update(flag for cell in cells for flag in cell.flags if flag.startswith('--'))
    for action in create_train_parser()._actions:  # by all their names
        if own & set(action.option_strings):
            own.update(action.option_strings)
    short = tuple(flag for flag in own if not flag.startswith('--'))
    for flag in flags:
        if flag.partition('=')[0] in own or not flag.startswith('--') and flag.startswith(short):  # -b64, too
            raise InputError(
                f'{flag.partition("=")[0]} is set by the experiment, for each run its own; leave it out'
                f'{" and name the set with --data" if flag.startswith("--dataset") else ""}.')


def tell_cell(cell: Cell, flags: List[str]) -> str:
    """The command of a cell, as it is written down."""
    return shlex.join([
        'train.py', '-c', f'train/recipes/paper/{cell.recipe}.yaml', '--seed', str(cell.seed), *cell.flags, *flags])


def read_command(path: Path) -> str:
    """The command a cell's folder was begun with."""
    return json.loads((path / 'cell.json').read_text(encoding='utf-8'))['command']


def has_protocol(command: str, other: str, dataset: str) -> bool:
    """Whether two commands differ in nothing but the seed, or what does not change the result."""
    return _find_protocol(command, dataset) == _find_protocol(other, dataset)


def check_row(cell: Cell, folder: Path, flags: List[str]) -> None:
    """
    Raises:
        InputError: If a run of the same row, of this seed or another, was begun with other settings.
    """
    wanted = tell_cell(cell, flags)
    for path in filter(is_begun, sorted(folder.glob(f'{cell.setting}.{cell.dataset}.seed*'))):
        begun = read_command(path)
        if not has_protocol(begun, wanted, cell.dataset):
            raise InputError(f'{path} was begun as "{begun}", not as "{wanted}"; choose another --output.')


def run_cell(cell: Cell, folder: Path, flags: List[str], env: Dict[str, str], running: 'Processes') -> None:
    """Run a cell to its end, from where it stands.

    Raises:
        InputError: If the run fails.
    """
    path = folder / cell.name
    command = ['-c', str(ROOT / 'recipes' / 'paper' / f'{cell.recipe}.yaml'), '--seed', str(cell.seed), *cell.flags,
               *flags]
    wanted = tell_cell(cell, flags)
    if is_finished(path):
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f'Cannot write {path}: {e.strerror}; choose another --output.') from e
    twin = folder.parent / 'table1' / cell.name  # the rows of depth are rows of table1
    if not is_begun(path) and is_finished(twin) and has_protocol(read_command(twin), wanted, cell.dataset):
        for name in ('cell.json', 'result.json'):
            write_text(path / name, (twin / name).read_text(encoding='utf-8'))
        return
    write_json(path / 'cell.json', dict(command=wanted, data=cell.dataset, flags=shlex.join(flags)))
    where = ['--resume', str(path)] if find_checkpoints(path) else [
        '--output', str(folder), '--experiment', cell.name]
    with (path / 'log.txt').open('a', encoding='utf-8') as log:
        process = running.start(
            [sys.executable, str(ROOT / 'train.py'), '--report-to', 'none', *command, *where], stderr=log,
            env={**os.environ, **env})
        output = process.communicate()[0]
        errors = (path / 'log.txt').read_text(encoding='utf-8', errors='replace').strip().splitlines() or ['no output']
        log.write(output)
    if process.returncode:
        raise InputError(f'{cell.name} failed, see {path}/log.txt: {errors[-1]}')
    result = json.loads(output.splitlines()[-1])
    write_json(path / 'result.json', dict(
        command=wanted, setting=cell.setting, data=cell.dataset, **{k: v for k, v in result.items() if k != 'weights'}))


class Processes:
    """The runs in progress, which end with this one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stopped = False
        self.processes: List[subprocess.Popen] = []

    def start(self, command: List[str], **kwargs: Any) -> subprocess.Popen:
        with self.lock:
            if self.stopped:
                raise InputError('Interrupted; the same command continues.')
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **kwargs)
            self.processes.append(process)
            return process

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()


def run_cells(cells: List[Cell], folder: Path, flags: Dict[str, List[str]], jobs: int) -> List[str]:
    """Run cells with the flags of their set, `jobs` at once, and return what failed."""
    jobs = max(1, min(jobs, sum(not is_finished(folder / cell.name) for cell in cells)))
    visible = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
    gpus = [visible[i] if i < len(visible) and visible[i] else str(i) for i in range(torch.cuda.device_count())]
    share: Dict[str, str] = {} if 'OMP_NUM_THREADS' in os.environ else {
        'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 1) // jobs))}  # with more they wait for each other
    running, failures = Processes(), []
    with stopping_at_signals() as asked, ThreadPoolExecutor(jobs) as pool:
        slots: Queue[Dict[str, str]] = Queue()
        for i in range(jobs):
            slots.put({**share, 'CUDA_VISIBLE_DEVICES': gpus[i % len(gpus)]} if gpus else share)

        def run(cell: Cell) -> None:
            env = slots.get()
            try:
                run_cell(cell, folder, flags[cell.dataset], env, running)
            finally:
                slots.put(env)

        futures = [pool.submit(run, cell) for cell in cells]
        try:
            with tqdm(total=len(cells), desc=folder.name, unit='run') as bar:
                for future in futures:
                    try:
                        future.result()
                    except InputError as e:
                        failures.append(str(e))
                    bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            running.stop()
            raise InterruptedWork(
                'Interrupted; the same command continues.', signal.SIGTERM if asked() else signal.SIGINT) from None
    return failures


def create_parser() -> Parser:
    parser = Parser(prog='reproduce.py', description='Run the experiments of the paper.')
    parser.add_argument('experiment', choices=TITLES)
    parser.add_argument('--datasets', nargs='+', choices=DATASETS, default=['cifar10'])
    parser.add_argument('--data', nargs='+', default=[], metavar='SET=NAME', help=(
        'where a dataset is, as for --dataset of train.py: cifar10=hfds/folder'))
    parser.add_argument('--rows', nargs='+', choices=TABLE_1, metavar='ROW', help=(
        f'rows of table1 and depth (default: all): {", ".join(TABLE_1)}'))
    parser.add_argument('--lambdas', nargs='+', type=float, help=f'default: {" ".join(map(str, LAMBDAS))}')
    parser.add_argument('--perturbed-32', action='store_true', help=(
        'train the perturbed maximizer in batches of 32, too'))
    parser.add_argument('--num-samples', type=positive, default=NUM_SAMPLES, help=(
        f'samples of the perturbed maximizer (default: {NUM_SAMPLES}, as in the paper)'))
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--epochs', type=positive, help="default: the recipe's")
    parser.add_argument('--jobs', type=positive, default=1, help='number of runs at a time')
    parser.add_argument('--output', default='output/reproduce')
    return parser


def main(argv: Optional[List[str]] = None) -> Path:
    """Run an experiment and return the path of its table.

    Raises:
        InputError: For settings that cannot be used, and at the end for each run that failed.
    """
    argv = sys.argv[1:] if argv is None else argv
    own, extra = (argv[:argv.index('--')], argv[argv.index('--') + 1:]) if '--' in argv else (argv, [])
    args = create_parser().parse_args(own)
    sources = dict(item.partition('=')[::2] for item in args.data)
    unknown = sorted(set(sources) - set(DATASETS))
    if unknown or not all(sources.values()):
        raise InputError(f'--data takes SET=NAME with a set of {", ".join(DATASETS)}.')
    for flag, given, experiment in (
            ('--lambdas', args.lambdas is not None, 'lambda'), ('--perturbed-32', args.perturbed_32, 'maximizers'),
            ('--num-samples', args.num_samples != NUM_SAMPLES, 'maximizers')):
        if given and args.experiment != experiment:
            raise InputError(f'{flag} only applies to {experiment}; leave it out of {args.experiment}.')
    known = dict(table1=TABLE_1, depth=DEPTH).get(args.experiment, ())
    if unknown := [row for row in args.rows or () if row not in known]:
        advice = f'--rows takes {", ".join(known)}' if known else 'leave out --rows'
        raise InputError(f'{args.experiment} has no row {unknown[0]}; {advice}.')
    folder = Path(args.output) / args.experiment
    check_test_part(extra)
    flags = [*(['--epochs', str(args.epochs)] if args.epochs else []), *extra]
    cells = create_cells(args.experiment, args)
    check_settings(cells, extra)
    flags_of = {  # sets differ in where they are
        dataset: [*(['--dataset', sources[dataset]] if dataset in sources else []), *flags]
        for dataset in dict.fromkeys(args.datasets)}
    for dataset, its_flags in flags_of.items():
        check_flags(folder, dataset, its_flags)
    for cell in cells:
        check_row(cell, folder, flags_of[cell.dataset])
    failures = run_cells(cells, folder, flags_of, args.jobs)
    path = render(args.experiment, folder)
    if failures:
        raise InputError(' '.join(failures) + f' What is finished is in {path}.')
    return path


if __name__ == '__main__':
    with exiting_on_input_error():
        print(main().read_text(encoding='utf-8'))
