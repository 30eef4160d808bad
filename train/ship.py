#!/usr/bin/env python3
"""Make the weights of a finished run those that come with the package for a tag.

    python train/ship.py output/EXPERIMENT --tag cifar10 --dataset hfds/uoft-cs/cifar10 --input-key img

Measures the run's weights on the test split in float32 and rounded to float16, and writes

    timm_tmblock/weights/MODEL.TAG.safetensors    float16 where that changes top-1 by at most 0.02 points, else float32
    timm_tmblock/weights/index.json               sha256, accuracy and source of every such file
    train/results/MODEL.TAG/                      settings, result and summary of the run, evaluation.json and .png

Analyses and pictures in that folder are removed, as they were of the weights before. The set has to be named, as the
sample is too small.

The tag itself is a line of `default_cfgs` beside the model; the tests say what it lacks.
"""
import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

if __package__ in (None, ''):  # run as a script: find the checkout, not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import yaml
from safetensors.torch import load_file

from export.images import name_set
from timm_tmblock.checkpoint import read_description, save_weights
from timm_tmblock.errors import InputError, exiting_on_input_error
from timm_tmblock.files import remove, writing
from train import evaluate
from train.config import SETTINGS, Parser
from train.data import add_data_options, open_named, share_images, to_set_flags
from train.files import hash_file, write_json
from train.lineage import is_of

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / 'timm_tmblock' / 'weights'
RESULTS = ROOT / 'train' / 'results'
TOLERANCE = 0.02  # points of top-1 that float16 may cost
RECORDS = (SETTINGS, 'result.json', 'summary.csv')
EXECUTION = ('memory_efficient',)  # arguments of networks that change how they run, not what they are


def create_parser() -> Parser:
    parser = Parser(prog='ship.py', description='Make the weights of a run those of a pretrained tag.')
    parser.add_argument('run', type=Path, help='experiment folder of a finished run of train.py')
    parser.add_argument('--tag', required=True, help='tag of the weights: cifar10, cifar100, ...')
    add_data_options(parser)
    return parser


def find_own_arguments(weights: Path) -> List[str]:
    """Arguments that make the network another one than its name does."""
    return [name for name in read_description(weights).get('model_args') or {} if name not in EXECUTION]


def choose_precision(top1: Dict[str, float]) -> str:
    """'float16' where its accuracy (%) is that of 'float32' within the tolerance, else 'float32'."""
    if 'float16' not in top1:  # which cannot hold the weights
        return 'float32'
    return 'float16' if abs(top1['float16'] - top1['float32']) <= TOLERANCE + 1e-9 else 'float32'


def is_of_images_in(args: argparse.Namespace, splits: List[str]) -> bool:
    """Whether the split to measure on has images of one of these, of the same set."""
    tested = open_named(args, args.split)
    return any(share_images(tested, open_named(args, name)) for name in splits)


def copy(source: Path, target: Path) -> None:
    with writing(target) as tmp:
        shutil.copyfile(source, tmp)
        os.replace(tmp, target)


def round_weights(path: Path, target: Path) -> bool:
    """Write weights in float16, integers as they are, and tell whether it can hold them all."""
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
    save_weights(target, tensors, read_description(path))
    return all(bool(v.isfinite().all()) for v in tensors.values())


@dataclass
class Run:
    """A finished run whose weights may be shipped."""
    name: str  # of the weights, MODEL.TAG
    model: str
    weights: Path
    result: Dict[str, Any]


def read_run(args: argparse.Namespace) -> Run:
    """The run that the flags name.

    Raises:
        InputError: If it is not finished, saw images of the split, or its weights are not of a network by name.
    """
    if args.dataset == 'sample':
        raise InputError('The accuracy of a tag is that on a whole set; name it with --dataset.')
    missing = [name for name in RECORDS if not (args.run / name).is_file()]
    if missing:
        raise InputError(f'{args.run} has no {missing[0]}; give the folder of a run that has finished.')
    result = json.loads((args.run / 'result.json').read_text(encoding='utf-8'))
    settings = yaml.safe_load((args.run / SETTINGS).read_text(encoding='utf-8'))
    seen = [name for name in (settings['train_split'], settings.get('val_split')) if name]
    same_set = Path(settings['dataset']).name == Path(args.dataset).name
    if settings.get('pool') or args.split in seen or (same_set and is_of_images_in(args, seen)):
        raise InputError(f'{args.run} was trained or chosen on images of the split {args.split!r}; name another.')
    weights = args.run / ('best.safetensors' if result['best'] else 'last.safetensors')
    model = read_description(weights)['model']
    name = f'{model.partition(".")[0]}.{args.tag}'
    arguments = find_own_arguments(weights)
    if arguments:
        raise InputError(
            f'{args.run} trained {model} with {", ".join(arguments)} of its own; the tag would be another network, as '
            f'timm creates it without; ship a run without them.')
    results = RESULTS / name
    start, before = settings.get('initial_checkpoint'), results / SETTINGS
    recorded = yaml.safe_load(before.read_text(encoding='utf-8')) if before.is_file() else settings
    if start and recorded != settings and is_of(start, name, recorded):
        earlier = f'{name.partition(".")[0]}_24_epochs.{args.tag}'
        raise InputError(
            f'{results} records the run that {args.run} continues; rename it first, as {earlier} for example, and '
            f'let initial_checkpoint in {args.run / SETTINGS} name the weights by its experiment, so that the record '
            f'stays.')
    return Run(name, model, weights, result)


def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    """Ship as the flags say (the command line's if None) and return the entry of the index.

    Raises:
        InputError: If the run is not finished, or its weights or the set cannot be used.
    """
    args = create_parser().parse_args(argv)
    run = read_run(args)
    target, results = WEIGHTS / f'{run.name}.safetensors', RESULTS / run.name
    with tempfile.TemporaryDirectory() as folder:
        files = dict(float32=run.weights, float16=Path(folder) / 'rounded.safetensors')
        if not round_weights(run.weights, files['float16']):
            del files['float16']
        evaluations = {
            dtype: evaluate.main([
                run.model, '--checkpoint', str(path), *to_set_flags(args), '--split', args.split, '--tta', 'flip',
                '--output', f'{folder}/{dtype}']) for dtype, path in files.items()}
        top1 = {dtype: evaluation['top1'] for dtype, evaluation in evaluations.items()}
        dtype = choose_precision(top1)
        copy(files[dtype], target)
        for suffix in ('.json', '.png'):
            copy(Path(folder, f'{dtype}{suffix}'), results / f'evaluation{suffix}')
    for other in (results / 'analysis', results / 'explained.png'):
        remove(other)  # they were of the weights before
    for record in (SETTINGS, 'summary.csv'):
        copy(args.run / record, results / record)
    write_json(results / 'result.json', {k: v for k, v in run.result.items() if k != 'weights'})
    entry = dict(
        sha256=hash_file(target), bytes=target.stat().st_size, dtype=dtype, top1=round(top1[dtype], 4),
        top1_by_dtype={k: round(v, 4) for k, v in top1.items()}, images=evaluations[dtype]['images'],
        dataset=name_set(args.dataset), source=results.relative_to(ROOT).as_posix())
    index = WEIGHTS / 'index.json'
    entries = json.loads(index.read_text(encoding='utf-8')) if index.is_file() else {}
    write_json(index, dict(sorted({**entries, run.name: entry}.items())))
    return entry


if __name__ == '__main__':
    with exiting_on_input_error():
        print(json.dumps(main()))
