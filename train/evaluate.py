#!/usr/bin/env python3
"""Measure a classifier on a labelled set: accuracy, patch accuracy, calibration, confusions, throughput.

A pretrained model, weights of training, an ONNX file and a TensorRT engine are measured alike:

    python train/evaluate.py rn26_tm --dataset hfds/uoft-cs/cifar10 --input-key img
    python train/evaluate.py output/EXPERIMENT/best.safetensors --tta flip --output evaluation
    python train/evaluate.py rn26_tm.onnx --output evaluation

Prints the result as JSON; with --output also writes NAME.json, with the confusion matrix and which
images were right, and NAME.png.
"""
import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

if __package__ in (None, ''):  # run as a script: find the checkout, not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from tqdm import tqdm

from timm_tmblock.errors import InputError, exiting_on_input_error
from timm_tmblock.files import check_writable
from train.augment import DataConfig
from train.config import Parser, gigabytes, import_modules, not_negative, positive
from train.data import (
    add_data_options,
    adopt_classes,
    check_classes,
    decode,
    fits_in_memory,
    open_named,
    tell_other_names,
    tell_whole_folder,
)
from train.failure import naming_failures
from train.files import hash_file, save_figure, write_json
from train.hardware import describe_versions
from train.loader import InMemoryLoader, Loader, StreamingLoader
from train.metrics import Reliability, count_confusions, measure_accuracy, measure_reliability, softmax
from train.runner import Runner, create_runner

PRECISIONS = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def create_parser() -> Parser:
    parser = Parser(prog='evaluate.py', description='Evaluate a classifier on a labelled dataset.')
    parser.add_argument('model', help=(
        "name registered with timm, 'hf-hub:USER/NAME', 'local-dir:FOLDER', or a .safetensors, .onnx, .engine or .plan "
        'file'))
    parser.add_argument('--checkpoint', metavar='FILE', help='weights to load instead of the pretrained ones')
    parser.add_argument('--device-modules', nargs='+', metavar='MODULE', help=(
        'Python modules to import first, for models or devices that timm does not have'))
    add_data_options(parser)
    parser.add_argument('--memory-limit', type=gigabytes, default=4., help=(
        'load splits of up to this many GB (decoded) into memory'))
    parser.add_argument('--workers', type=not_negative, default=4, help='worker processes that decode images')
    parser.add_argument('--batch-size', type=positive, default=256, help='images per batch')
    parser.add_argument('--device', choices=['auto', 'cpu', 'cuda', 'mps'], default='auto')
    parser.add_argument('--precision', choices=PRECISIONS, default='float32', help='autocast precision in PyTorch')
    parser.add_argument('--tta', choices=['none', 'flip'], default='none', help=(
        "'flip': average over the image and its mirror image"))
    parser.add_argument('--bins', type=positive, default=15, help='bins of the calibration error')
    parser.add_argument('--output', metavar='NAME', help='write NAME.json and NAME.png')
    return parser


def create_loader(args: argparse.Namespace, runner: Runner) -> Loader:
    """The images of the split as the runner expects them.

    Raises:
        InputError: If the set cannot be opened, or its classes are not the runner's.
    """
    config = DataConfig.of(runner.config)
    dataset = open_named(args, args.split)
    tell_whole_folder(args, dataset)
    names = adopt_classes(dataset, runner.class_names or ())
    if runner.class_names:
        check_classes(args.model, runner.class_names, args.dataset, names)
        tell_other_names(args.model, runner.class_names, args.dataset, names)
    channels_last = runner.kind == 'PyTorch'
    if fits_in_memory(len(dataset), config, args.memory_limit):
        images = decode(dataset, config, num_workers=args.workers)
        return InMemoryLoader(images, config, args.batch_size, runner.device, channels_last=channels_last)
    return StreamingLoader(
        dataset, config, args.batch_size, runner.device, num_workers=args.workers, channels_last=channels_last)


