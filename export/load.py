"""Finding the network to export."""
from pathlib import Path
from typing import Optional

import timm
import torch.nn as nn

import timm_tmblock  # noqa: F401  registers the models
from timm_tmblock.checkpoint import load_model
from timm_tmblock.errors import InputError


def load(name: str, checkpoint: Optional[Path] = None) -> nn.Module:
    """A network in evaluation mode, with the weights of a checkpoint or its pretrained ones.

    Raises:
        InputError: If there is no such model, it has no weights, or the checkpoint is of another one.
    """
    if checkpoint is not None:
        return load_model(checkpoint, name)
    try:
        return timm.create_model(name, pretrained=True).eval()
    except RuntimeError as e:
        raise InputError(f'{e} Give weights with --checkpoint, or one of timm.list_pretrained().') from e
