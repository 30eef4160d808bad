"""ONNX files that say how to use them, checked against PyTorch."""
import logging
import warnings
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from timm.data.model_config import resolve_input_data_config

from export.images import Images
from export.metadata import describe_model, replace_with_sidecar, to_properties
from export.network import ExportedNetwork, fold, forward_scores
from export.runtime import RuntimeInputError, import_onnxruntime
from timm_tmblock import __version__
from timm_tmblock.errors import InputError
from timm_tmblock.explanation import has_class_activation
from timm_tmblock.files import check_writable, writing

try:
    import onnx
    import onnxscript
    onnxruntime = import_onnxruntime()
except ImportError as e:
    raise InputError(f'ONNX export needs {e.name}; pip install -e ".[export]" in the checkout.') from e
except RuntimeInputError as e:
    raise InputError(str(e)) from e

from export.emulation import TYPES, emulate
from export.parity import ANY_BATCH, ParityError, Run, check, check_batch, choose_batch_sizes
from export.quantize import METHOD, quantize

OPSETS = (18, 25)
BF16_OPSET = 22  # the first with convolutions in bf16
DEFAULT_OPSET = 18  # ONNX Runtime quantizes and runs on CUDA best what is no newer
_TORCH_DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16}


@dataclass(frozen=True)
class OnnxOptions:
    """Which ONNX file to write."""
    precision: str = 'fp32'  # of PRECISIONS; inputs and outputs are float32 (or uint8 pixels) all the same
    target: str = 'cpu'  # of int8: 'cpu' or 'tensorrt', which need different files
    patch_logits: bool = False  # add the class scores of each region
    method: str = 'match'  # of timm_tmblock.explanation.METHODS: what those are
    softmax: bool = False  # probabilities instead of scores
    preprocessing: Optional[str] = None  # 'NHWC' or 'NCHW': take uint8 pixels so laid out, normalise inside
    dynamic_size: bool = False  # height and width may vary too
    opset: Optional[int] = None  # DEFAULT_OPSET if None, for bf16 BF16_OPSET

    @property
    def resolved_opset(self) -> int:
        default = BF16_OPSET if self.precision == 'bf16' else DEFAULT_OPSET
        return default if self.opset is None else self.opset

    @property
    def patch_method(self) -> Optional[str]:
        return self.method if self.patch_logits else None

    @property
    def output_names(self) -> List[str]:
        kind = 'probabilities' if self.softmax else 'logits'
        return [kind, f'patch_{kind}'] if self.patch_logits else [kind]

    def validate(self, model: nn.Module) -> None:
        """
        Raises:
            InputError: If they contradict each other or the model.
        """
        name = type(model).__name__
        if self.patch_method == 'match' and not getattr(model, 'has_template_matching', False):
            raise InputError(f'{name} has no template matching block; leave out --patch-logits, or add --method cam.')
        if self.patch_method == 'cam' and not has_class_activation(model):
            raise InputError(f'{name} does not end in average pooling and a linear classifier; leave out --method cam.')
        if self.method != 'match' and not self.patch_logits:
            raise InputError('--method only applies with --patch-logits; add it.')
        if not OPSETS[0] <= self.resolved_opset <= OPSETS[1]:
            raise InputError(
                f'--opset must be {OPSETS[0]} to {OPSETS[1]}: torch.onnx writes no older, TensorRT reads no newer.')
        if self.precision == 'bf16' and self.resolved_opset < BF16_OPSET:
            raise InputError(f'ONNX has convolutions in bf16 from opset {BF16_OPSET} on; leave out --opset.')
        if self.precision == 'int8' and self.resolved_opset > 20:
            raise InputError('ONNX Runtime quantizes opsets up to 20; leave out --opset.')


def export_onnx(model: Any, path: Path, options: OnnxOptions, images: Images) -> Dict[str, Any]:
    """Write a network as one ONNX file with a dynamic batch, and its metadata beside it as FILE.json.

    Input: `image` (batch, C, H, W), float32, normalised; or uint8 pixels. Outputs: `logits` (batch, num_classes) and,
    if asked for, `patch_logits` (batch, num_templates, H/r, W/r), or as many as classes by the method 'cam'; called
    `probabilities` and `patch_probabilities` after a softmax. A file that does not give what PyTorch gives is kept as
    NAME.failed.onnx.

    Args:
        model: Network in evaluation mode, with timm's pretrained_cfg.
        path: File to write.
        options: Which file.
        images: Images for calibration and check.

    Returns:
        The metadata, see export/runtime.py, with the parity report.

    Raises:
        InputError: If the options do not fit the network, torch.onnx lacks the opset, or the file cannot be written.
        ParityError: If its results differ from PyTorch's.
    """
    if path.is_dir():
        raise InputError(f'{path} is a folder; name the file to write.')
    if path.suffix != '.onnx':
        raise InputError(f'{path} must end in .onnx.')
    check_writable(path)
    proto, metadata = create_onnx(model, options, images)
    metadata['parity'], failure = compare(create_run(proto, options), model, options, images)
    if failure is not None:
        metadata['parity']['failed'] = str(failure)
    with writing(path, unique=True) as tmp:
        tmp.write_bytes(serialize(proto, metadata))
        if failure is not None:
            replace_with_sidecar(tmp, name_failed(path), metadata)
            raise failure
        replace_with_sidecar(tmp, path, metadata)
    return metadata


