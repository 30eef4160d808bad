"""ONNX models in bfloat16 where no kernels for it exist: each operator in float32, its result rounded to bfloat16.

That is what a GPU does, which adds up in float32 too.
"""
import onnx
from onnx import TensorProto, helper, numpy_helper


def emulate(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A model that computes what `proto` computes, with no bfloat16 operator but Cast."""
    proto = onnx.shape_inference.infer_shapes(proto)
    graph = proto.graph
    rounded = {
        value.name for value in (*graph.value_info, *graph.input, *graph.output)
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    for i, tensor in enumerate(graph.initializer):
        if tensor.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype('float32')
            graph.initializer[i].CopyFrom(numpy_helper.from_array(values, tensor.name))
    nodes = []
    for node in graph.node:
        if node.op_type == 'Cast':
            to = next(a for a in node.attribute if a.name == 'to')
            to.i = TensorProto.FLOAT if to.i == TensorProto.BFLOAT16 else to.i
        outputs = [name for name in node.output if name in rounded]
        for name in outputs:
            node.output[list(node.output).index(name)] = f'{name}/float'
        nodes.append(node)
        for name in outputs:
            nodes.append(helper.make_node('Cast', [f'{name}/float'], [f'{name}/rounded'], to=TensorProto.BFLOAT16))
            nodes.append(helper.make_node('Cast', [f'{name}/rounded'], [name], to=TensorProto.FLOAT))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return proto
