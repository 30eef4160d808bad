"""TensorRT engines from ONNX files: one path for TensorRT 10, 11 and TensorRT-RTX.

The precision is the graph's own (strong typing). An engine is the plan as TensorRT writes it, with no byte before it;
what it needs, and how to use it, lies beside it as FILE.json: the metadata of the ONNX file (export/runtime.py), and

engine.backend, engine.version: 'tensorrt' or 'tensorrt_rtx' and its version.
engine.gpu: name, compute_capability and cuda_driver of the GPU it was built for, null for all that TensorRT-RTX knows.
engine.platform: operating system and processor it was built for, null for all.
engine.onnx, engine.onnx_sha256: path from here and hash of the ONNX file.
engine.profiles: for each, the input's smallest, preferred and largest shape.
engine.options: those of EngineOptions, for building it again; engine.command does that from a shell.
engine.version_compatible, engine.hardware_compatibility: whether other versions and GPUs can load it.
engine.build_seconds.
"""
import contextlib
import hashlib
import os
import re
import shlex
import signal
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from tqdm import tqdm

from export.metadata import read_metadata, refuse_failed, replace_with_sidecar
from export.runtime import (
    ENGINE_SUFFIXES,
    RuntimeInputError,
    get_logger,
    import_library,
    import_tensorrt,
    on_first_gpu,
    parse_version,
    query_gpu,
    read_file,
    shorten_message,
    start_tensorrt,
    tell_platform,
)
from timm_tmblock.errors import InputError
from timm_tmblock.files import check_writable, writing
from train.files import hash_file

# that TensorRT's parser reads, by its documentation; newer ones it takes for what it knows, without a word
FIRST_OPSET, LAST_OPSETS = 9, ((25, [11, 5]), (24, [10, 13]), (20, [10, 0]))  # the last since which version
BACKENDS = ('auto', 'tensorrt', 'tensorrt_rtx')
HARDWARE = {'none': None, 'ampere+': 'AMPERE_PLUS', 'same-cc': 'SAME_COMPUTE_CAPABILITY'}
Range = Tuple[int, int, int]  # smallest, preferred, largest


class ParseError(InputError):
    """TensorRT's parser does not take the network."""


class ProfileError(InputError):
    """The batch or image sizes asked for cannot be had."""


@dataclass(frozen=True)
class EngineOptions:
    """Which engine to build."""
    backend: str = 'auto'
    batches: Tuple[Range, ...] = ((1, 16, 64),)  # one optimization profile each
    size: Optional[Range] = None  # height and width, of a file with dynamic ones
    tf32: bool = False  # float32 in 10 bits of mantissa
    optimization_level: int = 3  # 0 to 5
    workspace: Optional[int] = None  # MB
    timing_cache: bool = True  # TensorRT alone, kept in the user's cache folder
    version_compatible: bool = False
    hardware_compatibility: str = 'none'  # of HARDWARE

    def validate(self) -> None:
        """
        Raises:
            ProfileError: If a range does not rise.
            InputError: If the size of the workspace or a name is invalid.
        """
        for name, value, known in (('--backend', self.backend, BACKENDS),
                                   ('--hardware-compatibility', self.hardware_compatibility, HARDWARE)):
            if value not in known:  # of a sidecar: a module of this name would be imported
                raise InputError(f'{name} must be one of {", ".join(known)}, not {value!r}.')
        for name, low_high in (*(('--batch', b) for b in self.batches), ('--size', self.size or (1, 1, 1))):
            low, opt, high = low_high
            if not 1 <= low <= opt <= high < 2 ** 31:
                raise ProfileError(
                    f'{name} {low} {opt} {high} must rise: smallest, preferred and largest, from 1 on and below 2^31.')
        if self.workspace is not None and not 1 <= self.workspace < 2 ** 43:
            raise InputError('--workspace must be at least 1 MB, and no more than there are bytes to address.')

    def to_flags(self) -> List[str]:
        """The options of the command line that say the same."""
        flags = ['--backend', self.backend]
        for b in self.batches:
            flags += ['--batch', *map(str, b)]
        if self.size:
            flags += ['--size', *map(str, self.size)]
        flags += ['--optimization-level', str(self.optimization_level)]
        flags += ['--workspace', str(self.workspace)] if self.workspace else []
        flags += ['--hardware-compatibility', self.hardware_compatibility]
        flags += ['--tf32'] if self.tf32 else []
        flags += ['--version-compatible'] if self.version_compatible else []
        return flags + ([] if self.timing_cache else ['--no-timing-cache'])


