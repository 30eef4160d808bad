"""ONNX files that say how to use them, checked against PyTorch."""
import json
import logging
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import torch
import torch.nn as nn
from timm.data.model_config import resolve_input_data_config

import timm_tmblock
from timm_tmblock.checkpoint import writing
from timm_tmblock.errors import InputError
from timm_tmblock.layers import PerturbedMaximizer

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401  torch.onnx needs it
except ImportError as e:
    raise InputError(f'ONNX export needs {e.name}; pip install "timm-tmblock[export,ort]".') from e

METADATA_VERSION = '1'
BATCH_SIZES = (1, 2, 7)
TOLERANCE = 1e-4  # of the largest value of an output


class PatchLogits(nn.Module):
    """A network whose forward also returns the patch logits, in evaluation too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        return self.model.forward_patch_logits(x)


def export_onnx(model: nn.Module, path: Path, patch_logits: bool = False, opset: int = 18) -> Dict[str, float]:
    """Write a network as one ONNX file with a dynamic batch, float32.

    Inputs and outputs: `image` (batch, C, H, W), normalised; `logits` (batch, num_classes); with `patch_logits` also
    `patch_logits` (batch, num_templates, H/r, W/r). The file gets its name only once it gives what PyTorch gives.

    Args:
        model: Network in evaluation mode, with timm's pretrained_cfg.
        path: File to write.
        patch_logits: Add the class scores of each region as a second output.
        opset: ONNX operator set.

    Returns:
        For each output, the largest difference from PyTorch, relative to its largest value.

    Raises:
        InputError: If the network has no patch logits, the opset cannot be had, the file cannot be written, or its
            results differ.
    """
    if patch_logits and not getattr(model, 'has_template_matching', False):
        raise InputError(f'{type(model).__name__} has no template matching block; leave out --patch-logits.')
    for m in model.modules():
        if isinstance(m, PerturbedMaximizer):
            raise InputError(
                f'The model has perturbed maximizers, which draw {m.num_samples} random samples in each forward pass, '
                f'so no ONNX file can repeat its results; export a model with maximizer=softmax.')
    if path.is_dir():
        raise InputError(f'{path} is a folder; name the file to write.')
    names = ['logits', 'patch_logits'] if patch_logits else ['logits']
    module = PatchLogits(model).eval() if patch_logits else model
    config = resolve_input_data_config(model, pretrained_cfg=model.pretrained_cfg)
    proto = _trace(module, config['input_size'], names, opset)
    onnx.helper.set_model_props(proto, describe(model, config, patch_logits))
    onnx.checker.check_model(proto, full_check=True)
    with writing(path) as tmp:
        tmp.write_bytes(proto.SerializeToString(deterministic=True))
        differences = compare(tmp, module, config['input_size'], names)
        worst = max(differences, key=lambda name: differences[name])
        if not differences[worst] <= TOLERANCE:  # NaN fails too
            raise InputError(
                f'The exported {worst} differ from PyTorch by {differences[worst]:.2g} of their largest value; '
                f'no file was written.')
        tmp.replace(path)
    return differences


def _trace(module: nn.Module, input_size: Tuple[int, ...], names: List[str], opset: int) -> 'onnx.ModelProto':
    example = torch.randn(2, *input_size)  # torch.export takes a batch of 1 for a constant
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        opset_version=opset,
        input_names=['image'],
        output_names=names,
        dynamic_shapes=({0: torch.export.Dim('batch')},),
        external_data=False,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    actual = next(o.version for o in proto.opset_import if o.domain in ('', 'ai.onnx'))
    if actual != opset:
        raise InputError(f'torch.onnx cannot write opset {opset}, it wrote {actual}; use --opset {actual}.')
    graph = proto.graph  # its metadata holds stack traces with local paths
    for item in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ''
    for node in graph.node:
        node.doc_string = ''
    return proto


def describe(model: Any, config: Dict[str, Any], patch_logits: bool) -> Dict[str, str]:
    """Metadata that a user of the file alone needs. All values are strings, structured ones JSON.

    metadata_version: '1'
    model: name registered with timm
    class_names: list, in the order of the logits
    preprocessing: input_size (C, H, W), mean and std of pixels in [0, 1], interpolation, crop_pct
    patch_stride: pixels of the input between neighbouring patch logits, if the file has them
    timm_tmblock_version, torch_version
    """
    cfg = model.pretrained_cfg
    metadata = dict(
        metadata_version=METADATA_VERSION,
        model=str(cfg['architecture']),
        class_names=json.dumps(list(cfg.get('label_names') or map(str, range(model.num_classes)))),
        preprocessing=json.dumps({k: config[k] for k in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')}),
        timm_tmblock_version=timm_tmblock.__version__,
        torch_version=torch.__version__,
    )
    if patch_logits:
        metadata['patch_stride'] = str(model.patch_reduction)
    return metadata


def compare(path: Path, module: nn.Module, input_size: Tuple[int, ...], names: List[str]) -> Dict[str, float]:
    """Largest difference between ONNX Runtime and PyTorch over several batch sizes, for each output, relative."""
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=['CPUExecutionProvider'])
    differences = dict.fromkeys(names, 0.)
    generator = torch.Generator().manual_seed(0)
    for batch_size in BATCH_SIZES:
        x = torch.randn(batch_size, *input_size, generator=generator)
        with torch.inference_mode():
            expected = module(x)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for name, want, got in zip(names, expected, session.run(names, {'image': x.numpy()})):
            reference = want.double().numpy()
            difference = np.abs(got - reference).max() / np.abs(reference).max()
            differences[name] = float(np.maximum(differences[name], difference))  # keeps NaN
    return differences
