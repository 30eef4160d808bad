#!/usr/bin/env python3
"""What other runtimes make of exported ONNX files, beside ONNX Runtime.

    pip install openvino opencv-python-headless onnx2torch
    python export/other_runtimes.py rn26_tm.onnx rn26_tm.int8.onnx --output others    # others.json, others.md

On the images of the sample in train/sample/images, at once and one by one, by those runtimes that are installed.
"""
import argparse
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch

if __package__ in (None, ''):  # run as a script: find the checkout, not this folder's onnx.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from export.runtime import load
from timm_tmblock.errors import InputError, exiting_on_input_error, first_line
from train.files import write_report
from train.hardware import describe_hardware

ROOT = Path(__file__).resolve().parent
IMAGES = ROOT.parent / 'train' / 'sample' / 'images'

Run = Callable[[np.ndarray], List[np.ndarray]]


def open_openvino(path: str, names: List[str], **settings: str) -> Run:
    import openvino

    compiled = openvino.Core().compile_model(path, 'CPU', settings)
    return lambda x: [compiled(x)[name] for name in names]


def open_openvino_float32(path: str, names: List[str]) -> Run:
    return open_openvino(path, names, INFERENCE_PRECISION_HINT='f32')


def open_opencv(path: str, names: List[str]) -> Run:
    import cv2

    network = cv2.dnn.readNetFromONNX(path)

    def run(x: np.ndarray) -> List[np.ndarray]:
        network.setInput(x)
        return list(network.forward(names))

    return run


def open_onnx2torch(path: str, names: List[str]) -> Run:
    import onnx
    import onnx2torch

    network = onnx2torch.convert(onnx.load(path)).eval()

    def run(x: np.ndarray) -> List[np.ndarray]:
        with torch.inference_mode():
            outputs = network(torch.from_numpy(x))
        return [y.numpy() for y in (outputs if isinstance(outputs, (list, tuple)) else [outputs])]

    return run


def open_reference(path: str, names: List[str]) -> Run:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(path)
    return lambda x: evaluator.run(names, {'image': x})


# module whose version is told, and how a file is opened
RUNTIMES: Dict[str, Tuple[str, Callable[[str, List[str]], Run]]] = {
    'OpenVINO': ('openvino', open_openvino),
    'OpenVINO for float32': ('openvino', open_openvino_float32),
    'OpenCV DNN': ('cv2', open_opencv),
    'onnx2torch': ('onnx2torch', open_onnx2torch),
    'onnx.reference': ('onnx', open_reference),
}


def compare(path: Path) -> Iterator[Dict[str, Any]]:
    """One row for each runtime that is installed."""
    runner = load(path, 'cpu')
    names = [output['name'] for output in runner.metadata['outputs']]
    images = runner.to_input(np.stack([runner.prepare(image)[1] for image in sorted(IMAGES.glob('*.png'))]))
    expected = runner.run(images)
    for name, (module, opener) in RUNTIMES.items():
        version = find_version(module)
        if version is None:
            continue
        row: Dict[str, Any] = dict(file=path.name, runtime=f'{name} {version}')
        try:
            run = opener(str(path), names)
            found = [run(images), [np.concatenate(parts) for parts in zip(*(run(x[None]) for x in images))]]
        except Exception as e:  # each has errors of its own
            yield dict(row, error=first_line(e))
            continue
        for i, output in enumerate(names):
            worst = max(found, key=lambda outputs: np.abs(outputs[i] - expected[i]).max())[i]
            row[output] = dict(
                max_relative_difference=float(np.abs(worst - expected[i]).max() / np.abs(expected[i]).max()),
                same_class=float((worst.argmax(1) == expected[i].argmax(1)).mean()))
        yield row


def find_version(module: str) -> Optional[str]:
    """Of the package that has a module, None where none is installed."""
    packages = metadata.packages_distributions().get(module, [module])  # Python 3.10 does not know all of them
    try:
        return metadata.version(packages[0])
    except metadata.PackageNotFoundError:
        return None


def render(rows: List[Dict[str, Any]], versions: str) -> str:
    count = len(list(IMAGES.glob('*.png')))
    lines = [
        'What other runtimes make of exported files: the largest difference from ONNX Runtime on '
        f'{count} images of the',
        'sample, relative to the largest value, and how many images or regions have the same class. Written by',
        f'`export/other_runtimes.py` with {versions}. "For float32": with INFERENCE_PRECISION_HINT f32.', '',
        '| file | runtime | class scores | same class | patch scores | same class |', '|---|---|---|---|---|---|']
    for row in rows:
        cells = [
            f'{value["max_relative_difference"]:.1e} | {100 * value["same_class"]:.0f} %'
            for value in row.values() if isinstance(value, dict)]
        cells += ['– | –'] * (2 - len(cells)) if 'error' not in row else [f'refused: {row["error"]} | | |']
        lines.append(f'| {row["file"]} | {row["runtime"]} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description='Compare other runtimes with ONNX Runtime.')
    parser.add_argument('files', nargs='+', type=Path, help='*.onnx of python -m export')
    parser.add_argument('--output', metavar='NAME', help='write NAME.json and NAME.md')
    args = parser.parse_args()
    for path in args.files:
        if not path.is_file():
            raise InputError(f'There is no file {path}.')
    rows = [row for path in args.files for row in compare(path)]
    versions = f'onnxruntime {find_version("onnxruntime")} on {describe_hardware(torch.device("cpu"))}'
    table = render(rows, versions)
    print(table)
    if args.output:
        write_report(args.output, dict(versions=versions, rows=rows), table)


if __name__ == '__main__':
    with exiting_on_input_error():
        main()
