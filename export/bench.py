"""Latency and throughput of exported files and of PyTorch, side by side in one run.

Contestants take turns of a fraction of a second, so that whatever else the machine does falls on all of them; the first
call of a turn, when threads of the one before may still spin, is not counted. A call goes from arrays in main memory to
arrays in main memory.
"""
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import numpy as np
from tqdm import tqdm

from export.runtime import ENGINE_SUFFIXES, load, query_gpu
from timm_tmblock.errors import InputError
from train.files import save_figure

PERCENTILES = (10, 50, 90, 99)
TURN = 0.25  # seconds
Call = Callable[[np.ndarray], Any]


@dataclass
class Contestant:
    """Something that takes batches."""
    name: str
    call: Call
    make_input: Callable[[int], np.ndarray]
    size: Sequence[int] = ()  # of an image: channels, height, width


def name_apart(paths: Sequence[Path]) -> List[str]:
    """Names of files; of those that share one the path, and a number where a file comes again."""
    names = [path.name for path in paths]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths)]
    return [f'{name} ({names[:i].count(name) + 1})' if name in names[:i] else name for i, name in enumerate(names)]


def open_file(path: Path, device: str, name: str = '') -> Contestant:
    """An ONNX file on a device, or an engine on the GPU, in the runtime, by the file's name or another.

    On a CPU with as many threads as PyTorch has, which the report tells.

    Raises:
        RuntimeInputError: If it cannot run here.
    """
    import torch

    is_engine = path.suffix in ENGINE_SUFFIXES
    runner = load(path) if is_engine else load(path, device, threads=torch.get_num_threads())
    shape = runner.preprocessing['input_size']
    provider = runner.session.provider
    kind = provider if is_engine else f'ONNX Runtime {provider.removesuffix("ExecutionProvider")}'

    def make_input(batch_size: int) -> np.ndarray:
        pixels = np.random.default_rng(0).integers(0, 256, (batch_size, *shape[1:], shape[0]), dtype=np.uint8)
        return runner.to_input(pixels)

    return Contestant(f'{kind}, {name or path.name}', runner.session.run, make_input, shape)


def open_torch(name: str, compiled: bool, device: str, precision: str, prepared: bool = True) -> Contestant:
    """A network in PyTorch.

    Args:
        name: Registered with timm, for random weights; or a weight file.
        compiled: By torch.compile.
        device: 'cpu' or 'cuda'.
        precision: 'fp32', 'fp16' or 'bf16'.
        prepared: With norms folded and in channels_last, the faster format; as it is created otherwise.

    Raises:
        InputError: If there is no such network.
    """
    import timm
    import torch

    import timm_tmblock  # noqa: F401  registers the models
    from timm_tmblock.checkpoint import load_pretrained

    is_file = name.endswith('.safetensors')
    if not is_file and not timm.is_model(name):
        raise InputError(f'timm has no model {name!r}; name a model, or a weight file of training (.safetensors).')
    if device == 'cuda' and not torch.cuda.is_available():
        raise InputError('PyTorch finds no GPU here; use --device cpu.')
    dtype = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}[precision]
    model: Any = load_pretrained(name) if is_file else timm.create_model(name).eval()
    shape = model.pretrained_cfg['input_size']
    memory_format = torch.channels_last if prepared else torch.contiguous_format
    if prepared:
        model = model.fuse() if hasattr(model, 'fuse') else timm.utils.reparameterize_model(model)
    model = model.to(device, dtype, memory_format=memory_format)
    torch.backends.cudnn.allow_tf32 = False  # as ONNX Runtime and TensorRT are told
    torch.backends.cudnn.benchmark = True  # kernels are tried, as ONNX Runtime and TensorRT do
    if compiled:
        mode, dynamic = None, None
        if device == 'cuda':  # a graph for each batch size: one for any keeps the format of convolutions
            mode, dynamic = 'max-autotune', False
            torch._dynamo.config.recompile_limit = 64  # of all networks, as they share their code
        model = torch.compile(model, dynamic=dynamic, mode=mode)

    @torch.inference_mode()
    def call(x: np.ndarray) -> Any:
        batch = torch.from_numpy(x).to(device, dtype, memory_format=memory_format)
        try:
            return model(batch).float().cpu().numpy()
        except torch._dynamo.exc.TorchDynamoException as e:  # the first call compiles
            lines = [line for line in str(e).splitlines() if line.strip() and not line.rstrip().endswith(':')]
            raise InputError(
                f'torch.compile fails here ({lines[0] if lines else type(e).__name__}); install what it needs, a C++ '
                f'compiler on a CPU (g++), or leave out --compile.') from e

    return Contestant(
        f'PyTorch {device.upper()} {"compiled" if compiled else "eager"} {precision}, {name}', call,
        lambda n: np.random.default_rng(0).standard_normal((n, *shape), dtype=np.float32), shape)