def compare(
        run: Run,
        model: Any,
        options: OnnxOptions,
        images: Images,
        precision: Optional[str] = None,
        ranges: Sequence[Tuple[int, int]] = ANY_BATCH,
) -> Tuple[Dict[str, Any], Optional[ParityError]]:
    """Compare a file with the network it was exported from, and one of dynamic size at another size too.

    Args:
        run: The file: input to outputs.
        model: The network.
        options: How it was exported.
        images: Their held-out part is compared.
        precision: Key of LIMITS; the options' if None.
        ranges: Smallest and largest batch that the file takes.

    Returns:
        The report of `export.parity`, and what the file fails in, if it does.
    """
    config = resolve_input_data_config(model, pretrained_cfg=model.pretrained_cfg)
    prepare, random_input = create_inputs(config, options)
    reference, names = create_reference(model, config, options), options.output_names
    precision = precision or options.precision
    report, failure = check(run, reference, names, precision, images, prepare, random_input, ranges)
    if options.dynamic_size and failure is None:
        batch_size = choose_batch_sizes(ranges)[:2][-1]  # more than one, as results of one can hide a mixed-up batch
        failure = check_batch(run, reference, names, precision, create_larger_input(config, options, batch_size))
    return report, failure


def name_failed(path: Path) -> Path:
    """Where a file is kept that does not give what PyTorch gives."""
    return path.with_name(f'{path.stem}.failed.onnx')


def create_onnx(model: Any, options: OnnxOptions, images: Images) -> Tuple['onnx.ModelProto', Dict[str, Any]]:
    """The ONNX model and its metadata but for the parity report; nothing is written.

    Raises:
        InputError: If the options do not go with the network, there are no images to calibrate on, or torch.onnx
            cannot write the opset.
    """
    options.validate(model)
    if options.precision == 'int8' and not len(images.calibration):
        raise InputError('int8 needs calibration images; name a set with --dataset and --calibration-split.')
    config = resolve_input_data_config(model, pretrained_cfg=model.pretrained_cfg)
    network = ExportedNetwork(
        fold(
            model, options.resolved_opset, options.patch_method == 'match',
            norms_as_convolutions=options.precision == 'int8' and options.target == 'cpu'),
        config,
        patch_method=options.patch_method,
        softmax=options.softmax,
        preprocessing=options.preprocessing,
        dtype=_TORCH_DTYPES.get(options.precision, torch.float32),
    ).eval()
    prepare, random_input = create_inputs(config, options)
    proto = _trace(network, random_input(2), options)
    quantization = None
    if options.precision == 'int8':
        proto, kept = quantize(proto, options.target, images.calibration, prepare)
        quantization = dict(
            target=options.target, method=METHOD, images=len(images.calibration), images_of=images.calibration_source,
            float_nodes=kept)
    # not PyTorch's: OpenCV takes averages that it wrote to count the padding, which those of ONNX do not
    proto.producer_name, proto.producer_version = 'timm-tmblock', __version__
    # no newer than the operators need, as older runtimes refuse what PyTorch writes
    proto.ir_version = min(proto.ir_version, onnx.helper.find_min_ir_version_for(proto.opset_import))
    onnx.checker.check_model(proto, full_check=True)
    return proto, _describe(model, config, options, proto, quantization)


def serialize(proto: 'onnx.ModelProto', metadata: Dict[str, Any]) -> bytes:
    """The file, with metadata as its properties."""
    onnx.helper.set_model_props(proto, to_properties(metadata))
    return proto.SerializeToString(deterministic=True)


def create_inputs(
        config: Dict[str, Any],
        options: OnnxOptions,
) -> Tuple[Callable[[np.ndarray], np.ndarray], Callable[[int], np.ndarray]]:
    """Functions that make inputs for the file: of uint8 images (B, C, H, W), and so many random ones."""
    mean, std = (np.array(config[k]).reshape(-1, 1, 1) for k in ('mean', 'std'))

    def prepare(pixels: np.ndarray) -> np.ndarray:
        if options.preprocessing == 'NHWC':
            return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        return pixels if options.preprocessing else ((pixels / 255. - mean) / std).astype(np.float32)

    def random_input(batch_size: int) -> np.ndarray:
        rng = np.random.default_rng(batch_size)
        shape = (batch_size, *config['input_size'])
        if options.preprocessing:
            return prepare(rng.integers(0, 256, shape, dtype=np.uint8))
        return rng.standard_normal(shape, dtype=np.float32)

    return prepare, random_input


