"""What a file says of itself, so that somebody who has nothing else classifies correctly.

The metadata are one JSON object. An ONNX file holds it in its properties, a string for each key (structured
values as JSON), and a sidecar FILE.json holds it as it is. An engine has the sidecar alone.

The keys are described in runtime.py, which lies beside published files.
"""
import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

import safetensors.torch
import timm
import torch.nn as nn

from export.runtime import (
    ENGINE_SUFFIXES,
    METADATA_VERSION,
    RuntimeInputError,
    check_built,
    check_metadata,
    is_described,
    parse_properties,
    read_file,
    read_sidecar,
)
from export.runtime import sidecar as sidecar
from timm_tmblock._version import __version__
from timm_tmblock.errors import InputError
from timm_tmblock.files import writing
from timm_tmblock.models._labels import list_class_names

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


PRECISIONS = ('fp32', 'fp16', 'bf16', 'int8')
TARGETS = ('cpu', 'tensorrt')  # of int8, which need different files
REQUIRED = ('model', 'weights_sha256', 'class_names', 'input', 'preprocessing', 'outputs', 'precision', 'quantization')


def describe_model(model: Any, config: Dict[str, Any]) -> Dict[str, Any]:
    """The metadata that do not depend on the format.

    Raises:
        InputError: For a network whose images are not prepared as an exported file does.
    """
    cfg = model.pretrained_cfg
    check_preprocessing(config)
    names = list_class_names(cfg)
    return dict(
        metadata_version=METADATA_VERSION,
        model=str(cfg['architecture']),
        weights_sha256=hash_weights(model),
        versions=dict(timm_tmblock=__version__, timm=timm.__version__),
        license=cfg.get('license'),
        # those of other classes stay in pretrained_cfg where a new classifier took the place of theirs
        class_names=names if len(names) == model.num_classes else [f'class {i}' for i in range(model.num_classes)],
        preprocessing=dict(
            input_size=list(config['input_size']),
            color='L' if config['input_size'][0] == 1 else 'RGB',
            interpolation=config['interpolation'],
            crop_pct=config['crop_pct'],
            **({'crop_mode': 'squash'} if config.get('crop_mode') == 'squash' else {}),
            mean=list(config['mean']),
            std=list(config['std']),
        ),
    )


def check_preprocessing(config: Dict[str, Any]) -> None:
    """
    Raises:
        InputError: For images that are neither grey nor in colour, or are to have borders.
    """
    if config['input_size'][0] not in (1, 3):
        raise InputError(f'The network takes {config["input_size"][0]} channels; images have 1 or 3.')
    if config.get('crop_mode', 'center') not in ('center', 'squash'):
        raise InputError(
            f"The network takes images by crop_mode {config['crop_mode']!r}, and an exported file adds no borders; set "
            f"pretrained_cfg['crop_mode'] to 'center' or 'squash' if that will do.")


def find_difference(described: Dict[str, Any], other: Dict[str, Any]) -> Optional[str]:
    """What differs if two descriptions are of different networks, else None."""
    names = dict(weights_sha256='weights', class_names='class names', preprocessing='preprocessing')
    return next((name for key, name in names.items() if described.get(key) != other.get(key)), None)


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of the weights as a safetensors file without metadata."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    return hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()


def to_properties(metadata: Dict[str, Any]) -> Dict[str, str]:
    """Metadata as properties of an ONNX file."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}


def write_sidecar(path: Path, metadata: Dict[str, Any]) -> None:
    """Write the metadata of a file beside it, with the file's hash and size."""
    target = sidecar(path)
    with writing(target, unique=True) as tmp:
        tmp.write_text(_describe_file(path, metadata))
        os.replace(tmp, target)


def replace_with_sidecar(tmp: Path, path: Path, metadata: Dict[str, Any]) -> None:
    """Give a finished file its name, and a sidecar; on a full disk the pair of before stays whole.

    A reader that comes between the two finds the sidecar of before, which its hash tells.
    """
    target = sidecar(path)
    with writing(target, unique=True) as tmp_sidecar:
        tmp_sidecar.write_text(_describe_file(tmp, metadata))
        with _locking(path.parent):
            os.replace(tmp, path)
            os.replace(tmp_sidecar, target)


@contextlib.contextmanager
def _locking(folder: Path) -> Iterator[None]:
    """Keep other writers out, so that of two that write one file the last has both names, where the system can."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _describe_file(path: Path, metadata: Dict[str, Any]) -> str:
    content = path.read_bytes()
    own = dict(file_sha256=hashlib.sha256(content).hexdigest(), file_bytes=len(content))
    return json.dumps({**metadata, **own}, indent=1) + '\n'


def read_metadata(path: Path, properties: Dict[str, str]) -> Dict[str, Any]:
    """The metadata of an ONNX file, from its properties or, where another tool dropped them, the sidecar.

    Raises:
        InputError: If there are none, only a part, or of another version.
    """
    metadata = parse_properties(properties)
    try:
        if 'metadata_version' not in metadata and sidecar(path).is_file():
            metadata = read_sidecar(path)
        if 'metadata_version' not in metadata:
            advice = 'build it with python -m export tensorrt' if path.suffix in ENGINE_SUFFIXES else (
                f'give a file of python -m export onnx, or put its metadata beside it as {sidecar(path).name}')
            raise InputError(f'{path} does not say its classes and preprocessing; {advice}.')
        missing = [key for key in REQUIRED if key not in metadata]
        if missing and metadata['metadata_version'] == METADATA_VERSION:
            raise InputError(f'{path} lacks a part of its metadata, {missing[0]}; export it again.')
        check_metadata(metadata, path)
    except RuntimeInputError as e:
        raise InputError(str(e)) from e
    return metadata


def refuse_failed(metadata: Dict[str, Any], path: Path) -> None:
    """
    Raises:
        InputError: If the file was kept although it does not give what PyTorch gives.
    """
    failed = (metadata.get('parity') or {}).get('failed')
    if failed:
        raise InputError(
            f'{path} failed its comparison with PyTorch ({failed.rstrip(".")}); export it with other settings.')


def load_metadata(path: Path) -> Dict[str, Any]:
    """The metadata of an ONNX file or an engine.

    Raises:
        InputError: If there is no such file, it is cut short, says nothing of itself, or is an engine that its sidecar
            is not of.
        RuntimeInputError: If it cannot be read, is a Git LFS pointer, or an engine's sidecar tells of no engine.
    """
    if not path.is_file():
        raise InputError(f'There is no file {path}.')
    content = read_file(path)
    if path.suffix != '.onnx':
        metadata = read_metadata(path, {})
        if path.suffix in ENGINE_SUFFIXES:
            check_built(metadata, path)
            if not is_described(content, metadata):
                raise InputError(f'{path} does not match its sidecar: another file, or cut short; build it again.')
        return metadata
    import onnx
    from google.protobuf.message import DecodeError
    try:
        proto = onnx.load_from_string(content)
    except DecodeError as e:
        raise InputError(f'{path} is cut short or not an ONNX file; export it again.') from e
    metadata = read_metadata(path, {p.key: p.value for p in proto.metadata_props})
    dims = proto.graph.input[0].type.tensor_type.shape.dim  # another tool may have fixed the batch
    metadata['input']['shape'] = [d.dim_value if d.HasField('dim_value') else d.dim_param for d in dims]
    return metadata