def build_engine(
        onnx_path: Path,
        path: Path,
        options: EngineOptions,
        layers: Optional[Path] = None,
) -> Dict[str, Any]:
    """Build an engine and write it with its sidecar.

    Args:
        onnx_path: File of `python -m export onnx`, or one with its metadata beside it.
        path: File to write.
        options: Which engine.
        layers: File for TensorRT's description of the layers, as JSON; needs a GPU.

    Returns:
        The metadata of the sidecar.

    Raises:
        InputError: If the file, TensorRT, the GPU or the options will not do.
        ParseError: If TensorRT does not take the network, with the node and its operator.
        ProfileError: If the batch or image sizes cannot be had.
        RuntimeInputError: If TensorRT cannot start.
    """
    trt = check_before_export(path, options, layers)
    gpu = query_gpu()
    model, metadata = read_onnx(onnx_path, find_last_opset(trt))
    for file in (path, layers):
        if file:
            check_writable(file)
    if options.size:
        check_size(options.size, metadata['preprocessing']['input_size'])
    try:
        # an engine may move to another system; `..` is of the folder that a link leads to; a file that is a link, as in
        # the Hub's cache, keeps its name
        relative = Path(os.path.relpath(onnx_path.parent.resolve() / onnx_path.name, path.parent.resolve())).as_posix()
    except ValueError as e:  # of Windows
        raise InputError(f'{onnx_path} and {path} are on two drives; put both on one.') from e
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if trt.__name__ == 'tensorrt':
            with contextlib.suppress(RuntimeInputError):  # without cuda-bindings it is the one the thread has chosen
                if cudart := import_library('cuda.bindings.runtime'):
                    stack.enter_context(on_first_gpu(cudart))  # which the sidecar and the timing cache are of
        plan, profiles, engine_layers = _build(trt, model, metadata['input']['name'], options, gpu, layers is not None)
    metadata.pop('parity', None)  # the ONNX file's; of an engine `python -m export check` tells it
    metadata['engine'] = dict(
        backend=trt.__name__,
        version=trt.__version__,
        gpu=gpu if trt.__name__ == 'tensorrt' else None,
        platform=tell_platform() if trt.__name__ == 'tensorrt' else None,
        onnx=relative,
        onnx_sha256=hashlib.sha256(model).hexdigest(),
        profiles=profiles,
        options=asdict(options),
        command=tell_command(relative, path, options),
        version_compatible=options.version_compatible,
        hardware_compatibility=options.hardware_compatibility,
        build_seconds=round(time.perf_counter() - start, 2),
    )
    with writing(path, unique=True) as tmp:
        tmp.write_bytes(plan)
        replace_with_sidecar(tmp, path, metadata)
    if layers:
        with writing(layers) as tmp:
            tmp.write_text(engine_layers)
            os.replace(tmp, layers)
    return metadata


def check_size(size: Sequence[int], input_size: Sequence[int]) -> None:
    """
    Raises:
        ProfileError: If the range of heights and widths leaves out the size that images are made for the network.
    """
    if not size[0] <= min(input_size[1:]) <= max(input_size[1:]) <= size[-1]:
        raise ProfileError(
            f'This network takes images of {input_size[1]}×{input_size[2]}, which --size {size[0]} ... {size[-1]} '
            f'leaves out; make the range include it.')


