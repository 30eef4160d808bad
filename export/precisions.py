"""Number formats of ONNX files."""
PRECISIONS = ('fp32', 'fp16', 'bf16', 'int8')
TARGETS = ('cpu', 'tensorrt')  # of int8, which need different files
