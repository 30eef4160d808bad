"""Stand-ins for TensorRT and the CUDA runtime, to run the logic around them where there is no GPU.

An engine is the ONNX file itself, run by ONNX Runtime on "device" memory, which is ordinary memory. Every name asked
for is looked up in the committed table of names (export/results/tensorrt_names.json): what the version in question
lacks raises AttributeError, as the real one would.
"""
import ctypes
import json
import threading
import types
import weakref
from enum import IntEnum
from pathlib import Path

import numpy as np
import onnxruntime

TABLE = json.loads((Path(__file__).parent.parent / 'export' / 'results' / 'tensorrt_names.json').read_text())['names']


class Guarded:
    """An object of which only the names of one version can be used."""

    def __init__(self, target, kind, version):
        object.__setattr__(self, '_guard', (target, kind, version))

    def _check(self, name):
        target, kind, version = self._guard
        key = f'{kind}.{name}' if kind else name
        if not TABLE.get(key, {}).get(version):
            raise AttributeError(f'TensorRT {version} has no {key} in the table of names')
        return target

    def __getattr__(self, name):
        return getattr(self._check(name), name)

    def __setattr__(self, name, value):
        setattr(self._check(name), name, value)


class Flags(IntEnum):
    TF32 = 0
    VERSION_COMPATIBLE = 1


