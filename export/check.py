"""Comparing a file that is there with the network it was exported from."""
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

from timm.data.model_config import resolve_input_data_config

from export.emulation import TYPES
from export.images import Images
from export.metadata import describe_model, find_difference, load_metadata
from export.onnx import OnnxOptions, compare, create_run
from export.parity import ANY_BATCH, ParityError, Run
from export.runtime import load
from timm_tmblock.errors import InputError


def check_file(
        path: Path, model: Any, images: Images, device: str = 'cpu') -> Tuple[Dict[str, Any], Optional[ParityError]]:
    """Compare an ONNX file, or an engine on the GPU, with PyTorch.

    Args:
        path: File of the project.
        model: Network it was exported from, in evaluation mode.
        images: Their held-out part is compared.
        device: Where ONNX Runtime runs a file, 'cpu' or 'cuda'.

    Returns:
        The report of `export.parity`, and what the file fails in, if it does.

    Raises:
        InputError: If the file is of other weights, or has other class names or preprocessing.
        RuntimeInputError: If it cannot run here.
    """
    metadata = load_metadata(path)
    config = resolve_input_data_config(model, pretrained_cfg=model.pretrained_cfg)
    different = find_difference(describe_model(model, config), metadata)
    if different == 'weights':
        raise InputError(
            f'{path} was exported from {metadata["model"]} with other weights; name those with --checkpoint.')
    if different:
        raise InputError(f'{path} was exported with other {different} than the model has now; export it again.')
    engine = metadata.get('engine')
    options = _read_options(metadata)
    precision = options.precision
    if precision == 'fp32' and engine and engine['options']['tf32']:
        precision = 'fp16'  # as many bits of mantissa
    batch = metadata['input']['shape'][0]  # another tool may have fixed it
    ranges: Sequence[Tuple[int, int]] = ((batch, batch),) if isinstance(batch, int) else ANY_BATCH
    if engine:  # takes what its profiles say
        ranges = [(low[0], high[0]) for low, _, high in engine['profiles']]
        options = replace(options, dynamic_size=False)
    return compare(_create_run(path, options, bool(engine), device), model, options, images, precision, ranges)


def _read_options(metadata: Dict[str, Any]) -> OnnxOptions:
    """How a file was exported."""
    height = metadata['input']['shape'][1 if metadata['input']['layout'] == 'NHWC' else 2]
    return OnnxOptions(
        precision=metadata['precision'],
        target=(metadata['quantization'] or {}).get('target', 'cpu'),
        patch_logits=len(metadata['outputs']) > 1,
        method=metadata['outputs'][-1].get('method', 'match'),
        softmax='probabilities' in metadata['outputs'][0]['meaning'],
        preprocessing=metadata['input']['layout'] if metadata['input']['range'] == 'pixels' else None,
        dynamic_size=isinstance(height, str),
    )


def _create_run(path: Path, options: OnnxOptions, is_engine: bool, device: str) -> Run:
    """What runs the file; on a CPU, one that is not for CPUs as where it is for."""
    not_for_cpus = options.precision in TYPES or options.target == 'tensorrt'
    if not is_engine and device == 'cpu' and not_for_cpus:
        import onnx
        return create_run(onnx.load(path), options)
    return load(path, 'auto' if is_engine else device).session.run
