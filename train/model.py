"""The network to train: its name, its image size, and what is left of it after training."""
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from copy import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Iterator, List, Optional, Tuple

import timm
import torch
from accelerate import Accelerator
from timm.layers import to_2tuple
from timm.models import PretrainedCfg
from timm.models._input import get_model_args
from timm.utils import unwrap_model

from timm_tmblock.auxiliary import PatchSupervised
from timm_tmblock.checkpoint import (
    check_file_is_loaded,
    check_model,
    check_tag,
    copy_tensors,
    count_classes,
    load_model,
    read_description,
    save_weights,
)
from timm_tmblock.errors import FULL_DISK, InputError, say_why_not_loaded
from timm_tmblock.models._labels import list_class_names
from train.config import refusing
from train.data import check_classes


def check_model_name(name: str) -> None:
    if not timm.is_model(name):
        if name.startswith(('hf-hub:', 'hf_hub:', 'local-dir:')):
            raise InputError(
                f'--model takes names registered with timm; to begin with the weights of {name}, name its architecture '
                f'(in its config.json) with --model, and its model.safetensors, beside that config.json, with '
                f'--initial-checkpoint.')
        near = timm.list_models(f'*{name[:4]}*')[:5] or timm.list_models('*_tm')
        raise InputError(f'timm has no model {name!r}; is it one of {", ".join(near)}?')
    check_tag(name)


def resolve_img_size(args: Namespace, cfg: PretrainedCfg) -> Tuple[int, int]:
    """Image size. `--img-size` becomes an argument of models whose layout depends on it."""
    has_layout = cfg.fixed_input_size or timm.model_entrypoint(args.model).__module__.startswith('timm_tmblock.')
    if args.img_size and has_layout:  # over the one of a recipe, of a run that goes on, or of a checkpoint
        args.model_kwargs.pop('img_size', None)
        if to_2tuple(args.img_size) != tuple(cfg.input_size[1:]):
            args.model_kwargs['img_size'] = copy(args.img_size)  # or YAML would write a reference
    return to_2tuple(args.model_kwargs.get('img_size') or args.img_size or cfg.input_size[1:])


def take_up_checkpoint(args: Namespace) -> None:
    """Let what `--initial-checkpoint` was trained with be the default of a run that begins with it.

    Raises:
        InputError: If it cannot be read, or is of another model.
    """
    if not args.initial_checkpoint or args.resume:  # a run that goes on has its settings written down
        return
    description = read_description(args.initial_checkpoint)
    check_model(args.initial_checkpoint, description, args.model)
    # templates are of the classes, which may be others now
    sized = 'img_size' in args.model_kwargs
    kept = {k: v for k, v in description.get('model_args', {}).items() if k != 'num_templates'}
    if kept:  # timm writes down what the network has without them, too
        with torch.random.fork_rng(devices=[]), refusing(f'The network {args.model}'):
            plain = get_model_args(timm.create_model(args.model))
        kept = {k: v for k, v in kept.items() if _to_list(v) != _to_list(plain.get(k))}
    args.model_kwargs = {**kept, **args.model_kwargs}
    cfg = timm.get_pretrained_cfg(args.model) or PretrainedCfg()
    channels = args.model_kwargs.get('in_chans', cfg.input_size[0])
    for key in ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode'):
        if getattr(args, key) is None:
            value = description.get(key)
            if key in ('mean', 'std') and value and len(value) != channels:  # grey of colours, or the reverse
                value = [sum(value) / len(value)] * channels
            setattr(args, key, value)
    _, height, width = description.get('input_size', cfg.input_size)
    if args.img_size is None and not sized and (height, width) != tuple(cfg.input_size[1:]):
        args.img_size = height if height == width else [height, width]


def _to_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_weights(args: Namespace, folder: Path, class_names: List[str]) -> None:
    """Refuse weights of other classes where they go on or are measured; elsewhere a new classifier takes their place.

    Raises:
        InputError: For those.
    """
    file = folder / 'last.safetensors' if args.resume else args.initial_checkpoint if args.eval_only else None
    if file is not None and Path(file).is_file():
        description = read_description(file)
        number = description.get('num_classes') or count_classes(str(file), args.model)
        if not number:  # of a network whose classifier timm does not name
            return
    elif args.eval_only and args.pretrained:
        description, file = vars(timm.get_pretrained_cfg(args.model) or PretrainedCfg()), args.model
        number = description['num_classes']
    else:
        return
    names = list_class_names(description) or [f'class {i}' for i in range(number)]
    check_classes(str(file), names, args.dataset, class_names)


