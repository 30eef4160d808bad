"""Weight files that say what they are: safetensors with a description of the model in the metadata.

timm loads them as any other weights; `load_model` also restores architecture, class names and preprocessing.
"""
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Optional, Union

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models import load_state_dict
from timm.models._hub import load_model_config_from_path

from .errors import InputError, say_why_not_loaded
from .files import writing

# fields of the description that timm keeps in pretrained_cfg under the same name
_PRETRAINED_CFG_KEYS = (
    'num_classes', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'label_names')


def copy_tensors(state_dict: Dict[str, torch.Tensor], device: Optional[str] = None) -> Dict[str, torch.Tensor]:
    """Contiguous copies: safetensors refuses tensors that share memory, as those of tied weights do."""
    return {k: v.detach().to(device).clone(memory_format=torch.contiguous_format) for k, v in state_dict.items()}


def save_weights(path: Union[str, Path], state_dict: Dict[str, torch.Tensor], description: Dict[str, Any]) -> None:
    """Write weights and what they are.

    Args:
        path: File to write, `*.safetensors`.
        state_dict: Weights.
        description: `model` and `model_args` for `timm.create_model`, and `num_classes`, `input_size`, `mean`, `std`,
            `interpolation`, `crop_pct`, `crop_mode`, `label_names` as in timm's pretrained_cfg. JSON-serialisable.

    Raises:
        InputError: If the file cannot be written.
    """
    path = Path(path)
    tensors = copy_tensors(state_dict, 'cpu')
    with writing(path) as tmp:
        # not save_file, whose files only their owner may read
        tmp.write_bytes(_sort_metadata(save(tensors, {'format': 'pt', 'timm_tmblock': json.dumps(description)})))
        os.replace(tmp, path)


def _sort_metadata(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted: as saved, their order is random, and so would be the file's hash."""
    size = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:8 + size])
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    text += b' ' * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, 'little') + text + data[8 + size:]


def read_description(path: Union[str, Path]) -> Dict[str, Any]:
    """The description that `save_weights` put into a file, or that of config.json beside timm's model.safetensors.

    Empty for a file of another origin.

    Raises:
        InputError: If there is no such file, or it is neither a safetensors file nor named as one of torch.save.
    """
    if _is_of_torch(path) and Path(path).is_file():
        return {}
    try:
        with safe_open(path, framework='pt') as f:
            return json.loads((f.metadata() or {}).get('timm_tmblock', '{}')) or _read_config(Path(path))
    except FileNotFoundError as e:
        raise InputError(f'There is no checkpoint {path}.') from e
    except (SafetensorError, OSError) as e:
        with suppress(OSError), open(path, 'rb') as f:
            if f.read(23) == b'version https://git-lfs':
                raise InputError(
                    f'{path} is a Git LFS pointer, not the file itself; install git-lfs and run git lfs '
                    f'pull.') from e
        raise InputError(f'{path} is not a whole safetensors file ({e}); give one that training wrote.') from e


def _read_config(path: Path) -> Dict[str, Any]:
    """The description of a folder of timm's or of the Hub, by its weight file; empty for other files."""
    if path.name != 'model.safetensors':
        return {}
    try:
        cfg, name, model_args = load_model_config_from_path(path.parent)
        model_args = {k: v for k, v in model_args.items() if k != 'num_classes'}
        return dict(model=name, model_args=model_args, **{k: cfg[k] for k in _PRETRAINED_CFG_KEYS if k in cfg})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_of_torch(path: Union[str, Path]) -> bool:
    return Path(path).suffix in ('.pth', '.pt', '.tar', '.bin')  # such as timm's own checkpoints


def load_model(path: Union[str, Path], model_name: Optional[str] = None) -> torch.nn.Module:
    """Create the model whose weights a file holds, in evaluation mode, with its classes and preprocessing.

    Args:
        path: File written by `save_weights`, or weights of `model_name` from elsewhere, of torch.save too.
        model_name: Name registered with timm; the description's if None.

    Raises:
        InputError: If the file cannot be read, or is of another model.
    """
    description = read_description(path)
    name = model_name or description.get('model')
    if name is None:
        raise InputError(f'{path} does not say which model it is of; name that too (MODEL --checkpoint FILE).')
    check_model(path, description, name)
    if not timm.is_model(name):
        raise InputError(f'timm has no model {name!r}; timm.list_models("*_tm*") lists those with template matching.')
    check_tag(name)
    overlay = {k: tuple(v) if k in ('input_size', 'mean', 'std') else v  # of JSON, which has lists
               for k, v in description.items() if k in _PRETRAINED_CFG_KEYS}
    overlay['license'] = None  # which is for those who trained the weights to say
    if not description:
        num_classes = count_classes(path, name)
        if num_classes is None:
            raise InputError(
                f'{path} does not say its classes, and the pretrained configuration of {name} names no classifier; add '
                f'one, or give a file that training wrote.')
        overlay.update(num_classes=num_classes, label_names=None)  # of which classes, nobody knows
    try:
        model = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay=dict(overlay, file=str(path)),
            **description.get('model_args', {}),
        )
        weights = load_state_dict(str(path)) if description else {}
        if weights.keys() == model.state_dict().keys():  # some functions replace layers after timm has loaded them
            model.load_state_dict(weights)
    except (RuntimeError, ValueError, TypeError, KeyError) as e:
        raise InputError(f'{path} does not hold weights of {name}: {say_why_not_loaded(e)}') from e
    check_file_is_loaded(model, path)
    return model.eval()