def create_module(version, name='tensorrt', full_version=None, log=None):
    """A module like TensorRT's of a version of the table; `log` collects what the builder was told."""
    log = log if log is not None else {}
    foreign = log.setdefault('foreign_caches', [])  # timing caches of another GPU or driver

    def guard(target, kind):
        return Guarded(target, kind, version)

    def take(logger):
        """TensorRT keeps the first logger as long as anything of it lives, and ignores others."""
        log.setdefault('logger', logger)

    def complain(message):
        log['logger'].log(1, message)

    class Config:
        cache = None

        def __init__(self):
            log.update(flags={'TF32'}, profiles=[], settings=self)

        def clear_flag(self, flag):
            log['flags'].discard(flag.name)

        def set_flag(self, flag):
            log['flags'].add(flag.name)

        def set_memory_pool_limit(self, pool, size):
            log['workspace'] = size

        def add_optimization_profile(self, profile):
            low, opt, high = object.__getattribute__(profile, '_guard')[0].shape
            if not all(a <= b <= c for a, b, c in zip(low, opt, high)):
                return -1
            log['profiles'].append((low, opt, high))
            return len(log['profiles']) - 1

        def create_timing_cache(self, data):
            log['cache_before'] = data
            return guard(types.SimpleNamespace(serialize=lambda: data + b'+', foreign=data in foreign), 'ITimingCache')

        def set_timing_cache(self, cache, ignore_mismatch):
            if object.__getattribute__(cache, '_guard')[0].foreign:
                return False
            self.cache = cache
            return True

        def get_timing_cache(self):
            return self.cache

    class Profile:
        def set_shape(self, name, low, opt, high):
            self.shape = tuple(low), tuple(opt), tuple(high)

    class Network:
        num_inputs = 1

        def get_input(self, i):
            value = onnxruntime.InferenceSession(self.model, providers=['CPUExecutionProvider']).get_inputs()[i]
            shape = tuple(n if isinstance(n, int) else -1 for n in value.shape)
            return guard(types.SimpleNamespace(name=value.name, shape=shape), 'ITensor')

    class Parser:
        num_errors = 0

        def __init__(self, network, logger):
            take(logger)
            self.network = object.__getattribute__(network, '_guard')[0]

        def parse(self, model):
            self.network.model = model
            return True

    class Builder:
        def __init__(self, logger):
            take(logger)

        def create_network(self, flags):
            log['network_flags'] = flags
            return guard(Network(), 'INetworkDefinition')

        def create_builder_config(self):
            return guard(Config(), 'IBuilderConfig')

        def create_optimization_profile(self):
            return guard(Profile(), 'IOptimizationProfile')

        def build_serialized_network(self, network, config):
            monitor = object.__getattribute__(config, '_guard')[0].progress_monitor
            monitor.phase_start('building', None, 2)
            going_on = monitor.step_complete('building', 0)
            monitor.phase_finish('building')
            if not going_on:
                return None
            if log.get('refuses_build'):
                complain('Error Code 10: Could not find any implementation for node stem.conv.')
                return None
            log['built_on'] = Cuda.cudaGetDevice()[1]
            model = object.__getattribute__(network, '_guard')[0].model
            return json.dumps(log['profiles']).encode() + b'\n' + model

    class Context:
        def __init__(self, engine):
            self.engine = engine
            self.addresses = {}

        def set_optimization_profile_async(self, index, stream):
            if log.get('refuses_profile'):  # which the bindings raise, where others return False
                complain('IExecutionContext::setOptimizationProfileAsync: Error Code 3: API Usage Error')
                raise RuntimeError('Error in set optimization profile async.')
            self.profile = index
            return True

        def set_input_shape(self, name, shape):
            if log.get('refuses_shape'):
                complain('IExecutionContext::setInputShape: Error Code 3: API Usage Error (dimension 0)')
                return False
            self.shape = shape
            self.shapes = {o.name: y.shape for o, y in self.evaluate(np.zeros(shape))}
            return True

        def set_tensor_address(self, name, address):
            assert address in Cuda.device, 'TensorRT reads and writes memory of the GPU'
            self.addresses[name] = address
            return True

        def get_tensor_shape(self, name):
            return self.shape if name == self.engine.session.get_inputs()[0].name else self.shapes[name]

        def execute_async_v3(self, stream):
            session = self.engine.session
            if {t.name for t in (*session.get_inputs(), *session.get_outputs())} != set(self.addresses):
                return False
            if Cuda.captured is not None and log.get('refuses_capture'):
                return False
            Cuda.enqueue(self.execute, stream)
            return True

        def evaluate(self, x):
            session = self.engine.session
            tensor = session.get_inputs()[0]
            x = x.astype(np.uint8 if 'uint8' in tensor.type else np.float32, copy=False)
            return zip(session.get_outputs(), session.run(None, {tensor.name: x}))

        def execute(self):
            tensor = self.engine.session.get_inputs()[0]
            x = view(self.addresses[tensor.name], self.shape, np.uint8 if 'uint8' in tensor.type else np.float32)
            for output, value in self.evaluate(x):
                view(self.addresses[output.name], value.shape, value.dtype)[...] = value

    class Engine:
        def __init__(self, data):
            profiles, model = data.split(b'\n', 1)
            self.profiles = json.loads(profiles)
            self.session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
            self.num_optimization_profiles = len(self.profiles)

        def create_runtime_config(self):
            log['runtime_config'] = types.SimpleNamespace()
            return guard(log['runtime_config'], 'IRuntimeConfig')

        def create_execution_context(self, settings=None):
            living = log.setdefault('living_contexts', weakref.WeakSet())
            if len(living) >= log.get('room_for_contexts', 100):
                return None
            log['contexts'] = log.get('contexts', 0) + 1
            context = Context(self)
            living.add(context)
            return guard(context, 'IExecutionContext')

        def get_tensor_profile_shape(self, name, index):
            return [tuple(shape) for shape in self.profiles[index]]

        def create_engine_inspector(self):
            return guard(types.SimpleNamespace(
                get_engine_information=lambda kind: '{"Layers": []}'), 'EngineInspector')

    class Runtime:
        def __init__(self, logger):
            take(logger)

        def deserialize_cuda_engine(self, data):
            if log.get('refuses_engine'):
                complain('[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)')
                return None
            return guard(Engine(data), 'ICudaEngine')

    members = dict(
        IProgressMonitor=type('IProgressMonitor', (), {}),
        ILogger=type('ILogger', (), dict(ERROR=1, INTERNAL_ERROR=0, WARNING=2)),
        Builder=lambda logger: guard(Builder(logger), 'Builder'),
        Runtime=lambda logger: guard(Runtime(logger), 'Runtime'),
        OnnxParser=lambda network, logger: guard(Parser(network, logger), 'OnnxParser'),
        NetworkDefinitionCreationFlag=guard(  # renumbered in 11
            types.SimpleNamespace(STRONGLY_TYPED=int(version.startswith('10'))), 'NetworkDefinitionCreationFlag'),
        BuilderFlag=guard(Flags, 'BuilderFlag'),
        ProfilingVerbosity=guard(types.SimpleNamespace(DETAILED=2), 'ProfilingVerbosity'),
        MemoryPoolType=guard(types.SimpleNamespace(WORKSPACE=0), 'MemoryPoolType'),
        CudaGraphStrategy=guard(types.SimpleNamespace(WHOLE_GRAPH_CAPTURE=1), 'CudaGraphStrategy'),
        LayerInformationFormat=guard(types.SimpleNamespace(JSON=1), 'LayerInformationFormat'),
        HardwareCompatibilityLevel=guard(
            types.SimpleNamespace(AMPERE_PLUS='AMPERE_PLUS', SAME_COMPUTE_CAPABILITY='SAME_COMPUTE_CAPABILITY'),
            'HardwareCompatibilityLevel'),
    )
    namespace = types.SimpleNamespace(**members)
    module = Module(name)
    module.__dict__.update(__version__=full_version or f'{version.split()[-1]}.0', _namespace=guard(namespace, ''))
    return module