def create_model(args: Namespace, class_names: List[str]) -> torch.nn.Module:
    overlay: Optional[Dict[str, Any]] = None
    if args.initial_checkpoint and not args.resume:
        description = read_description(args.initial_checkpoint)
        # the classifier is kept where the number of classes is the same, as with any weights of timm
        cfg = timm.get_pretrained_cfg(args.model)
        num_classes = description.get('num_classes')
        if num_classes is None:
            found = count_classes(args.initial_checkpoint, args.model, 0)
            num_classes = len(class_names) if found is None else found
        overlay = dict(file=args.initial_checkpoint, num_classes=num_classes)
        if cfg and 'input_size' in description:  # for the channels, which timm fits to those of the network
            overlay.update(input_size=(description['input_size'][0], *cfg.input_size[1:]))
    templates = args.model_kwargs.get('num_templates', len(class_names))
    if templates != len(class_names):
        raise InputError(
            f'num_templates={templates} is not one template for each of the {len(class_names)} classes, as the patch '
            f'loss needs; leave it out.')
    pretrained = args.pretrained and not args.resume and overlay is None
    with refusing(f'These settings of {args.model}'), (
            _refusing_weights_out_of_reach(args.model) if pretrained else nullcontext()):
        if overlay and not description and num_classes != len(class_names):
            # timm, which leaves out their classifier, would pass over other weights that are missing, too
            with torch.random.fork_rng(devices=[]):
                timm.create_model(
                    args.model, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes,
                    **args.model_kwargs)
        model = timm.create_model(
            args.model,
            pretrained=overlay is not None or pretrained,
            pretrained_cfg_overlay=overlay,
            num_classes=len(class_names),
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,  # left out where it is None, for networks without
            **args.model_kwargs,
        )
        if overlay:
            check_file_is_loaded(model, args.initial_checkpoint)
        if getattr(model, 'has_template_matching', False) and 'num_templates' not in args.model_kwargs:
            if model.get_patch_classifier().num_templates != len(class_names):  # those of the classes before
                model.reset_templates(len(class_names))
        for asked, method in (
                (args.grad_checkpointing, 'set_grad_checkpointing'), (args.clip_mode == 'agc', 'get_classifier')):
            if asked and not hasattr(model, method):
                raise InputError(f'{args.model} has no method {method}, which these flags need; add it.')
        if args.grad_checkpointing:
            model.set_grad_checkpointing(True)
        return PatchSupervised(model) if args.aux_head else model


def check_loads_back(model: torch.nn.Module, description: Dict[str, Any]) -> None:
    """
    Raises:
        InputError: If the function of a network of one's own does not load the weights that a run would write.
    """
    weights = copy_tensors(network(model).state_dict(), 'cpu')
    with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        path = Path(folder) / 'weights.safetensors'
        save_weights(path, weights, description)
        loaded = load_model(path).state_dict()
    if not all(torch.equal(v, loaded[k]) for k, v in weights.items()):
        raise InputError(
            f'{description["model"]} does not load its own weights; let its function return '
            f'timm.models.build_model_with_cfg(...).')


@contextmanager
def _refusing_weights_out_of_reach(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:  # of the Hub and the network
        if e.errno in FULL_DISK:
            raise
        raise InputError(
            f'The pretrained weights of {name} cannot be fetched ({say_why_not_loaded(e)}); connect to the internet, '
            f'download them beforehand, or leave out --pretrained.') from e


def network(model: torch.nn.Module) -> torch.nn.Module:
    """The plain network: without what distributes, compiles or supervises it."""
    model = unwrap_model(model)
    return model.model if isinstance(model, PatchSupervised) else model


def network_weights(model: torch.nn.Module, accelerator: Accelerator) -> Dict[str, torch.Tensor]:
    """Weights of `network(model)`, gathered where processes share them out. All processes call this."""
    weights = {k.removeprefix('_orig_mod.'): v for k, v in accelerator.get_state_dict(model).items()}
    if isinstance(unwrap_model(model), PatchSupervised):
        return {k.removeprefix('model.'): v for k, v in weights.items() if k.startswith('model.')}
    return weights
