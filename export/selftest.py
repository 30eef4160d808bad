"""Export, build, compare and time on this machine: what a user can run on a GPU the project never saw."""
import tempfile
from pathlib import Path
from typing import Any, Dict, List

from export.bench import describe_machine, measure, open_file
from export.check import check_file
from export.images import Images
from export.metadata import PRECISIONS
from export.onnx import OnnxOptions, export_onnx
from export.runtime import NotInstalledError, RuntimeInputError, import_onnxruntime, query_gpu
from export.tensorrt import EngineOptions, build_engine
from timm_tmblock.errors import InputError

BATCH_SIZES = (1, 64)


def run_steps(model: Any, images: Images, backend: str, seconds: float) -> Dict[str, Any]:
    """Take a network through every precision: ONNX Runtime on the CPU and, where it can, the GPU, and TensorRT where it
    is installed.

    Args:
        model: Network with trained weights, in evaluation mode.
        images: For calibration and comparison.
        backend: Of TensorRT.
        seconds: For timing each file.

    Returns:
        gpu, hardware, versions and commit, and rows: file, step ('ONNX Runtime', 'ONNX Runtime CUDA', 'TensorRT'),
        result ('passed', 'compared', 'built, not run', 'failed', 'not available'), reason, agreement with PyTorch, and
        images per second by batch size.
    """
    patches = getattr(model, 'has_template_matching', False)
    rows: List[Dict[str, Any]] = []
    try:
        gpu = query_gpu()
    except RuntimeInputError as e:  # the driver does not start; the CPU can be reported all the same
        gpu = None
        rows.append(dict(file='–', step='driver', result='failed', reason=str(e)))
    has_cuda = gpu is not None and 'CUDAExecutionProvider' in import_onnxruntime().get_available_providers()
    with tempfile.TemporaryDirectory() as name:
        for precision in PRECISIONS:
            for target in ('cpu', 'tensorrt') if precision == 'int8' else ('cpu',):
                options = OnnxOptions(precision, target, patch_logits=patches)
                label = f'{precision} for {target}' if precision == 'int8' else precision
                path = Path(name) / f'{label.replace(" ", "-")}.onnx'
                rows.append(_test_onnx(path, label, model, options, images, seconds))
                if path.is_file() and precision in ('fp32', 'fp16') and has_cuda:
                    row = dict(file=label, step='ONNX Runtime CUDA', result='passed')
                    rows.append(_compare(row, path, model, images, 'cuda', seconds))
                if path.is_file() and not (precision, target) == ('int8', 'cpu'):
                    rows.append(_test_engine(path, label, model, images, backend, seconds))
    return dict(gpu=gpu, **describe_machine(), rows=rows)


def _test_onnx(
        path: Path, label: str, model: Any, options: OnnxOptions, images: Images, seconds: float) -> Dict[str, Any]:
    row: Dict[str, Any] = dict(file=label, step='ONNX Runtime', result='passed')
    try:
        parity = export_onnx(model, path, options, images)['parity']
        row['same_class'] = next(iter(parity['outputs'].values()))['same_class']
        if options.precision == 'bf16':
            row.update(result='compared', reason='ONNX Runtime has no bf16 on the CPU; each result was rounded instead')
        else:
            row['images_per_second'] = _time(path, 'cpu', seconds)
    except (InputError, RuntimeInputError) as e:
        row.update(result='failed', reason=str(e))
    return row


def _compare(
        row: Dict[str, Any], path: Path, model: Any, images: Images, device: str, seconds: float) -> Dict[str, Any]:
    try:
        report, failure = check_file(path, model, images, device)
        row['same_class'] = next(iter(report['outputs'].values()))['same_class']
        if failure is not None:
            raise failure
        return dict(row, images_per_second=_time(path, device, seconds))
    except (InputError, RuntimeInputError) as e:
        return dict(row, result='failed', reason=str(e))


def _test_engine(
        path: Path, label: str, model: Any, images: Images, backend: str, seconds: float) -> Dict[str, Any]:
    row: Dict[str, Any] = dict(file=label, step='TensorRT', result='passed')
    engine = path.with_suffix('.engine')
    try:
        built = build_engine(path, engine, EngineOptions(backend=backend, batches=((1, 64, 64),)))['engine']
        row.update(version=f'{built["backend"]} {built["version"]}', build_seconds=built['build_seconds'])
    except NotInstalledError as e:
        return dict(row, result='not available', reason=str(e))
    except (InputError, RuntimeInputError) as e:
        return dict(row, result='failed', reason=str(e))
    if query_gpu() is None:
        return dict(row, result='built, not run', reason='there is no NVIDIA GPU')
    return _compare(row, engine, model, images, 'auto', seconds)


def _time(path: Path, device: str, seconds: float) -> Dict[str, float]:
    rows = measure([open_file(path, device)], BATCH_SIZES, seconds / len(BATCH_SIZES))
    return {str(row['batch_size']): round(row['images_per_second'], 1) for row in rows}


def to_markdown(report: Dict[str, Any], command: str) -> str:
    """The report as a page one can paste."""
    gpu = report['gpu']
    place = 'No GPU'
    if gpu:
        place = f'{gpu["name"]}, compute capability {gpu["compute_capability"]}, CUDA {gpu["cuda_driver"]}'
    versions = ', '.join(f'{k} {v}' for k, v in report['versions'].items())
    lines = [
        f'`{command}`', '',
        f'{place}; {report["hardware"]}; {versions}', '',
        '| file | run by | result | same class as PyTorch | images/s, batch 1 | batch 64 | |',
        '|---|---|---|---|---|---|---|']
    for row in report['rows']:
        rates = row.get('images_per_second', {})
        same = f'{100 * row["same_class"]:.2f} %' if 'same_class' in row else ''
        lines.append(
            f'| {row["file"]} | {row.get("version") or row["step"]} | {row["result"]} | {same} | '
            f'{rates.get("1", "")} | {rates.get("64", "")} | {row.get("reason", "")} |')
    return '\n'.join(lines) + '\n'
