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
# A CPU is fast with unsigned activations alone, and where nothing between two convolutions is in floating point.
# TensorRT takes neither zero points other than 0 nor a bias in int32; it fuses what is between convolutions itself, and
# loses least where the sum that a residual network adds to stays in floating point.
SETTINGS: Dict[str, Dict[str, Any]] = {
    'cpu': dict(
        activation_type=QuantType.QUInt8,
        extra_options=dict(OpTypesToExcludeOutputQuantization=['Gemm'])),  # scores in 8 bits would tie
    'tensorrt': dict(
        activation_type=QuantType.QInt8,
        op_types_to_quantize=['Conv'],
        extra_options=dict(ActivationSymmetric=True, WeightSymmetric=True, QuantizeBias=False)),
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
    """Quantize a float32 network, weights channel by channel, but for the nodes of `find_sensitive`.

    Args:
        proto: ONNX model in float32; for the CPU with norms as convolutions.
        target: 'cpu' or 'tensorrt'.
        images: Calibration images (N, C, H, W), uint8.
        prepare: Makes the model's input of some of them.

    Returns:
        The quantized model, and the names of the nodes kept in float32.
    """
    kept = find_sensitive(proto.graph, readers=target == 'tensorrt')
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
    """Names of the convolutions that 8 bits hurt most for the little they compute: the stem, and those that read it.

    On rn26_tm, quantized alone and symmetrically, each of these three adds more error to the logits than any other
    convolution does.

    Args:
        graph: Network.
        readers: Take those that read the stem too.
    """
    convs = [node for node in graph.node if node.op_type == 'Conv']
    kept = [convs[0].name]
    if not readers:
        return kept
    outputs = set(convs[0].output)
    for node in graph.node:
        if outputs & set(node.input):
            if node.op_type in ('BatchNormalization', 'Relu'):
                outputs |= set(node.output)
            elif node.op_type == 'Conv':
                kept.append(node.name)
    return kept


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
