"""Finding the network to export."""
from pathlib import Path
from typing import Optional

import timm
import torch.nn as nn
from safetensors import SafetensorError

import timm_tmblock  # noqa: F401  registers the models
from timm_tmblock.checkpoint import load_model
from timm_tmblock.errors import InputError
from timm_tmblock.models._base import TemplateMatchingNet


def load_pretrained(name: str) -> nn.Module:
    """Any model of timm's with its pretrained weights, in evaluation mode.

    Raises:
        InputError: If there is no such model, or it has none.
    """
    try:
        return timm.create_model(name, pretrained=True).eval()
    except (RuntimeError, ValueError, TypeError, OSError, KeyError, SafetensorError) as e:  # of timm and the Hub
        reason = str(e).strip().split('\n')[0]
        raise InputError(
            f'{name} is no model with weights ({reason}); name one of timm.list_pretrained(), or give a weight file of '
            f'training (*.safetensors) in its place.') from e


def load(name: str, checkpoint: Optional[Path] = None) -> nn.Module:
    """A network in evaluation mode, with its weights.

    Args:
        name: Name registered with timm, its pretrained weights unless `checkpoint` is given; 'hf-hub:USER/NAME' or
            'local-dir:FOLDER'; or a weight file that training wrote.
        checkpoint: Weights for a registered name.

    Raises:
        InputError: If there is no such model, it has no weights, or the checkpoint is of another one.
    """
    if checkpoint is not None:
        model = load_model(checkpoint, name)
    elif name.endswith('.safetensors'):
        model = load_model(name)
    else:
        model = load_pretrained(name)
    check_network(model, name)
    return model


def check_network(model: nn.Module, name: str) -> None:
    """
    Raises:
        InputError: For other networks than those of this project.
    """
    if not isinstance(model, TemplateMatchingNet):
        raise InputError(f'{name} is no network of this project; timm\'s onnx_export.py exports it.')
