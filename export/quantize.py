"""int8 by ONNX Runtime's static quantization, in the form that a CPU or TensorRT runs fast."""
import contextlib
import io
import logging
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from tqdm import tqdm

METHOD = 'MinMax'
BATCH_SIZE = 64
# A CPU is fast only with unsigned activations, and where little between two convolutions is in floating point.
# TensorRT takes neither zero points other than 0 nor a bias in int32; it can fuse what is between convolutions itself
# where their outputs are free of 8 bits, as is the sum that a residual network adds to.
SETTINGS: Dict[str, Dict[str, Any]] = {
    'cpu': dict(
        activation_type=QuantType.QUInt8,
        extra_options=dict(OpTypesToExcludeOutputQuantization=['Gemm'])),  # scores in 8 bits would tie
    'tensorrt': dict(
        activation_type=QuantType.QInt8,
        op_types_to_quantize=['Conv'],
        extra_options=dict(
            ActivationSymmetric=True, WeightSymmetric=True, QuantizeBias=False,
            OpTypesToExcludeOutputQuantization=['Conv'])),
}


class _Batches(CalibrationDataReader):
    def __init__(self, name: str, images: np.ndarray, prepare: Callable[[np.ndarray], np.ndarray]) -> None:
        batches = np.array_split(images, -(-len(images) // BATCH_SIZE))
        self.batches: Iterator = iter(tqdm(batches, desc='Calibrating', unit='batch', leave=False, disable=None))
        self.name = name
        self.prepare = prepare

    def get_next(self) -> Optional[Dict[str, np.ndarray]]:
        batch = next(self.batches, None)
        return None if batch is None else {self.name: self.prepare(batch)}


def quantize(
        proto: onnx.ModelProto,
        target: str,
        images: np.ndarray,
        prepare: Callable[[np.ndarray], np.ndarray],
) -> Tuple[onnx.ModelProto, List[str]]:
    """Quantize a float32 network, weights channel by channel, but for sensitive nodes and scores.

    Args:
        proto: ONNX model in float32; for the CPU with norms as convolutions.
        target: 'cpu' or 'tensorrt'.
        images: Calibration images (N, C, H, W), uint8.
        prepare: Makes the model's input of some of them.

    Returns:
        The quantized model, and the names of the nodes kept in float32: of `find_sensitive`, for a CPU of
        `find_region_scores` too.
    """
    kept = find_sensitive(proto.graph, readers=target == 'tensorrt')
    if target == 'cpu':
        kept += find_region_scores(proto.graph)
    with tempfile.TemporaryDirectory() as folder, _silence():
        path = Path(folder) / 'quantized.onnx'
        quantize_static(
            proto,
            path,
            _Batches(proto.graph.input[0].name, images, prepare),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            # probabilities in 8 bits would be multiples of 1/255
            nodes_to_exclude=kept + [node.name for node in proto.graph.node if node.op_type == 'Softmax'],
            **SETTINGS[target],
        )
        return onnx.load(path), kept


def find_sensitive(graph: onnx.GraphProto, readers: bool) -> List[str]:
    """Names of the nodes that 8 bits hurt most for the little they compute: the stem, what normalises its pixels, and
    the convolutions that read it.

    On rn26_tm, quantized alone and symmetrically, the stem and the two convolutions that read it each add more error to
    the logits than any other does.

    Args:
        graph: Network.
        readers: Take those that read the stem too.
    """
    nodes = list(graph.node)
    stem = next(i for i, node in enumerate(nodes) if node.op_type == 'Conv')
    kept = [node.name for node in nodes[:stem + 1]]
    if not readers:
        return kept
    outputs = set(nodes[stem].output)
    for node in graph.node:
        if outputs & set(node.input):
            if node.op_type in ('BatchNormalization', 'Relu'):
                outputs |= set(node.output)
            elif node.op_type == 'Conv':
                kept.append(node.name)
    return kept


def find_region_scores(graph: onnx.GraphProto) -> List[str]:
    """Names of the nodes that make the second output, from its convolution on, and of those that read what they make.

    In 8 bits regions and classes would have the same scores, and an output that something quantized reads is of 8 bits.
    """
    makers = {name: node for node in graph.node for name in node.output}
    found: List[str] = []
    tensors = [output.name for output in graph.output[1:]]
    while tensors:
        node = makers.get(tensors.pop())
        if node is not None and node.name not in found:
            found.append(node.name)
            if node.op_type != 'Conv':
                tensors += node.input
    made = {name for node in graph.node if node.name in found for name in node.output}
    return found + [node.name for node in graph.node if node.name not in found and made & set(node.input)]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the quantizer's prints and advice off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
