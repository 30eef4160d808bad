"""A model repository for the Triton Inference Server, of ONNX files and TensorRT engines.

    REPOSITORY/NAME/config.pbtxt, labels.txt
    REPOSITORY/NAME/1/model.onnx or model.plan, with its metadata as .json
"""
import errno
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from export.metadata import load_metadata, refuse_failed, sidecar
from export.runtime import CUDA_OPTIONS, ENGINE_SUFFIXES, read_sidecar
from timm_tmblock.errors import InputError
from timm_tmblock.files import writing

DTYPES = {'float32': 'TYPE_FP32', 'uint8': 'TYPE_UINT8'}
BACKENDS = {suffix: ('tensorrt', 'model.plan') for suffix in ENGINE_SUFFIXES}
BACKENDS['.onnx'] = 'onnxruntime', 'model.onnx'
KINDS = ('auto', 'gpu', 'cpu')
# cuDNN's heuristic, as by default the backend searches algorithms for each batch size anew. It reads this option only
# from the parameters, and all others of CUDA only from the accelerator (Triton 24.07 on).
HEURISTIC = 'parameters { key: "cudnn_conv_algo_search" value: { string_value: "1" } }'


@dataclass(frozen=True)
class ServingOptions:
    """How the server runs a model."""
    max_batch: int = 64  # of ONNX files; engines have their own
    instances: int = 1  # on each device
    kind: str = 'auto'  # of KINDS; engines are on the GPU, and refused for 'cpu'
    max_delay: int = 500  # microseconds a request may wait for others to make a batch
    threads: Optional[int] = None  # of each instance on a CPU; ONNX Runtime takes all cores if None


def add_models(repository: Path, paths: Sequence[Path], name: Optional[str], options: ServingOptions) -> List[Path]:
    """Add files to a repository, each a new model or the next version of one that is there with the same settings.

    Args:
        repository: Folder, created if need be.
        paths: .onnx files, and engines with their sidecars.
        name: Of the model they are all versions of; each has its file's name if there is none.
        options: How they are run.

    Returns:
        Folders of the versions.

    Raises:
        InputError: If a file cannot be served, or a model of its name has other settings; nothing is added then.
    """
    models = [_Model.read(path, name, options) for path in paths]
    settings: Dict[str, _Model] = {}
    for model in models:
        same = settings.setdefault(model.name, model)
        there = repository / model.name
        if (same.config, same.labels) != (model.config, model.labels) or (
                there.is_dir() and (_read(there / 'config.pbtxt'), _read(there / 'labels.txt')) != (
                    model.config, model.labels)):
            raise InputError(
                f'{model.path} would be a version of {there}, which has other settings or classes; use the flags it '
                f'was made with, give it a name of its own with --name, or remove that folder to replace it.')
    return [model.write(repository) for model in models]


def _read(path: Path) -> Optional[str]:
    return path.read_text(encoding='utf-8') if path.is_file() else None


@dataclass
class _Model:
    """A file and what the server is told of it."""
    path: Path
    name: str
    config: str
    labels: str

    @classmethod
    def read(cls, path: Path, name: Optional[str], options: ServingOptions) -> '_Model':
        if path.suffix not in BACKENDS:
            raise InputError(f'{path} is neither an .onnx file nor an .engine or .plan.')
        metadata = load_metadata(path)
        refuse_failed(metadata, path)
        if metadata['precision'] == 'bf16' and path.suffix == '.onnx':
            raise InputError(f'{path} is bf16, which ONNX Runtime cannot run; serve an engine built from it, or fp16.')
        if (metadata.get('engine') or {}).get('backend') == 'tensorrt_rtx':
            raise InputError(
                f'{path} is of TensorRT-RTX and Triton runs engines of TensorRT; build it with --backend tensorrt.')
        if not name:  # files of the Hub are all called so
            name = re.sub(r'^model(?=(_(fp16|bf16|int8|int8_tensorrt))?$)', lambda _: metadata['model'], path.stem)
        name = re.sub(r'[^\w-]+', '_', name)
        labels = ''.join(f'{" ".join(class_name.split())}\n' for class_name in metadata['class_names'])  # one a line
        return cls(path, name, create_config(name, path, metadata, options), labels)

    def write(self, repository: Path) -> Path:
        model = repository / self.name
        there = model.is_dir()
        versions = [int(f.name) for f in model.iterdir() if f.name.isdecimal()] if there else []
        folder = model / str(1 + max(versions, default=0))
        try:
            repository.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f'Cannot write {repository}: {e.strerror}.') from e
        with writing(folder if there else _find_place_outside(repository) / self.name, unique=True) as tmp:
            target = tmp if there else tmp / folder.name
            target.mkdir(parents=True)
            file = target / BACKENDS[self.path.suffix][1]
            shutil.copyfile(self.path, file)
            if sidecar(self.path).is_file():
                shutil.copyfile(sidecar(self.path), sidecar(file))
            if not there:
                (tmp / 'config.pbtxt').write_text(self.config, encoding='utf-8', newline='\n')
                # which Triton splits at \n
                (tmp / 'labels.txt').write_text(self.labels, encoding='utf-8', newline='\n')
            _replace(tmp, folder if there else model)
        return folder


def _find_place_outside(repository: Path) -> Path:
    """Where a model is put together, if one may write there: a server that starts meanwhile, or after a killed run,
    takes what lies in its repository for models.
    """
    outside = repository.resolve().parent
    return outside if os.access(outside, os.W_OK) else repository


def _replace(tmp: Path, target: Path) -> None:
    try:
        os.replace(tmp, target)
    except OSError as e:
        if e.errno != errno.EXDEV:
            raise
        with writing(target, unique=True) as inside:  # the repository is a mount
            shutil.copytree(tmp, inside)
            os.replace(inside, target)


