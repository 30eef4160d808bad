"""ONNX models in float16 and bfloat16 on CPUs, which have few kernels for them or none: each operator in float32, its
result rounded.

That is what a GPU does, which adds up in float32 too. ONNX Runtime itself would compute neighbouring operators of
float16 in float32 and round nothing between them, so that what leaves the range of the format would not show.
"""
import onnx
from onnx import TensorProto, helper, numpy_helper

EXACT = ('Relu', 'Concat', 'MaxPool', 'Reshape', 'Slice', 'Squeeze', 'Transpose', 'Unsqueeze')  # of rounded numbers
TYPES = {'fp16': TensorProto.FLOAT16, 'bf16': TensorProto.BFLOAT16}


def emulate(proto: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """A model that computes what `proto` computes, with no operator in that precision, of TYPES, but Cast."""
    narrow = TYPES[precision]
    proto = onnx.shape_inference.infer_shapes(proto)
    graph = proto.graph
    rounded = {
        value.name for value in (*graph.value_info, *graph.input, *graph.output)
        if value.type.tensor_type.elem_type == narrow}
    for i, tensor in enumerate(graph.initializer):
        if tensor.data_type == narrow:
            values = numpy_helper.to_array(tensor).astype('float32')
            graph.initializer[i].CopyFrom(numpy_helper.from_array(values, tensor.name))
    nodes = []
    for node in graph.node:
        if node.op_type == 'Cast':
            to = next(a for a in node.attribute if a.name == 'to')
            to.i = TensorProto.FLOAT if to.i == narrow else to.i
        outputs = [name for name in node.output if name in rounded and node.op_type not in EXACT]
        for name in outputs:
            node.output[list(node.output).index(name)] = f'{name}/float'
        nodes.append(node)
        for name in outputs:
            nodes.append(helper.make_node('Cast', [f'{name}/float'], [f'{name}/rounded'], to=narrow))
            nodes.append(helper.make_node('Cast', [f'{name}/rounded'], [name], to=TensorProto.FLOAT))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return proto