def measure(runner: Runner, loader: Loader, flip: bool, bins: int) -> Dict[str, Any]:
    """Everything there is to say of a runner on a set: what `main` prints, and what it writes beside."""
    logits: List[np.ndarray] = []
    mirrored: List[np.ndarray] = []
    targets: List[np.ndarray] = []
    matched, regions, seconds, timed = 0, 0, 0., 0
    for batch, (images, labels) in enumerate(tqdm(loader.epoch(0), total=len(loader), unit='batch', leave=False)):
        start = time.perf_counter()
        output, patch_logits = runner(images)
        logits.append(output.cpu().numpy())  # waits for a GPU
        if batch > 0:  # the first one warms up
            seconds += time.perf_counter() - start
            timed += len(images)
        if patch_logits is not None and patch_logits.shape[1] == output.shape[1]:  # templates are the classes
            hits = patch_logits.argmax(1) == labels[:, None, None]
            matched, regions = matched + int(hits.sum()), regions + hits.numel()
        if flip:
            mirrored.append(runner(images.flip(3))[0].cpu().numpy())
        targets.append(labels.cpu().numpy())
    scores, classes = np.concatenate(logits), np.concatenate(targets)
    if classes.max() >= scores.shape[1]:
        raise InputError(f'The model has {scores.shape[1]} outputs and the set has a label {classes.max()}; name the '
                         f'set it was trained for with --dataset.')
    if not np.isfinite(scores).all():
        raise InputError('The model gives logits that are not finite; are these its weights? Try --precision '
                         'float32.')
    reliability = measure_reliability(softmax(scores), classes, bins)
    confusion = count_confusions(scores.argmax(1), classes, scores.shape[1])
    present = confusion.sum(axis=1) > 0
    recall = confusion.diagonal()[present] / confusion[present].sum(axis=1)
    values: Dict[str, Any] = dict(
        images=len(classes), **measure_accuracy(scores, classes), balanced_accuracy=100 * float(recall.mean()),
        ece=reliability.ece)
    if flip:
        both = (scores + np.concatenate(mirrored)) / 2
        values.update({f'flip_{k}': v for k, v in measure_accuracy(both, classes).items()})
    if regions:
        values['patch_accuracy'] = 100 * matched / regions
    if timed:
        values['images_per_second'] = round(timed / seconds, 1)
    return dict(
        values, reliability=reliability, confusion=confusion,
        answers=dict(  # two evaluations are compared by these, image by image
            right=np.packbits(scores.argmax(1) == classes).tobytes().hex(),
            targets_sha256=hashlib.sha256(classes.astype('<i8').tobytes()).hexdigest()))  # tells their orders apart


def draw(result: Dict[str, Any], reliability: Reliability, path: Path) -> None:
    """The confusion matrix and the reliability diagram, as a PNG."""
    from matplotlib.figure import Figure

    names, confusion = result['class_names'], np.array(result['confusion'])
    figure = Figure(figsize=(12, 5.4), layout='constrained')
    left, right = figure.subplots(1, 2)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    shown = left.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    figure.colorbar(shown, ax=left, label='share of the class', shrink=0.8)
    title = (f'{Path(result["model"]).name} on {Path(result["dataset"]).name} {result["split"]}: '
             f'top-1 {result["top1"]:.2f} %')
    left.set(xlabel='taken for', ylabel='class', title=title)
    if len(names) <= 20:
        left.set_xticks(range(len(names)), names, rotation=60, ha='right')
        left.set_yticks(range(len(names)), names)
        for i, j in np.argwhere(confusion > 0):
            color = 'white' if shares[i, j] > 0.5 else 'black'
            left.text(j, i, f'{confusion[i, j]}', ha='center', va='center', fontsize=7, color=color)
    edges = np.linspace(0, 1, len(reliability.counts) + 1)
    full = reliability.counts > 0
    right.bar(
        edges[:-1][full], reliability.accuracy[full], np.diff(edges)[full], align='edge', edgecolor='white',
        label='accuracy of the bin')
    right.plot([0, 1], [0, 1], 'k--', linewidth=1, label='calibrated')
    right.plot(
        reliability.confidence[full], reliability.accuracy[full], 'o', color='tab:orange', markersize=4,
        label='at its mean confidence')
    right.legend(loc='upper left')
    right.set(
        xlim=(0, 1), ylim=(0, 1), xlabel='confidence', ylabel='accuracy',
        title=f'calibration error {100 * result["ece"]:.2f} % ({len(edges) - 1} bins, {result["images"]} images)')
    save_figure(figure, path)


def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    """Measure as the flags say (the command line's if None) and return the result.

    Raises:
        InputError: For a model, a set or a device that cannot be used.
    """
    args = create_parser().parse_args(argv)
    import_modules(args.device_modules)
    runner = create_runner(args.model, args.checkpoint, args.device, PRECISIONS[args.precision])
    if args.precision != 'float32' and runner.kind != 'PyTorch':
        raise InputError(f'{args.model} has the precision it was exported with; leave out --precision.')
    with naming_failures(f'try a --batch-size below {args.batch_size}'):
        loader = create_loader(args, runner)
        if args.output:
            check_writable(Path(f'{args.output}.json'))
        values = measure(runner, loader, args.tta == 'flip', args.bins)
    reliability, confusion, answers = (values.pop(key) for key in ('reliability', 'confusion', 'answers'))
    result = dict(
        model=args.model,
        weights_sha256=hash_file(runner.weights),
        runtime=runner.kind,
        dataset=args.dataset,
        split=args.split,
        **values,
        batch_size=args.batch_size,
        precision=args.precision if runner.kind == 'PyTorch' else 'as exported',
        hardware=runner.hardware,
        versions=describe_versions(),
    )
    if args.output:
        names = runner.class_names or [str(i) for i in range(len(confusion))]
        full = dict(
            result, class_names=names, confusion=confusion.tolist(),
            reliability={k: v.tolist() for k, v in vars(reliability).items()},
            **answers)
        write_json(Path(f'{args.output}.json'), full)
        draw(full, reliability, Path(f'{args.output}.png'))
    return result


if __name__ == '__main__':
    with exiting_on_input_error():
        print(json.dumps(main()))
