"""One interface to what can classify a batch: a PyTorch network, an ONNX file, a TensorRT engine."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Protocol, Tuple

import numpy as np
import torch
from timm.data.model_config import resolve_input_data_config

from export import runtime
from timm_tmblock.checkpoint import load_pretrained
from timm_tmblock.errors import InputError
from timm_tmblock.models._labels import list_class_names
from train.hardware import describe_hardware, resolve_device

Outputs = Tuple[torch.Tensor, Optional[torch.Tensor]]


class Runner(Protocol):
    """Logits (B, num_classes) and, where there are any, patch logits (B, num_templates, H/r, W/r), both float32."""
    kind: str
    weights: Optional[str]  # file they come from, if known
    config: Dict[str, Any]  # input_size, mean, std, interpolation, crop_pct, perhaps crop_mode
    class_names: List[str]  # empty if not known
    device: torch.device  # of the arrays that go in and come out
    hardware: str  # what computes

    def __call__(self, images: torch.Tensor) -> Outputs:
        """Classify normalised images (B, C, H, W) on the runner's device."""
        ...


def create_runner(source: str, checkpoint: Optional[str], device: str, dtype: torch.dtype) -> Runner:
    """The runner of a registered name, a weight file, an ONNX file, or a TensorRT engine.

    Args:
        source: Name registered with timm, 'hf-hub:' or 'local-dir:' name, or *.safetensors, *.onnx, *.engine, *.plan.
        checkpoint: Weights for a registered name; its pretrained ones if None.
        device: Where PyTorch and ONNX Runtime run, 'auto', 'cpu', 'cuda' or 'mps'; TensorRT is on the GPU always.
        dtype: Precision of autocast, for PyTorch alone.

    Raises:
        InputError: If there is no such model, it has no weights, or the library for it is missing.
    """
    suffix = Path(source).suffix
    if suffix in ('.onnx', *runtime.ENGINE_SUFFIXES, '.safetensors') and not Path(source).is_file():
        raise InputError(f'There is no file {source}.')
    if suffix in ('.onnx', *runtime.ENGINE_SUFFIXES):
        if checkpoint:
            raise InputError(f'{source} has weights of its own; leave out --checkpoint.')
        return ExportedRunner(Path(source), device)
    return TorchRunner(load_pretrained(source, checkpoint), resolve_device(device), dtype)


def find_weights(model: Any) -> Optional[str]:
    """The file that a network has its weights from, None if it is not known."""
    path = model.pretrained_cfg.get('file')
    return str(Path(path) / 'model.safetensors') if path and Path(path).is_dir() else path  # of local-dir:


class TorchRunner:
    """A PyTorch network, in evaluation mode."""
    kind = 'PyTorch'

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model.to(device).to(memory_format=torch.channels_last).eval()
        self.device = device
        self.hardware = describe_hardware(device)
        self.dtype = dtype
        torch.backends.cudnn.allow_tf32 = False  # float32 is what it says
        self.weights = find_weights(self.model)
        self.config = resolve_input_data_config(self.model, pretrained_cfg=self.model.pretrained_cfg)
        self.class_names = list_class_names(self.model.pretrained_cfg)
        self.has_patches = getattr(self.model, 'has_template_matching', hasattr(self.model, 'forward_patch_logits'))

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> Outputs:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if not self.has_patches:
                return self.model(images).float(), None
            logits, patch_logits = self.model.forward_patch_logits(images)
        return logits.float(), patch_logits.float()


class ExportedRunner:
    """An ONNX file or a TensorRT engine, through the runtime that deploys it."""

    def __init__(self, path: Path, device: str) -> None:
        on_gpu = path.suffix in runtime.ENGINE_SUFFIXES
        try:
            runner = runtime.load(path, 'auto' if on_gpu else 'cpu' if device == 'mps' else device)
        except runtime.RuntimeInputError as e:
            raise InputError(str(e)) from e
        metadata = runner.metadata
        self.runner = runner
        self.kind = 'TensorRT' if on_gpu else 'ONNX Runtime'
        self.weights: Optional[str] = str(path)
        self.config = dict(metadata['preprocessing'])
        self.pixels = metadata['input']['range'] == 'pixels'
        if self.pixels:  # the file normalises
            channels = self.config['input_size'][0]
            self.config.update(mean=[0.] * channels, std=[1.] * channels)
        self.layout = metadata['input']['layout']
        self.probabilities = 'probabilities' in metadata['outputs'][0]['meaning']
        # class activation maps take the place of patch logits and are none
        self.has_patches = len(metadata['outputs']) > 1 and metadata['outputs'][1].get('method', 'match') == 'match'
        self.class_names = metadata['class_names']
        self.device = torch.device('cpu')  # arrays go in and out through main memory
        gpu = runtime.query_gpu() if on_gpu or runner.session.provider != 'CPUExecutionProvider' else None
        self.hardware = f'1 x {gpu["name"]}' if gpu else describe_hardware(self.device)

    def __call__(self, images: torch.Tensor) -> Outputs:
        if self.pixels:
            images = (255 * images).round().to(torch.uint8)
        if self.layout == 'NHWC':
            images = images.permute(0, 2, 3, 1)
        try:
            outputs = [torch.from_numpy(y) for y in self.runner.run(np.ascontiguousarray(images.numpy()))]
        except runtime.RuntimeInputError as e:
            raise InputError(str(e)) from e
        if self.probabilities:
            outputs = [y.clamp_min(torch.finfo(y.dtype).tiny).log() for y in outputs]
        return outputs[0], outputs[1] if self.has_patches else None
