#!/usr/bin/env python3
"""What deploying a network gains over running it in PyTorch, as ratios, and the rates of all networks with weights, all
measured side by side in one run.

    python benchmarks/deployment.py --output benchmarks/results/deployment_cpu

Files are of untrained networks, calibrated on noise: speed does not depend on the weights. Timing is that of
`python -m export bench`: contestants take turns of a quarter second. A ratio is of the medians.
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List

if __package__ in (None, ''):  # run as a script: find the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import timm
from PIL import Image
from tqdm import tqdm

import timm_tmblock  # noqa: F401  registers the models
from export.bench import Contestant, describe_machine, measure, open_file, open_torch
from export.images import Images
from export.onnx import OnnxOptions, create_onnx, serialize
from export.runtime import load
from timm_tmblock.errors import exiting_on_input_error
from train.files import write_report

BATCH_SIZES = (1, 16, 64)
NETWORKS = {  # precisions of their files
    'rn26': ('fp32', 'int8'), 'rn26_tm': ('fp32', 'int8'), 'rn38_tm': ('fp32', 'int8'), 'wrn16_tm': ('fp32', 'int8'),
    'dn100': ('fp32',), 'dn100_tm': ('fp32',), 'dn100_tm_cat': ('fp32',)}
LOADING = '''
import re, sys, time
start = time.perf_counter()
sys.path.insert(0, sys.argv[1])
import runtime
runner = runtime.load(sys.argv[2], 'cpu')
seconds = time.perf_counter() - start
print(seconds, int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1e3)
'''


def export_file(model_name: str, precision: str, folder: Path, patch_logits: bool = False) -> Path:
    model = timm.create_model(model_name).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8)
    proto, metadata = create_onnx(
        model, OnnxOptions(precision, patch_logits=patch_logits), Images(pixels, pixels, None, 'noise'))
    path = folder / f'{model_name}.{precision}{".patches" if patch_logits else ""}.onnx'
    path.write_bytes(serialize(proto, metadata))
    return path


def export_files(folder: Path) -> Dict[str, Path]:
    """By name in the table: as they are pushed, with patch logits, those of rn26_tm without them too."""
    files = {}
    for name, precisions in NETWORKS.items():
        for precision in precisions:
            for patch_logits in (False, True) if name == 'rn26_tm' else ('_tm' in name,):
                key = f'{name} {precision}{", patch logits" if patch_logits else ""}'
                files[key] = export_file(name, precision, folder, patch_logits)
    return files


def measure_networks(files: Dict[str, Path], seconds: float) -> List[Dict[str, Any]]:
    contestants = [replace(open_torch('rn26_tm', True, 'cpu', 'fp32'), name='rn26_tm compiled')]
    for name in NETWORKS:
        contestants += [
            replace(open_torch(name, False, 'cpu', 'fp32', prepared=False), name=f'{name} eager'),
            replace(open_torch(name, False, 'cpu', 'fp32'), name=f'{name} eager, prepared')]
    contestants += [replace(open_file(path, 'cpu'), name=name) for name, path in files.items()]
    return measure(contestants, BATCH_SIZES, seconds)


def measure_runner(path: Path, folder: Path, seconds: float) -> List[Dict[str, Any]]:
    """The runner from PNG files against its session on arrays that are ready, 256 images in batches of 64."""
    paths = []
    rng = np.random.default_rng(0)
    for i in range(256):
        paths.append(folder / f'{i}.png')
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(paths[-1])
    runner = load(path, 'cpu')
    batches = [rng.standard_normal((64, 3, 32, 32), dtype=np.float32) for _ in range(4)]

    def run_session(_: np.ndarray) -> None:
        for batch in batches:
            runner.session.run(batch)

    nothing = np.zeros(0)
    contestants = [
        Contestant('session', run_session, lambda n: nothing),
        Contestant('runner', lambda _: runner(paths, 64), lambda n: nothing),
    ]
    return measure(contestants, [256], seconds)


def measure_loading(path: Path, runs: int = 7) -> Dict[str, float]:
    """Seconds and peak memory of a fresh process that imports the runtime and loads a file."""
    results = []
    module = Path(__file__).resolve().parent.parent / 'export'
    for _ in range(runs):
        run = subprocess.run(
            [sys.executable, '-c', LOADING, module, path], check=True, capture_output=True, text=True)
        results.append([float(x) for x in run.stdout.split()])
    seconds, megabytes = (statistics.median(column) for column in zip(*results))
    return dict(seconds=round(seconds, 3), megabytes=round(megabytes, 1))


def find_ratios(rows: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    ratios = []
    for label, fast, slow, goal in (
            ('ONNX Runtime fp32 over PyTorch eager, as created', 'rn26_tm fp32', 'rn26_tm eager', '≥ 2'),
            ('the same, norms folded and in channels_last', 'rn26_tm fp32', 'rn26_tm eager, prepared', ''),
            ('ONNX Runtime fp32 over torch.compile', 'rn26_tm fp32', 'rn26_tm compiled', '≥ 1.1'),
            ('ONNX Runtime int8 over fp32', 'rn26_tm int8', 'rn26_tm fp32', '≥ 2.5'),
            ('the same, with patch logits', 'rn26_tm int8, patch logits', 'rn26_tm fp32, patch logits', ''),
            ('time of rn26_tm over that of rn26, fp32', 'rn26 fp32', 'rn26_tm fp32', '≤ 1.03'),
            ('the runner from files over its session, fp32', 'runner', 'session', '≥ 0.8'),
    ):
        values = {}
        for size in dict.fromkeys(row['batch_size'] for row in rows):
            rate = {row['name']: row['images_per_second'] for row in rows if row['batch_size'] == size}
            if fast in rate and slow in rate:
                values[str(size)] = round(rate[fast] / rate[slow], 3)
        ratios.append(dict(ratio=label, goal=goal, by_batch_size=values))
    return ratios


def to_markdown(result: Dict[str, Any]) -> str:
    versions = ', '.join(f'{k} {v}' for k, v in result['versions'].items())
    lines = [
        f'`{result["command"]}`', '', f'{result["hardware"]}; {versions}; {result["seconds"]:.0f} s', '',
        '| ratio of images per second | goal | by batch size |', '|---|---|---|']
    for ratio in result['ratios']:
        values = ', '.join(f'{size}: {value:.2f}' for size, value in ratio['by_batch_size'].items())
        lines.append(f'| {ratio["ratio"]} | {ratio["goal"]} | {values} |')
    loading = result['loading']
    lines += [
        '', f'A fresh process imports the runtime and loads the fp32 file in {loading["seconds"]:.2f} s (goal < 1) '
        f'with {loading["megabytes"]:.0f} MB (goal < 150).', '',
        '| | batch | p10 ms | p50 ms | p90 ms | images/s |', '|---|---|---|---|---|---|']
    for row in result['rows']:
        times = ' | '.join(f'{row["latency_ms"][p]:.3g}' for p in ('p10', 'p50', 'p90'))
        lines.append(f'| {row["name"]} | {row["batch_size"]} | {times} | {row["images_per_second"]:.0f} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seconds', type=float, default=90., help='for each batch size')
    parser.add_argument('--output', metavar='NAME', help='write NAME.json and NAME.md')
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, tqdm(total=3, disable=None) as bar:
        folder = Path(name)
        files = export_files(folder)
        loading = measure_loading(files['rn26_tm fp32'])
        bar.update()
        rows = measure_runner(files['rn26_tm fp32'], folder, args.seconds)
        bar.update()
        rows = measure_networks(files, args.seconds) + rows
        bar.update()
    result = dict(
        command='python benchmarks/deployment.py ' + ' '.join(sys.argv[1:]),
        **describe_machine(),
        seconds=time.perf_counter() - start,
        ratios=find_ratios(rows),
        loading=loading,
        rows=rows,
    )
    table = to_markdown(result)
    print(table)
    if args.output:
        write_report(args.output, result, table)


if __name__ == '__main__':
    with exiting_on_input_error():
        main()