def create_larger_input(config: Dict[str, Any], options: OnnxOptions, batch_size: int) -> np.ndarray:
    """Random inputs of another height and width, for a file that takes any."""
    channels, height, width = config['input_size']
    return create_inputs(dict(config, input_size=(channels, height + 17, width + 8)), options)[1](batch_size)


def create_reference(model: Any, config: Dict[str, Any], options: OnnxOptions) -> Run:
    """PyTorch in float32 on the CPU, on inputs of the file: class scores and, if asked for, patch scores."""
    mean, std = (torch.tensor(config[k], dtype=torch.float64).view(-1, 1, 1) for k in ('mean', 'std'))
    model = deepcopy(model).cpu()  # a GPU would compute in TF32

    @torch.inference_mode()
    def run(array: np.ndarray) -> List[np.ndarray]:
        x = torch.from_numpy(array)
        if options.preprocessing:
            x = x.permute(0, 3, 1, 2) if options.preprocessing == 'NHWC' else x
            x = ((x / 255. - mean) / std).float()
        return [y.float().numpy() for y in forward_scores(model, x, options.patch_method)]

    return run


def create_run(proto: 'onnx.ModelProto', options: OnnxOptions) -> Run:
    """ONNX Runtime on the CPU, for fp16 and bf16 with each result rounded in turn, as a GPU would.

    int8 for TensorRT is computed with the quantized values in float32, whose sums are exact as TensorRT's are: the int8
    kernels of a CPU without VNNI saturate at 16 bits.
    """
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    if options.precision == 'int8' and options.target == 'tensorrt':
        settings.add_session_config_entry('session.disable_quant_qdq', '1')
    if options.precision in TYPES:
        proto = emulate(proto, options.precision)
        # casts there and back would be taken for nothing
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), settings, providers=['CPUExecutionProvider'])
    return lambda x: session.run(options.output_names, {'image': x})


def _trace(network: ExportedNetwork, example: np.ndarray, options: OnnxOptions) -> 'onnx.ModelProto':
    opset = options.resolved_opset
    axes = {0: torch.export.Dim('batch')}
    if options.dynamic_size:
        height, width = (1, 2) if options.preprocessing == 'NHWC' else (2, 3)
        axes.update({height: torch.export.Dim('height'), width: torch.export.Dim('width')})
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # advice on its own internals
        program = torch.onnx.export(
            network,
            (torch.from_numpy(example),),  # of two images: torch.export takes a batch of 1 for a constant
            dynamo=True,
            opset_version=opset,
            input_names=['image'],
            output_names=options.output_names,
            dynamic_shapes=(axes,),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    actual = next(o.version for o in proto.opset_import if o.domain in ('', 'ai.onnx'))
    if actual != opset:
        raise InputError(f'torch.onnx cannot write opset {opset}, it wrote {actual}; use --opset {actual}.')
    graph = proto.graph  # its metadata hold stack traces with local paths
    for item in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ''
    return proto


def _describe(
        model: Any,
        config: Dict[str, Any],
        options: OnnxOptions,
        proto: 'onnx.ModelProto',
        quantization: Optional[Dict[str, Any]],
) -> Dict[str, Any]:
    metadata = describe_model(model, config)
    metadata['versions'].update(
        torch=torch.__version__.split('+')[0], onnx=onnx.__version__, onnxscript=onnxscript.__version__,
        onnxruntime=onnxruntime.__version__)
    kind = 'probabilities' if options.softmax else 'scores'
    meanings = [f'class {kind}', f'patch {kind}']
    metadata['input'] = dict(
        _describe_tensor(proto.graph.input[0]),
        layout=options.preprocessing or 'NCHW',
        range='pixels' if options.preprocessing else 'normalized',
    )
    metadata['outputs'] = [
        dict(_describe_tensor(tensor), meaning=meaning) for tensor, meaning in zip(proto.graph.output, meanings)]
    if options.patch_logits:
        by_class = options.method == 'cam'
        metadata['outputs'][1]['stride'] = model.feature_info[-1]['reduction'] if by_class else model.patch_reduction
        if by_class:
            metadata['outputs'][1]['method'] = options.method
        names = metadata['class_names']
        count = len(names) if by_class else model.tm.num_templates
        # templates may have been kept from another set of classes
        metadata['template_names'] = names if count == len(names) else [f'template {i}' for i in range(count)]
    metadata.update(
        opset=options.resolved_opset,
        precision=options.precision,
        quantization=quantization,
    )
    return metadata


def _describe_tensor(value: 'onnx.ValueInfoProto') -> Dict[str, Any]:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    shape = [d.dim_param or d.dim_value for d in tensor.shape.dim]
    return dict(name=value.name, dtype=str(np.dtype(dtype)), shape=shape)
