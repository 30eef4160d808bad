"""The network to train: its name, its image size, and what is left of it after training."""
from argparse import Namespace
from typing import List, Tuple

import timm
import torch
from timm.layers import to_2tuple
from timm.models import PretrainedCfg
from timm.utils import unwrap_model

from timm_tmblock.auxiliary import PatchSupervised
from timm_tmblock.errors import InputError
from train.config import refusing


def check_model_name(name: str) -> None:
    if not timm.is_model(name):
        near = timm.list_models(f'*{name[:4]}*')[:5] or timm.list_models(module='resnet', filter='rn*')
        raise InputError(f'timm has no model {name!r}; is it one of {", ".join(near)}?')


def resolve_img_size(args: Namespace, cfg: PretrainedCfg) -> Tuple[int, int]:
    """Image size. `--img-size` becomes an argument of models whose layout depends on it."""
    has_layout = cfg.fixed_input_size or timm.model_entrypoint(args.model).__module__.startswith('timm_tmblock.')
    if args.img_size and has_layout:
        args.model_kwargs.setdefault('img_size', args.img_size)
    return to_2tuple(args.model_kwargs.get('img_size') or args.img_size or cfg.input_size[1:])


def create_model(args: Namespace, class_names: List[str]) -> torch.nn.Module:
    with refusing(f'These settings of {args.model}'):
        model = timm.create_model(
            args.model,
            pretrained=args.pretrained,
            num_classes=len(class_names),
            drop_rate=args.drop,
            **args.model_kwargs,
        )
        return PatchSupervised(model) if args.aux_head else model


def network(model: torch.nn.Module) -> torch.nn.Module:
    """What is left of a model after training."""
    model = unwrap_model(model)
    return model.model if isinstance(model, PatchSupervised) else model
