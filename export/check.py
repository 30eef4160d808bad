"""Comparing a file that is there with the network it was exported from."""
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from timm.data.model_config import resolve_input_data_config

from export.images import Images
from export.metadata import hash_weights, load_metadata
from export.onnx import OnnxOptions, create_inputs, create_reference, create_run
from export.parity import ParityError, check
from export.runtime import ENGINE_SUFFIXES, RuntimeInputError, load
from timm_tmblock.errors import InputError


def check_file(path: Path, model: Any, images: Images) -> Tuple[Dict[str, Any], Optional[ParityError]]:
    """Compare an ONNX file on the CPU, or an engine on the GPU, with PyTorch.

    Args:
        path: File of the project.
        model: Network it was exported from, in evaluation mode.
        images: Their held-out part is compared.

    Returns:
        The report of `export.parity`, and what the file fails in, if it does.

    Raises:
        InputError: If the file is of other weights or cannot run here.
    """
    metadata = load_metadata(path)
    if metadata['weights_sha256'] != hash_weights(model):
        raise InputError(
            f'{path} was exported from {metadata["model"]} with other weights; name those with --checkpoint.')
    options = OnnxOptions(
        precision=metadata['precision'],
        patch_logits=len(metadata['outputs']) > 1,
        softmax='probabilities' in metadata['outputs'][0]['meaning'],
        preprocessing=metadata['input']['layout'] if metadata['input']['range'] == 'pixels' else None,
    )
    try:
        if path.suffix in ENGINE_SUFFIXES:
            run = load(path).session.run
        else:
            import onnx
            run = create_run(onnx.load(path), options)
        config = resolve_input_data_config(model, pretrained_cfg=model.pretrained_cfg)
        prepare, random_input = create_inputs(config, options)
        return check(
            run, create_reference(model, config, options), options.output_names, options.precision, images, prepare,
            random_input)
    except RuntimeInputError as e:
        raise InputError(str(e)) from e