def check_before_export(path: Path, options: EngineOptions, layers: Optional[Path] = None) -> Any:
    """Find what would fail in the end before anything is begun, and return the module of TensorRT.

    Raises:
        InputError: If the options, the file's name, TensorRT or the GPU will not do.
    """
    options.validate()
    if path.is_dir():
        raise InputError(f'{path} is a folder; name the file to write.')
    if path.suffix not in ENGINE_SUFFIXES:
        raise InputError(f'{path} must end in {" or ".join(ENGINE_SUFFIXES)}.')
    trt = import_tensorrt(options.backend)
    gpu = query_gpu()
    _check_backend(trt, gpu, options)
    if layers and not gpu:
        raise InputError('TensorRT describes layers on a GPU, and there is none here; leave out --layers.')
    return trt


def rebuild_engine(path: Path) -> None:
    """Build an engine again from the ONNX file beside it, with the options in its sidecar, for this machine.

    Raises:
        InputError: If that file is gone or is another one by now, or the sidecar has no options of an engine.
    """
    engine = read_metadata(path, {})['engine']
    try:
        options = read_options(engine)
        options.validate()
    except (AttributeError, KeyError, TypeError) as e:
        raise InputError(f'{path}.json does not say how to build the engine; use python -m export tensorrt.') from e
    build_engine(find_source(path, engine), path, options)


def find_source(path: Path, engine: Dict[str, Any]) -> Path:
    """The ONNX file that an engine was built from.

    Raises:
        InputError: If it is gone, or is another one by now.
    """
    source = path.parent / engine['onnx']
    if hash_file(source) != engine['onnx_sha256']:
        raise InputError(
            f'{path} was built from {source}, which is gone or another file by now; build it with python -m export '
            f'tensorrt.')
    return source


def read_options(engine: Dict[str, Any]) -> EngineOptions:
    """Options of an engine, from its sidecar."""
    known = {f.name for f in fields(EngineOptions)}
    return EngineOptions(**{k: _freeze(v) for k, v in engine['options'].items() if k in known})


def tell_command(onnx: str, path: Path, options: EngineOptions) -> str:
    """The command that builds an engine, from its folder."""
    return shlex.join(['python', '-m', 'export', 'tensorrt', onnx, '--output', path.name, *options.to_flags()])


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def find_last_opset(trt: Any) -> int:
    """The newest that a version of TensorRT reads; TensorRT-RTX, whose numbers are its own, those of 10.13."""
    version = parse_version(trt.__version__) if trt.__name__ == 'tensorrt' else [10, 13]
    return next(opset for opset, since in LAST_OPSETS if version >= since)


def read_onnx(path: Path, last_opset: int) -> Tuple[bytes, Dict[str, Any]]:
    """An ONNX file and its metadata, fit for TensorRT.

    Raises:
        InputError: If it is missing, cut short, of an opset TensorRT does not read, or int8 for a CPU.
    """
    import onnx
    from google.protobuf.message import DecodeError
    if not path.is_file():
        raise InputError(f'There is no file {path}.')
    model = read_file(path)
    try:
        proto = onnx.load_from_string(model)
        onnx.checker.check_model(proto)
    except DecodeError as e:
        raise InputError(f'{path} is cut short or not an ONNX file; export it again.') from e
    except onnx.checker.ValidationError as e:
        if 'No Op registered' not in str(e) and 'No opset import' not in str(e):  # those TensorRT's parser tells apart
            reason = str(e).strip().splitlines()[0]
            raise InputError(f'{path} is not a valid ONNX file ({reason}); export it again.') from e
    opset = max((o.version for o in proto.opset_import if o.domain in ('', 'ai.onnx')), default=0)
    if not FIRST_OPSET <= opset <= last_opset:
        raise InputError(
            f'{path} has opset {opset}, this TensorRT reads {FIRST_OPSET} to {last_opset}; export it with --opset 18, '
            f'or install a later version (bf16 needs opset 22).')
    metadata = read_metadata(path, {p.key: p.value for p in proto.metadata_props})
    refuse_failed(metadata, path)
    if (metadata.get('quantization') or {}).get('target') == 'cpu':
        raise InputError(
            f'{path} is int8 for a CPU, with uint8 activations that TensorRT does not take; export it with --precision '
            f'int8 --target tensorrt.')
    return model, metadata