class Module(types.ModuleType):
    def __getattr__(self, name):
        return getattr(self.__dict__['_namespace'], name)


def view(address, shape, dtype):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype).reshape(shape)


class Cuda:
    """The module cuda.bindings.runtime: one stream, whose work is done when somebody waits for it."""
    cudaHostAllocDefault = 0
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    host = {}  # pinned
    device = {}
    pending = []
    captured = None
    forgotten = 0  # last errors
    lock = threading.Lock()
    launches = 0
    STREAM = 7

    @classmethod
    def reset(cls):
        cls.launches = 0
        for found in (cls.host, cls.device, cls.pending):
            found.clear()

    @classmethod
    def count_buffers(cls):
        return len(cls.host) + len(cls.device)

    @classmethod
    def enqueue(cls, work, stream):
        assert stream == cls.STREAM
        (cls.pending if cls.captured is None else cls.captured).append(work)

    @classmethod
    def allocate(cls, memory, size):
        cls.used.append(cls.cudaGetDevice()[1])
        buffer = ctypes.create_string_buffer(size)
        memory[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    @classmethod
    def cudaMalloc(cls, size):
        return cls.allocate(cls.device, size)

    @classmethod
    def cudaHostAlloc(cls, size, flags):
        return cls.allocate(cls.host, size)

    @classmethod
    def cudaFree(cls, address):
        del cls.device[address]
        return (0,)

    @classmethod
    def cudaFreeHost(cls, address):
        del cls.host[address]
        return (0,)

    cudaStreamNonBlocking = 1
    chosen = threading.local()  # each thread has a GPU of its own choice
    used = []  # those that memory was asked of

    @classmethod
    def cudaGetDevice(cls):
        return 0, getattr(cls.chosen, 'index', 0)

    @classmethod
    def cudaSetDevice(cls, index):
        cls.chosen.index = index
        return (0,)

    @classmethod
    def cudaStreamCreateWithFlags(cls, flags):
        return 0, cls.STREAM

    @staticmethod
    def cudaStreamDestroy(stream):
        return (0,)

    @classmethod
    def cudaMemcpyAsync(cls, target, source, size, kind, stream):
        to_device = kind == cls.cudaMemcpyKind.cudaMemcpyHostToDevice
        assert (target in cls.device, source in cls.host) == (to_device, to_device)
        assert (target in cls.host, source in cls.device) == (not to_device, not to_device)
        cls.enqueue(lambda: ctypes.memmove(target, source, size), stream)
        return (0,)

    @classmethod
    def cudaStreamBeginCapture(cls, stream, mode):
        cls.captured = []
        return (0,)

    @classmethod
    def cudaStreamEndCapture(cls, stream):
        graph, cls.captured = cls.captured, None
        return 0, graph

    @classmethod
    def cudaGetLastError(cls):
        cls.forgotten += 1
        return (0,)

    @staticmethod
    def cudaGraphInstantiate(graph, flags):
        return 0, list(graph)

    @staticmethod
    def cudaGraphDestroy(graph):
        return (0,)

    cudaGraphExecDestroy = cudaGraphDestroy

    @classmethod
    def cudaGraphLaunch(cls, graph, stream):
        cls.launches += 1
        for work in graph:
            cls.enqueue(work, stream)
        return (0,)

    @classmethod
    def cudaStreamSynchronize(cls, stream):
        assert stream == cls.STREAM and cls.captured is None
        with cls.lock:  # of several sessions one may find the work of another
            while cls.pending:
                cls.pending.pop(0)()
        return (0,)
