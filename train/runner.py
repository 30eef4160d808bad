"""One face for what can classify a batch: a PyTorch network, an ONNX file, a TensorRT engine."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Protocol, Tuple

import numpy as np
import timm
import torch
from timm.data.model_config import resolve_input_data_config

import timm_tmblock  # noqa: F401  registers the models
from timm_tmblock.checkpoint import load_model
from timm_tmblock.errors import InputError

Outputs = Tuple[torch.Tensor, Optional[torch.Tensor]]


class Runner(Protocol):
    """Logits (B, num_classes) and, where there are any, patch logits (B, num_templates, H/r, W/r), both float32."""
    kind: str
    weights: Optional[str]  # file they come from, if known
    config: Dict[str, Any]  # input_size, mean, std, interpolation, crop_pct
    class_names: List[str]  # empty if not known
    device: torch.device

    def __call__(self, images: torch.Tensor) -> Outputs:
        """Classify normalised images (B, C, H, W) on the runner's device."""
        ...


def create_runner(source: str, checkpoint: Optional[str], device: torch.device, dtype: torch.dtype) -> Runner:
    """The runner of a registered name, a weight file, an ONNX file, or a TensorRT engine.

    Args:
        source: Name registered with timm, 'hf-hub:' or 'local-dir:' name, or *.safetensors, *.onnx, *.engine, *.plan.
        checkpoint: Weights for a registered name; its pretrained ones if None.
        device: Where PyTorch runs; ONNX Runtime and TensorRT choose by themselves.
        dtype: Precision of autocast, for PyTorch alone.

    Raises:
        InputError: If there is no such model, it has no weights, or the library for it is missing.
    """
    suffix = Path(source).suffix
    if suffix in ('.onnx', '.engine', '.plan', '.safetensors') and not Path(source).is_file():
        raise InputError(f'There is no file {source}.')
    if suffix == '.onnx':
        return OnnxRunner(Path(source), device)
    if suffix in ('.engine', '.plan'):
        return TensorRTRunner(Path(source))
    if suffix == '.safetensors' or checkpoint:
        model = load_model(checkpoint, source) if checkpoint else load_model(source)
        return TorchRunner(model, device, dtype)
    try:
        return TorchRunner(timm.create_model(source, pretrained=True), device, dtype)
    except (RuntimeError, ValueError, OSError) as e:
        reason = str(e).strip().split('\n')[0]
        raise InputError(f'{source} is no model with weights ({reason}); name weights with --checkpoint.') from e


class TorchRunner:
    """A PyTorch network, in evaluation mode."""
    kind = 'PyTorch'

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model.to(device).to(memory_format=torch.channels_last).eval()
        self.device = device
        self.dtype = dtype
        self.weights = self.model.pretrained_cfg.get('file')
        self.config = resolve_input_data_config(self.model, pretrained_cfg=self.model.pretrained_cfg)
        self.class_names = list(self.model.pretrained_cfg.get('label_names') or ())
        self.has_patches = getattr(self.model, 'has_template_matching', False)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> Outputs:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if not self.has_patches:
                return self.model(images).float(), None
            logits, patch_logits = self.model.forward_patch_logits(images)
        return logits.float(), patch_logits.float()


def _read_metadata(metadata: Dict[str, Any], path: Path) -> Tuple[Dict[str, Any], List[str]]:
    try:
        return json.loads(metadata['preprocessing']), json.loads(metadata['class_names'])
    except (KeyError, ValueError, TypeError) as e:
        raise InputError(f'{path} lacks the metadata that python -m export writes ({e}).') from e


class OnnxRunner:
    """An ONNX file in ONNX Runtime, on CUDA where `device` and the installation have it."""
    kind = 'ONNX Runtime'

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            import onnxruntime
        except ImportError as e:
            raise InputError('ONNX files need ONNX Runtime; pip install "timm-tmblock[ort]".') from e
        provider = 'CUDAExecutionProvider' if device.type == 'cuda' else 'CPUExecutionProvider'
        if provider not in onnxruntime.get_available_providers():
            raise InputError(f'ONNX Runtime has no {provider} here; install onnxruntime-gpu, or use --device cpu.')
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=[provider])
        except Exception as e:  # onnxruntime's errors share no public base class
            raise InputError(f'{path} is no ONNX file that ONNX Runtime can load ({str(e).splitlines()[0]}).') from e
        self.config, self.class_names = _read_metadata(self.session.get_modelmeta().custom_metadata_map, path)
        self.weights: Optional[str] = str(path)
        self.input = self.session.get_inputs()[0].name
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.device = torch.device('cpu')  # arrays go in and out through main memory

    def __call__(self, images: torch.Tensor) -> Outputs:
        values = self.session.run(self.outputs, {self.input: np.ascontiguousarray(images.numpy())})
        named = {name: torch.from_numpy(value).float() for name, value in zip(self.outputs, values)}
        return named['logits'], named.get('patch_logits')


class TensorRTRunner:
    """A TensorRT engine with the JSON file that lies beside it, FILE.json, as metadata."""
    kind = 'TensorRT'

    def __init__(self, path: Path) -> None:
        try:
            import tensorrt as trt
        except ImportError as e:
            raise InputError('Engines need TensorRT; pip install "timm-tmblock[tensorrt]".') from e
        if not torch.cuda.is_available():
            raise InputError('TensorRT engines run on NVIDIA GPUs, and there is none here.')
        sidecar = path.with_suffix(path.suffix + '.json')
        if not sidecar.is_file():
            raise InputError(f'There is no {sidecar}, which says what the engine expects and tells apart.')
        self.config, self.class_names = _read_metadata(json.loads(sidecar.read_text()), path)
        self.weights: Optional[str] = str(path)
        self.logger = trt.Logger(trt.Logger.ERROR)
        self.engine = trt.Runtime(self.logger).deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise InputError(f'{path} was built by another version of TensorRT or for another GPU; build it again.')
        self.context = self.engine.create_execution_context()
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.input = next(n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT)
        self.outputs = [n for n in names if n != self.input]
        self.dtypes = {n: _TORCH_DTYPES[self.engine.get_tensor_dtype(n).name] for n in names}
        self.device = torch.device('cuda')

    def __call__(self, images: torch.Tensor) -> Outputs:
        x = images.to(self.dtypes[self.input]).contiguous()
        self.context.set_input_shape(self.input, tuple(x.shape))
        self.context.set_tensor_address(self.input, x.data_ptr())
        named = {}
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            named[name] = torch.empty(shape, dtype=self.dtypes[name], device=self.device)
            self.context.set_tensor_address(name, named[name].data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise InputError(f'TensorRT refused a batch of {len(x)}; does the engine have a profile for it?')
        patch_logits = named.get('patch_logits')
        return named['logits'].float(), None if patch_logits is None else patch_logits.float()


_TORCH_DTYPES = {'FLOAT': torch.float32, 'HALF': torch.float16, 'BF16': torch.bfloat16}
