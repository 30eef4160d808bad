"""Comparing a file that is there with the network it was exported from."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from timm.data.model_config import resolve_input_data_config

from export.emulation import TYPES
from export.images import Images
from export.metadata import describe_model, find_difference, load_metadata
from export.onnx import OnnxOptions, create_inputs, create_larger_input, create_reference, create_run
from export.parity import BATCH_SIZES, ParityError, check, check_batch
from export.runtime import load
from timm_tmblock.errors import InputError


def _batch_sizes(ranges: List[Tuple[int, int]]) -> Sequence[int]:
    """Those of BATCH_SIZES that lie in one of the ranges, or the closest that do."""
    def closest(size: int) -> int:
        return min((min(max(size, low), high) for low, high in ranges), key=lambda n: abs(n - size))
    return sorted(set(map(closest, BATCH_SIZES)))


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
    height = metadata['input']['shape'][1 if metadata['input']['layout'] == 'NHWC' else 2]
    options = OnnxOptions(
        precision=metadata['precision'],
        target=(metadata['quantization'] or {}).get('target', 'cpu'),
        patch_logits=len(metadata['outputs']) > 1,
        method=metadata['outputs'][-1].get('method', 'match'),
        softmax='probabilities' in metadata['outputs'][0]['meaning'],
        preprocessing=metadata['input']['layout'] if metadata['input']['range'] == 'pixels' else None,
        dynamic_size=isinstance(height, str),
    )
    engine = metadata.get('engine')
    not_for_cpus = options.precision in TYPES or options.target == 'tensorrt'
    if not engine and device == 'cpu' and not_for_cpus:
        import onnx
        run = create_run(onnx.load(path), options)
    else:
        run = load(path, 'auto' if engine else device).session.run
    prepare, random_input = create_inputs(config, options)
    precision = metadata['precision']
    if precision == 'fp32' and engine and engine['options']['tf32']:
        precision = 'fp16'  # as many bits of mantissa
    batch = metadata['input']['shape'][0]  # smallest and largest, of each profile of an engine
    ranges = [(low[0], high[0]) for low, _, high in engine['profiles']] if engine else [
        (batch, batch) if isinstance(batch, int) else (1, max(BATCH_SIZES))]
    reference, names = create_reference(model, config, options), options.output_names
    report, failure = check(
        run, reference, names, precision, images, prepare, random_input, _batch_sizes(ranges),
        accepts=lambda size: any(low <= size <= high for low, high in ranges))
    if options.dynamic_size and not engine and failure is None:  # an engine takes what its profiles say
        failure = check_batch(run, reference, names, precision, create_larger_input(config, options))
    return report, failure