def measure(contestants: Sequence[Contestant], batch_sizes: Sequence[int], seconds: float) -> List[Dict[str, Any]]:
    """Time every contestant at every batch size.

    Args:
        contestants: What to time.
        batch_sizes: Images at a time.
        seconds: For each batch size, of all contestants together.

    Returns:
        For each batch size and contestant: name, batch_size, calls, latency_ms by percentile, images_per_second of the
        median.

    Raises:
        InputError: If they take images of different sizes, of which times cannot be compared.
    """
    first, *others = contestants
    if other := next((c for c in others if tuple(c.size) != tuple(first.size)), None):
        raise InputError(
            f'{first.name} takes images of {"x".join(map(str, first.size))} and {other.name} of '
            f'{"x".join(map(str, other.size))}; time them apart, or name the weight file with --torch.')
    rows = []
    for batch_size in tqdm(batch_sizes, desc='Timing', unit='size', leave=False, disable=None):
        inputs = [c.make_input(batch_size) for c in contestants]
        for c, x in zip(contestants, inputs):
            for _ in range(3):  # compilation, CUDA graphs, memory
                c.call(x)
        times: List[List[float]] = [[] for _ in contestants]
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or min(map(len, times)) < 5:
            for c, x, t in zip(contestants, inputs, times):
                turn = _time_calls(c.call, x, TURN)
                t += turn[1:]
        for c, t in zip(contestants, times):
            latency = {f'p{p}': float(np.percentile(t, p) * 1e3) for p in PERCENTILES}
            rows.append(dict(
                name=c.name, batch_size=batch_size, calls=len(t), latency_ms=latency,
                images_per_second=batch_size / latency['p50'] * 1e3))
    return rows


def _time_calls(call: Call, x: np.ndarray, seconds: float) -> List[float]:
    """Seconds of each of as many calls as fit, at least two."""
    times: List[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 2:
        start = time.perf_counter()
        call(x)
        times.append(time.perf_counter() - start)
    return times


def describe_machine(on_gpu: bool = False) -> Dict[str, Any]:
    """Hardware and versions, for the record: the CPU with PyTorch's threads and, where something ran there, the GPU."""
    import importlib.metadata as md

    import torch

    from train.hardware import describe_hardware, find_commit
    versions = {'python': platform.python_version()}
    tensorrt = ('tensorrt', 'tensorrt-cu12', 'tensorrt-cu13', 'tensorrt-rtx')
    for name in ('torch', 'timm', 'onnx', 'onnxruntime', 'onnxruntime-gpu', *tensorrt, 'numpy'):
        try:
            versions[name] = md.version(name)
        except md.PackageNotFoundError:
            pass
    hardware, gpu = describe_hardware(torch.device('cpu')), query_gpu() if on_gpu else None
    return dict(
        hardware=f'{gpu["name"]}, {hardware}' if gpu else hardware, versions=versions, commit=find_commit())


def to_markdown(rows: Sequence[Dict[str, Any]]) -> str:
    """A table, fastest of each batch size in bold."""
    lines = ['| | batch | p10 ms | p50 ms | p90 ms | p99 ms | images/s |', '|---|---|---|---|---|---|---|']
    for row in rows:
        best = max(r['images_per_second'] for r in rows if r['batch_size'] == row['batch_size'])
        rate = f'{row["images_per_second"]:.0f}'
        rate = f'**{rate}**' if row['images_per_second'] == best else rate
        times = ' | '.join(f'{row["latency_ms"][f"p{p}"]:.3g}' for p in PERCENTILES)
        lines.append(f'| {row["name"]} | {row["batch_size"]} | {times} | {rate} |')
    return '\n'.join(lines) + '\n'


def draw(rows: Sequence[Dict[str, Any]], path: Path) -> None:
    """Throughput over batch size, and latency over batch size with the range from p10 to p90."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout='constrained')
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row['name'] for row in rows):
        own = [row for row in rows if row['name'] == name]
        sizes = [row['batch_size'] for row in own]
        left.plot(sizes, [row['images_per_second'] for row in own], 'o-', label=name)
        right.plot(sizes, [row['latency_ms']['p50'] for row in own], 'o-')
        right.fill_between(
            sizes, [row['latency_ms']['p10'] for row in own], [row['latency_ms']['p90'] for row in own], alpha=0.2)
    for axes, label in ((left, 'images/s'), (right, 'latency in ms (median, p10 to p90)')):
        axes.set(xscale='log', yscale='log', xlabel='batch size', ylabel=label)
        axes.set_xticks(sizes, [str(s) for s in sizes])
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    save_figure(figure, path)
