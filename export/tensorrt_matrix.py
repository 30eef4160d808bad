#!/usr/bin/env python3
"""Build an engine of every kind of file of every network, with the TensorRT that is installed.

    python export/tensorrt_matrix.py                 # writes export/results/tensorrt_matrix.json and .md
    python export/tensorrt_matrix.py --cover         # a part that has every value of every column once

Networks are untrained, as what a builder takes does not depend on their weights. TensorRT-RTX builds without a GPU.
"""
import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Dict, Iterator, List

if __package__ in (None, ''):  # run as a script: find the checkout, not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import onnx
import timm
import torch
from tqdm import tqdm

import timm_tmblock  # noqa: F401  registers the models
from export.images import Images
from export.metadata import PRECISIONS
from export.onnx import OnnxOptions, create_onnx, serialize
from export.runtime import RuntimeInputError, import_tensorrt
from export.tensorrt import EngineOptions, build_engine
from timm_tmblock.errors import InputError, exiting_on_input_error
from train.files import write_report

MODELS = (
    'rn20', 'rn20_tm', 'rn26', 'rn26_tm', 'rn38', 'rn38_tm', 'wrn16', 'wrn16_tm', 'dn100', 'dn100_tm', 'dn100_tm_cat')
SIZES = (32, 84)
BATCHES = {'fixed': (8, 8, 8), 'dynamic': (1, 16, 64)}
RESULT = Path(__file__).resolve().parent / 'results' / 'tensorrt_matrix'


@dataclass(frozen=True)
class Cell:
    """One engine."""
    model: str
    patches: bool
    size: int
    precision: str
    batch: str  # of BATCHES


def iterate_cells() -> Iterator[Cell]:
    """Every engine there is."""
    for model, size, patches, precision, batch in product(MODELS, SIZES, (False, True), PRECISIONS, BATCHES):
        if '_tm' in model or not patches:
            yield Cell(model, patches, size, precision, batch)


def cover() -> List[Cell]:
    """One engine of every model with and without patch scores, so that every other value has its turn too."""
    kinds = [(model, patches) for model in MODELS[::-1] for patches in (False, True) if '_tm' in model or not patches]
    others = [(precision, size, batch) for size, batch in zip(SIZES, BATCHES) for precision in PRECISIONS]
    others += [(precision, size, batch) for size, batch in zip(SIZES, reversed(BATCHES)) for precision in PRECISIONS]
    return [
        Cell(model, patches, size, precision, batch)
        for (model, patches), (precision, size, batch) in zip(kinds, others + others)]


def build(cell: Cell, folder: Path, cache: Dict[Cell, Path]) -> Dict[str, Any]:
    """Export and build one cell.

    Args:
        cell: What to build.
        folder: For the files.
        cache: ONNX files of cells that differ in nothing but the batch.
    """
    key = replace(cell, batch='')
    path = cache.get(key)
    if path is None:
        cache.clear()
        torch.manual_seed(0)
        model = timm.create_model(cell.model, img_size=cell.size).eval()
        options = OnnxOptions(cell.precision, 'tensorrt', patch_logits=cell.patches)
        pixels = np.random.default_rng(0).integers(0, 256, (16, 3, cell.size, cell.size), dtype=np.uint8)
        proto, metadata = create_onnx(model, options, Images(pixels, pixels, None, 'noise'))
        path = cache[key] = folder / 'network.onnx'
        path.write_bytes(serialize(proto, metadata))
    engine = folder / 'network.engine'
    build_engine(path, engine, EngineOptions(batches=(BATCHES[cell.batch],)))
    return dict(megabytes=round(engine.stat().st_size / 1e6, 2))


def run(cells: List[Cell]) -> List[Dict[str, Any]]:
    """Build cells, with what came of each."""
    rows = []
    cache: Dict[Cell, Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        for cell in tqdm(cells, unit='engine', disable=None):
            try:
                rows.append(dict(asdict(cell), **build(cell, Path(folder), cache)))
            except (InputError, RuntimeInputError) as e:
                rows.append(dict(asdict(cell), error=str(e)))
    return rows


def to_markdown(version: str, rows: List[Dict[str, Any]]) -> str:
    """A row for each network, with and without patch scores, at each size."""
    failed = [row for row in rows if 'error' in row]
    columns = list(product(PRECISIONS, BATCHES))
    lines = [
        f'ONNX files that {version} parsed and built an engine of: {len(rows) - len(failed)} of {len(rows)}. No engine '
        f'was run. The table has the size of each in MB. '
        f'Written by `python export/tensorrt_matrix.py`; torch {torch.__version__}, onnx {onnx.__version__}.', '',
        '| network | patch scores | image | ' + ' | '.join(f'{p} {b}' for p, b in columns) + ' |',
        '|---|---|---|' + '---|' * len(columns)]
    for model, patches, size in dict.fromkeys((r['model'], r['patches'], r['size']) for r in rows):
        own = {
            (r['precision'], r['batch']): 'FAILED' if 'error' in r else f'{r["megabytes"]:.1f}'
            for r in rows if (r['model'], r['patches'], r['size']) == (model, patches, size)}
        cells = [own.get(c, '') for c in columns]
        lines.append(f'| `{model}` | {"yes" if patches else "no"} | {size}×{size} | ' + ' | '.join(cells) + ' |')
    lines += ['', *(f'- {row["model"]} {row["precision"]} {row["size"]}: {row["error"]}' for row in failed)]
    return '\n'.join(lines).rstrip() + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cover', action='store_true', help='a part of it, printed alone')
    args = parser.parse_args()
    trt = import_tensorrt()
    version = f'{trt.__name__} {trt.__version__}'
    rows = run(cover() if args.cover else list(iterate_cells()))
    table = to_markdown(version, rows)
    print(table)
    if not args.cover:
        write_report(RESULT, dict(version=version, rows=rows), table)
    sys.exit(any('error' in row for row in rows))


if __name__ == '__main__':
    with exiting_on_input_error(RuntimeInputError):
        main()