def tell_server(paths: Sequence[Path]) -> Tuple[str, List[str]]:
    """Flags that the server has to be told to load the files, with a space before them, and what else it needs."""
    engines = [read_sidecar(path)['engine'] for path in paths if path.suffix in ENGINE_SUFFIXES]
    needs = [
        f'the TensorRT of the server must be {engine["version"]}{" or later" if engine["version_compatible"] else ""}'
        for engine in engines]
    compatible = any(engine['version_compatible'] for engine in engines)  # which hold code that the server runs
    return ' --backend-config=tensorrt,version-compatible=true' if compatible else '', list(dict.fromkeys(needs))


def create_config(name: str, path: Path, metadata: Dict[str, Any], options: ServingOptions) -> str:
    """Text of config.pbtxt.

    Raises:
        InputError: If the options cannot be had.
    """
    backend, filename = BACKENDS[path.suffix]
    engine = metadata.get('engine')
    if engine and options.kind == 'cpu':
        raise InputError(f'{path} is an engine, which runs only on GPUs; give the ONNX file for the CPU.')
    max_batch, preferred, profiles = options.max_batch, '', ''
    if engine:
        max_batch, best = _find_batches(path, engine)
        # a preferred batch of one would be sent off at once, and requests would never wait for others
        # the largest is one, or requests that wait for it would be sent off as several of the others
        preferred = ', '.join(map(str, sorted(size for size in {*best, max_batch} if size > 1)))
        if len(best) > 1:
            profiles = ' profile: [ ' + ', '.join(f'"{i}"' for i in range(len(best))) + ' ]'
    elif isinstance(metadata['input']['shape'][0], int):
        raise InputError(f'{path} takes only one batch size; export it with a dynamic batch.')
    kind = 'gpu' if engine else options.kind
    if kind == 'auto' and (metadata['quantization'] or {}).get('target') == 'cpu':
        kind = 'cpu'
    if options.threads and kind != 'cpu':
        raise InputError(f'--threads is for instances on a CPU, and {path} ' + (
            'is an engine; leave it out.' if engine else 'may be placed on a GPU; add --kind cpu.'))
    lines = [
        f'name: "{name}"',
        f'backend: "{backend}"',
        f'default_model_filename: "{filename}"',
        f'max_batch_size: {max_batch}',
        f'input [ {_tensor(metadata["input"])} ]',
        'output [',
        ',\n'.join(f'  {_tensor(output, labels=i == 0)}' for i, output in enumerate(metadata['outputs'])),
        ']',
        f'instance_group [ {{ count: {options.instances} kind: KIND_{kind.upper()}{profiles} }} ]',
        'dynamic_batching {',
        *([f'  preferred_batch_size: [ {preferred} ]'] if preferred else []),
        f'  max_queue_delay_microseconds: {options.max_delay}',
        '}',
    ]
    if engine:
        lines.append('optimization { cuda { graphs: true } }')
    elif kind != 'cpu':
        cuda = ' '.join(f'parameters {{ key: "{key}" value: "{value}" }}' for key, value in CUDA_OPTIONS.items())
        lines += [
            f'optimization {{ execution_accelerators {{ gpu_execution_accelerator: [ {{ name: "cuda" {cuda} }} ] }} }}',
            HEURISTIC,
        ]
    if options.threads:
        lines.append(
            f'parameters {{ key: "intra_op_thread_count" value: {{ string_value: "{options.threads}" }} }}')
    warmups = [_warmup(size, metadata, engine) for size in sorted({1, max_batch})]
    lines += ['model_warmup [', ',\n'.join(warmups), ']']
    return '\n'.join(lines) + '\n'


def _find_batches(path: Path, engine: Dict[str, Any]) -> Tuple[int, List[int]]:
    """The largest batch of an engine, and the preferred one of each profile.

    Raises:
        InputError: If it does not take every number of images up to the largest.
    """
    smallest, best, largest = zip(*([shape[0] for shape in profile] for profile in engine['profiles']))
    if min(smallest) > 1:
        raise InputError(
            f'{path} takes no batch below {min(smallest)}, but requests come one by one; build it with --batch 1 '
            f'{best[0]} {largest[0]}.')
    reach = 0
    for low, high in sorted(zip(smallest, largest)):
        if low > reach + 1:
            raise InputError(
                f'{path} takes no batch between {reach} and {low}, but requests are batched as they come; build it '
                f'with profiles that meet.')
        reach = max(reach, high)
    return reach, [*best]


def _dims(shape: List[Any]) -> str:
    """Without the batch; axes that vary are -1."""
    return ', '.join(str(n) if isinstance(n, int) else '-1' for n in shape[1:])


def _tensor(described: Dict[str, Any], labels: bool = False) -> str:
    label = ' label_filename: "labels.txt"' if labels else ''
    return (
        f'{{ name: {json.dumps(described["name"])} data_type: {DTYPES[described["dtype"]]} '
        f'dims: [ {_dims(described["shape"])} ]{label} }}')


def _warmup(batch_size: int, metadata: Dict[str, Any], engine: Optional[Dict[str, Any]]) -> str:
    tensor = metadata['input']
    channels, height, width = metadata['preprocessing']['input_size']
    size = [height, width, channels] if tensor['layout'] == 'NHWC' else [channels, height, width]
    if engine:  # a size the profile has
        size = engine['profiles'][0][1][1:]
    return (
        f'  {{ name: "batch_{batch_size}" batch_size: {batch_size} '
        f'inputs {{ key: {json.dumps(tensor["name"])} value {{ data_type: {DTYPES[tensor["dtype"]]} '
        f'dims: [ {", ".join(map(str, size))} ] random_data: true }} }} }}')
