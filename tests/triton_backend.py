"""Triton's onnxruntime backend, in Python: runs the model's file with the onnxruntime of the tests.

The published server has no such backend. This one is a "Python-based backend" of the server, for which the
configuration of a model is the same; it refuses a configuration that is not the file's, as the real one does.
"""
import json
import os
import sys

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

TYPES = {'TYPE_FP32': 'tensor(float)', 'TYPE_UINT8': 'tensor(uint8)'}
sys.unraisablehook = lambda unraisable: None  # DLPack capsules, of which NumPy 2 and the server disagree on the name


def describe(values):
    return {v.name: (v.type, [d if isinstance(d, int) else -1 for d in v.shape]) for v in values}


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args['model_config'])
        path = os.path.join(args['model_repository'], args['model_version'], config['default_model_filename'])
        try:
            self.session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        except Exception as e:
            raise pb_utils.TritonModelException(f'cannot load {path}: {e}') from e
        actual = (describe(self.session.get_inputs()), describe(self.session.get_outputs()))
        configured = tuple(
            {v['name']: (TYPES[v['data_type']], [-1, *map(int, v['dims'])]) for v in config[kind]}
            for kind in ('input', 'output'))
        if actual != configured:
            raise pb_utils.TritonModelException(f'configured {configured}, the file has {actual}')

    def execute(self, requests):
        responses = []
        for request in requests:
            names = list(request.requested_output_names())
            values = self.session.run(names, {t.name(): np.from_dlpack(t) for t in request.inputs()})
            tensors = [pb_utils.Tensor.from_dlpack(n, np.ascontiguousarray(v)) for n, v in zip(names, values)]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