def _check_backend(trt: Any, gpu: Optional[Dict[str, Any]], options: EngineOptions) -> None:
    if trt.__name__ == 'tensorrt':
        if gpu is None:  # some versions end the process
            raise InputError('TensorRT builds on an NVIDIA GPU, and there is none here; use --backend '
                             'tensorrt_rtx, which builds without one.')
        name = HARDWARE[options.hardware_compatibility]
        if name and not hasattr(trt.HardwareCompatibilityLevel, name):
            raise InputError(
                f'TensorRT {trt.__version__} has no --hardware-compatibility {options.hardware_compatibility}; use '
                f'ampere+.')
        return
    if gpu and int(gpu['compute_capability'].split('.')[0]) < 8:
        raise InputError(
            f'TensorRT-RTX engines run on Ampere and later, and {gpu["name"]} has compute capability '
            f'{gpu["compute_capability"]}; use --backend tensorrt.')
    if options.version_compatible or options.hardware_compatibility != 'none':
        raise InputError(
            'TensorRT-RTX engines run on all GPUs it supports but only in the version that built them; leave out '
            '--version-compatible and --hardware-compatibility.')


def _build(
        trt: Any,
        model: bytes,
        input_name: str,
        options: EngineOptions,
        gpu: Optional[Dict[str, Any]],
        describe_layers: bool,
) -> Tuple[bytes, List[List[List[int]]], str]:
    """The engine, the shapes of its profiles and, if asked for, the description of its layers as JSON."""
    logger = get_logger(trt)
    builder = start_tensorrt(trt.Builder, trt, logger)
    network = _parse(trt, builder, model, logger)
    config = _create_config(trt, builder, options, describe_layers)
    tensor = next((t for t in map(network.get_input, range(network.num_inputs)) if t.name == input_name), None)
    if tensor is None:
        raise ParseError(f'The file has no input {input_name!r}, which its metadata name; export it again.')
    shapes = profile_shapes(tensor, options)
    for low, opt, high in shapes:
        profile = builder.create_optimization_profile()
        try:
            profile.set_shape(input_name, low, opt, high)
            accepted = config.add_optimization_profile(profile) >= 0
        except RuntimeError:  # as the bindings have it; the reason is in the log
            accepted = False
        if not accepted:
            raise ProfileError(f'{trt.__name__} does not take inputs of {low} to {high}; {logger.last}.')
    cache_path = _timing_cache_path(trt, gpu) if options.timing_cache else None
    if cache_path:
        _use_timing_cache(config, cache_path)
    monitor = _create_monitor(trt)
    config.progress_monitor = monitor
    with _noting_interrupts(monitor):
        plan = builder.build_serialized_network(network, config)
        monitor.close()
    if plan is None:
        raise InputError(f'{trt.__name__} {trt.__version__} cannot build the engine: {logger.last}.')
    if cache_path:
        _write_timing_cache(config, cache_path)
    data = bytes(plan)
    layers = _describe_layers(trt, data, options, logger) if describe_layers else ''
    return data, [[list(s) for s in shape] for shape in shapes], layers


def _parse(trt: Any, builder: Any, model: bytes, logger: Any) -> Any:
    """The network of an ONNX file."""
    # its value differs between 10 and 11, where typing is strong anyway
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        if not parser.num_errors:
            raise ParseError(f'{trt.__name__} {trt.__version__} does not take the file: {logger.last}.')
        error = parser.get_error(0)
        raise ParseError(
            f'{trt.__name__} {trt.__version__} does not take node {error.node_name()!r}, operator '
            f'{error.node_operator()}: {shorten_message(error.desc())}; export the file again, or leave that operator '
            f'out.')
    return network


def _create_config(trt: Any, builder: Any, options: EngineOptions, describe_layers: bool) -> Any:
    config = builder.create_builder_config()
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default
    config.builder_optimization_level = options.optimization_level
    if describe_layers:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    hardware = HARDWARE[options.hardware_compatibility]
    if hardware:
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, hardware)
    return config