def check_file_is_loaded(model: torch.nn.Module, path: Union[str, Path]) -> None:
    """
    Raises:
        InputError: If the function that creates the model takes no weights, as one's own may.
    """
    if (getattr(model, 'pretrained_cfg', None) or {}).get('file') != str(path):
        raise InputError(
            f'{type(model).__name__} was created without the weights of {path}; let its function return '
            f'timm.models.build_model_with_cfg(...).')


def load_pretrained(source: str, checkpoint: Optional[Union[str, Path]] = None) -> torch.nn.Module:
    """Create a model with its weights, in evaluation mode.

    Args:
        source: Name of any model of timm's with pretrained weights, 'hf-hub:USER/NAME', 'local-dir:FOLDER', or a weight
            file that training wrote.
        checkpoint: Weight file for a registered name, in place of its pretrained weights.

    Raises:
        InputError: If there is no such model, it has no weights, or the file is of another one.
    """
    if checkpoint is not None:
        return load_model(checkpoint, source)
    if source.endswith('.safetensors'):
        return load_model(source)
    if _is_of_torch(source) and Path(source).is_file():
        raise InputError(
            f'{source} does not say which network it is of; name the network, and this file with --checkpoint '
            f'(load_model(file, name) in Python).')
    try:
        return timm.create_model(source, pretrained=True).eval()
    except Exception as e:  # the network, the Hub, safetensors and timm have errors of their own
        raise InputError(
            f'{source} is not a model with pretrained weights ({say_why_not_loaded(e)}); name one of '
            f'timm.list_pretrained(), or a weight file that training wrote (*.safetensors).') from e


def check_tag(name: str) -> None:
    """
    Raises:
        InputError: If the model, which is registered, has no such pretrained tag.
    """
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as e:
        base, _, tag = name.partition('.')
        tags = [m.partition('.')[2] for m in timm.list_models(f'{base}.*', include_tags=True)]
        raise InputError(f'{base} has no tag {tag!r}; it has {", ".join(filter(None, tags))}.') from e


def check_model(path: Union[str, Path], description: Dict[str, Any], name: str) -> None:
    """Refuse weights of another network than `name`, whatever the pretrained tag.

    Raises:
        InputError: For those.
    """
    described = description.get('model', name)
    if described.partition('.')[0] != name.partition('.')[0]:
        raise InputError(f'{path} holds weights of {described}, not of {name}.')


def count_classes(path: Union[str, Path], name: str, default: Optional[int] = None) -> Optional[int]:
    """How many classes the classifier in a weight file has, None where timm does not name the model's classifier.

    Args:
        path: Weight file.
        name: Model it is of.
        default: What to return if it has no classifier.

    Raises:
        InputError: If it cannot be read, or has no classifier and there is no default.
    """
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.classifier:
        return None
    classifier = cfg.classifier
    if isinstance(classifier, (tuple, list)):  # of a network with several
        classifier = classifier[0]
    key = f'{classifier}.weight'
    if _is_of_torch(path):
        shapes = {k: list(v.shape) for k, v in _read_torch(path).items() if isinstance(v, torch.Tensor)}
    else:
        with safe_open(path, 'pt') as file:
            shapes = {k: file.get_slice(k).get_shape() for k in file.keys()}
    if key not in shapes:
        if default is not None:
            return default
        raise InputError(f'{path} does not hold weights of {name}: it has no {key}.')
    return int(shapes[key][0])


def _read_torch(path: Union[str, Path]) -> Dict[str, torch.Tensor]:
    try:
        return load_state_dict(str(path))  # nothing but weights is unpickled
    except (RuntimeError, ValueError, EOFError, AttributeError, OSError) as e:
        raise InputError(f'{path} cannot be read as weights: {say_why_not_loaded(e)}') from e
