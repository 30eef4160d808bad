"""Finding the network to export."""
from pathlib import Path
from typing import Optional

import torch.nn as nn

import timm_tmblock  # noqa: F401  registers the models
from timm_tmblock.checkpoint import load_pretrained
from timm_tmblock.errors import InputError
from timm_tmblock.models._base import TemplateMatchingNet


def load(name: str, checkpoint: Optional[Path] = None) -> nn.Module:
    """A network in evaluation mode, with its weights.

    Args:
        name: Name registered with timm, its pretrained weights unless `checkpoint` is given; 'hf-hub:USER/NAME' or
            'local-dir:FOLDER'; or a weight file that training wrote.
        checkpoint: Weights for a registered name.

    Raises:
        InputError: If there is no such model, it has no weights, or the checkpoint is of another one.
    """
    model = load_pretrained(name, checkpoint)
    check_network(model, name)
    return model


def check_network(model: nn.Module, name: str) -> None:
    """
    Raises:
        InputError: For other networks than those of this project.
    """
    if not isinstance(model, TemplateMatchingNet):
        raise InputError(f'{name} is not a network of this project; timm\'s onnx_export.py exports it.')