def _describe_layers(trt: Any, plan: bytes, options: EngineOptions, logger: Any) -> str:
    runtime = start_tensorrt(trt.Runtime, trt, logger)
    if options.version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise InputError(f'{trt.__name__} cannot load the engine here: {logger.last}; leave out --layers.')
    return engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)


def profile_shapes(tensor: Any, options: EngineOptions) -> List[List[Tuple[int, ...]]]:
    """For each profile, the smallest, preferred and largest shape of the network's input.

    Raises:
        ProfileError: If they are not what the file allows, or the file has dynamic sizes and none were named.
    """
    shape = tuple(tensor.shape)
    spatial = [axis for axis in range(1, len(shape)) if shape[axis] == -1]
    if spatial and not options.size:
        raise ProfileError('Height and width of the file are dynamic; name their range with --size MIN OPT MAX.')
    if options.size and not spatial:
        raise ProfileError('Height and width of the file are fixed; leave out --size, or export with --dynamic-size.')
    profiles = []
    for batch in options.batches:
        if shape[0] != -1 and batch != (shape[0],) * 3:
            raise ProfileError(f'The file takes only batches of {shape[0]}; use --batch {shape[0]}.')
        profiles.append([
            tuple(
                n if axis == 0 else options.size[i] if options.size and axis in spatial else shape[axis]
                for axis in range(len(shape)))
            for i, n in enumerate(batch)])
    return profiles


def _timing_cache_path(trt: Any, gpu: Optional[Dict[str, Any]]) -> Optional[Path]:
    """One cache for each version and GPU; TensorRT-RTX, which times nothing when it builds, has none."""
    if trt.__name__ != 'tensorrt' or gpu is None:
        return None
    folder = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')) / 'timm_tmblock'
    key = re.sub(r'[^\w.]+', '-', f'{trt.__version__}-{gpu["name"]}-{gpu["compute_capability"]}')
    return folder / f'timing-{key}.cache'


# a cache saves time and nothing else: what goes wrong with it must not lose an engine

def _use_timing_cache(config: Any, path: Path) -> None:
    try:
        content = path.read_bytes()
    except OSError:
        content = b''
    for data in (content, b''):
        cache = config.create_timing_cache(data)  # None where it is damaged
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):  # False of another driver's
            break


def _write_timing_cache(config: Any, path: Path) -> None:
    timed = config.get_timing_cache()
    if timed is None:
        return
    with contextlib.suppress(OSError, InputError), writing(path, unique=True) as tmp:
        tmp.write_bytes(bytes(timed.serialize()))
        os.replace(tmp, path)


def _create_monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):
        """A progress bar of the outermost phase, on a terminal; ends the build after an interrupt."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.bars: Dict[str, tqdm] = {}
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: Optional[str], num_steps: int) -> None:
            if parent_phase is None:
                self.bars[phase_name] = tqdm(total=num_steps, desc=phase_name, unit='step', leave=False, disable=None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.bars:
                self.bars[phase_name].update()
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.bars:
                self.bars.pop(phase_name).close()

        def close(self) -> None:
            for bar in self.bars.values():
                bar.close()

    return Monitor()


@contextlib.contextmanager
def _noting_interrupts(monitor: Any) -> Iterator[None]:
    """Tell the monitor of Ctrl-C: an exception raised in it would be printed by TensorRT, which goes on."""
    if threading.current_thread() is not threading.main_thread():  # where no signals arrive
        yield
        return
    previous = signal.signal(signal.SIGINT, lambda *_: setattr(monitor, 'interrupted', True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if monitor.interrupted:
        raise KeyboardInterrupt


def parse_ranges(values: Sequence[Sequence[int]]) -> Tuple[Range, ...]:
    """Ranges as given on the command line, one number for a single size or three.

    Raises:
        ProfileError: For another count.
    """
    ranges: List[Range] = []
    for numbers in values:
        if len(numbers) not in (1, 3):
            raise ProfileError('--batch and --size take one number, or three: smallest, preferred and largest.')
        low, opt, high = numbers if len(numbers) == 3 else [*numbers] * 3
        ranges.append((low, opt, high))
    return tuple(ranges)
