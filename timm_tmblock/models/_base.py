""" What all the networks share: head, features, patch logits, templates and pretrained weights
"""
import logging
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier, get_device_dtype, to_2tuple
from timm.models import build_model_with_cfg, get_pretrained_cfg, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from timm.models._manipulate import MATCH_PREV_GROUP
from timm.utils import reparameterize_model

from ..layers import TemplateMatching
from ..layers.patch_mean import check_patch_size
from ..layers.template_matching import FusedTemplateMatching
from ._labels import CIFAR10_LABELS, CIFAR100_LABELS

_logger = logging.getLogger(__name__)


class TemplateMatchingNet(nn.Module):
    """Base of networks with or without a template matching block before their last stage.

    A subclass builds its modules in the order they run, `tm` among them (Identity in a baseline), then the final
    `norm`, and calls `_create_head` and `init_weights`. It defines `_forward_trunk`, all up to `tm`, and
    `_forward_last`, all after it.

    `img_size` is the size the network is configured for, not a limit: `extra_halvings` of the resolution, so that
    patches are matched on a map of 8x8 at 32, 64 and 128 pixels, up to 16x16 between them, larger above 256 (twice as
    wide in RN20), and patches half as wide as that map. Parameters are the same for every size, so weights of one size
    are a starting point for another.

    The patch logits (B, K, H/r, W/r), r = `patch_reduction`, are returned beside the logits by `forward_patch_logits`,
    and by `forward` in training once `set_patch_supervision` switched them on.
    """
    feature_info: List[Dict[str, Any]]
    patch_reduction: int
    patch_size: int
    pool_size: Tuple[int, int]  # of the last feature map at img_size
    if TYPE_CHECKING:
        tm: Any

        def _forward_trunk(self, x: torch.Tensor) -> torch.Tensor: ...

        def _forward_last(self, x: torch.Tensor) -> torch.Tensor: ...

    def __init__(
            self,
            num_classes: int,
            in_chans: int,
            img_size: Union[int, Tuple[int, int]],
            drop_rate: float,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = to_2tuple(img_size)
        if min(self.img_size) < 4:
            raise ValueError(f'img_size must be at least 4 pixels, got {img_size}.')
        self.extra_halvings = count_extra_halvings(self.img_size)
        self.drop_rate = drop_rate
        self.patch_supervision = False

    @staticmethod
    def count_features(img_size: Tuple[int, int]) -> int:
        """Number of feature maps `features_only` gives, each of another resolution."""
        return 3

    def _create_tm(
            self,
            template_matching: bool,
            dim: int,
            map_size: Tuple[int, int],
            reduction: int,
            num_templates: Optional[int],
            patch_size: Optional[int],
            **kwargs,
    ) -> nn.Module:
        """The block, or Identity for a baseline.

        Args:
            template_matching: Whether there is a block.
            dim: Channels of the map patches are matched on.
            map_size: Height and width of that map at `img_size`.
            reduction: Pixels of the image to a pixel of that map.
            num_templates: Number of templates, `num_classes` if None.
            patch_size: Side of the patches, half the shorter side of the map if None (section 3.3).

        Raises:
            ValueError: If templates are asked for without template matching, their number cannot be determined, or
                `patch_size` is not a whole number of at least 1.
        """
        self.has_template_matching = template_matching
        self.patch_channels = dim
        self.patch_reduction = reduction
        self.patch_size = max(1, min(map_size) // 2) if patch_size is None else check_patch_size(patch_size)
        if not template_matching:
            if num_templates is not None:
                raise ValueError('num_templates needs template_matching=True; the baselines have no templates.')
            return nn.Identity()
        if num_templates is None:
            num_templates = self.num_classes
            if num_templates < 1:
                raise ValueError(f'num_templates must be given when num_classes is {num_templates}.')
        return TemplateMatching(dim, num_templates, self.patch_size, **kwargs)

    def _create_head(self, num_features: int, global_pool: str, device=None, dtype=None) -> None:
        self.num_features = num_features
        self._body = [name for name, _ in self.named_children()]
        self.global_pool, self.head_drop, self.fc = create_classifier(
            num_features, self.num_classes, pool_type=global_pool, drop_rate=self.drop_rate, device=device, dtype=dtype)
        self.head_hidden_size = num_features * self.global_pool.feat_mult()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Create regex patterns for parameter grouping."""
        return dict(
            stem=r'^conv1',
            blocks=[
                (r'^layer([123])' if coarse else r'^layer([123])\.blocks\.(\d+)', None),
                (r'^transition(\d)', MATCH_PREV_GROUP),
                (r'^tm', (3, 99)),  # between stages 3 and 4
                (r'^layer(4)' if coarse else r'^layer(4)\.blocks\.(\d+)', None),
                (r'^norm', MATCH_PREV_GROUP),
            ],
        )

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialize all parameters and buffers, Kaiming normal (fan-out) for convolutions without bias.

        The matching convolution, which has one, keeps PyTorch's default, as the classifier does.
        """
        for m in self.modules():
            reset_parameters = getattr(m, 'reset_parameters', None)
            if reset_parameters is not None:
                reset_parameters()
            if isinstance(m, nn.Conv2d) and m.bias is None:
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')

    def extra_repr(self) -> str:
        return f'img_size={self.img_size}, patch_size={self.patch_size}, patch_reduction={self.patch_reduction}'

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing."""
        m: Any
        for m in self.modules():
            if hasattr(m, 'grad_checkpointing'):
                m.grad_checkpointing = enable

    @torch.jit.ignore
    def set_patch_supervision(self, enable: bool = True) -> None:
        """Make `forward` return `(logits, patch_logits)` in training; in evaluation it still returns logits only.

        Raises:
            ValueError: If the model has no template matching block, or is fused.
        """
        if enable:
            self._check_template_matching()
            if isinstance(self.tm, FusedTemplateMatching):
                raise ValueError('A fused model is for inference; train it before fuse().')
        self.patch_supervision = enable

    @torch.jit.ignore
    def get_patch_classifier(self) -> nn.Module:
        """Get the module whose class scores are the patch logits.

        Raises:
            ValueError: If the model has no template matching block.
        """
        self._check_template_matching()
        return self.tm

    @torch.jit.ignore
    def _check_template_matching(self) -> None:
        if not self.has_template_matching:
            raise ValueError(
                'This model has no template matching block, so it has no patch logits; to train with them anyway, '
                'wrap it in PatchSupervised.')

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Get the classifier module."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Reset the classifier head. The templates are kept; until retrained they still match the previous classes.

        Args:
            num_classes: Number of classes for new classifier.
            global_pool: Global pooling type, current pooling is kept if None.
        """
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)
        if self.has_template_matching and num_classes == self.tm.num_templates:
            _logger.warning(
                'The classifier is new, the %d templates are not; unless they were made for these classes, call '
                'reset_templates(%d) and train with TemplateMatchingTask.', num_classes, num_classes)
        cfg: Optional[Dict[str, Any]] = getattr(self, 'pretrained_cfg', None)
        if cfg and num_classes:  # as many classes as before, perhaps, but not the same ones
            self.pretrained_cfg = self.default_cfg = dict(cfg, label_names=None, label_descriptions=None)

    @torch.jit.ignore
    def reset_templates(self, num_templates: int) -> None:
        """Replace the templates by `num_templates` newly initialized ones. The classifier and its class names stay.

        Raises:
            ValueError: If the model has no template matching block or is fused, or `num_templates` is less than 1.
        """
        self._check_template_matching()
        if isinstance(self.tm, FusedTemplateMatching):
            raise ValueError('A fused model keeps its templates; reset them before fuse().')
        self.tm.reset_templates(num_templates)
        nn.init.kaiming_normal_(self.tm.value.weight, mode='fan_out', nonlinearity='relu')  # as in init_weights
        update_model_args(self, num_templates=num_templates)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args) -> None:
        error_msgs = args[-1]
        weight = state_dict.get(f'{prefix}tm.match.weight')
        if weight is not None and self.has_template_matching and len(weight) != self.tm.num_templates:
            error_msgs.append(
                f'the weights have {len(weight)} templates and the model has {self.tm.num_templates}; create it with '
                f'num_templates={len(weight)}.')
        own = {f'{prefix}{name}' for name, _ in self.named_parameters()}
        if has_fused_norms(name for name in state_dict if name not in own):
            error_msgs.append('the weights are of a fused model; save them before fuse().')
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def fuse(self) -> 'TemplateMatchingNet':
        """Fold batch norms into the convolutions before them, in place, where nothing else reads the convolution.

        Template matching becomes one convolution of its input. For inference: it changes the keys of the state dict, so
        save the weights first.

        Returns:
            The model.
        """
        reparameterize_model(self, inplace=True)
        return self

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates.

        Args:
            x: Input image tensor.
            indices: Take last n features if int, all if None, select matching indices if sequence.
                The last one is the final norm output, those before it are outputs of stages, in RN20 also of the block.
            norm: Apply norm layer to compatible intermediates (unused, the last feature is the final norm output).
            stop_early: Stop iterating over blocks when last desired intermediate hit.
            output_fmt: Shape of intermediate feature outputs.
            intermediates_only: Only return intermediate features.

        Returns:
            Features and list of intermediate features or just intermediate features.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        taps = [info['module'] for info in self.feature_info]
        take_indices, max_index = feature_take_indices(len(taps), indices)
        intermediates = []
        for name in self._body:
            x = getattr(self, name)(x)  # won't work with torchscript
            if name in taps and taps.index(name) in take_indices:
                intermediates.append(x)
            if stop_early and name == taps[max_index]:
                break
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates.

        Args:
            indices: Indices of intermediate layers to keep.
            prune_norm: Whether to prune normalization layers (unused, the final norm is the last feature).
            prune_head: Whether to prune the classifier head.

        Returns:
            List of indices that were kept.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        prune_end = max_index < len(self.feature_info) - 1
        if prune_end:
            last = self._body.index(self.feature_info[max_index]['module'])
            for name in self._body[last + 1:]:
                setattr(self, name, nn.Identity())
            if 'tm' in self._body[last + 1:]:
                self.has_template_matching = self.patch_supervision = False
            # features now end at the last kept tap, the head is sized for the final features so it goes too
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Forward pass through feature extraction layers."""
        return self._forward_last(self.tm(self._forward_trunk(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Forward pass through classifier head.

        Args:
            x: Feature tensor.
            pre_logits: Return features before final classifier layer.

        Returns:
            Output tensor.
        """
        x = self.global_pool(x)
        x = self.head_drop(x)
        return x if pre_logits else self.fc(x)

    @torch.jit.ignore
    def forward_patch_logits(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Forward pass that also returns the class scores of the patch around each region.

        Args:
            x: Input image tensor (B, C, H, W).

        Returns:
            Logits (B, num_classes) and patch logits (B, num_templates, H/r, W/r), r = `patch_reduction`.

        Raises:
            ValueError: If the model has no template matching block.
            RuntimeError: If it is fused and in training mode.
        """
        self._check_template_matching()
        x = self._forward_trunk(x)
        x, patch_logits = self.tm(x, return_patch_logits=True)
        return self.forward_head(self._forward_last(x)), patch_logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Forward pass."""
        if self.patch_supervision and self.training and not torch.jit.is_scripting():
            return self.forward_patch_logits(x)
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def has_fused_norms(names: Iterable[str]) -> bool:
    """Whether parameters of these names are there only after `fuse()`."""
    return any(re.search(r'layer\d\.blocks\.\d+\.conv\d\.bias$', name) for name in names)


def count_extra_halvings(img_size: Tuple[int, int]) -> int:
    """How often images of this size are halved beyond what 32x32 images are, at most twice.

    0 below 64, 1 below 128 (the paper's Mini-ImageNet networks of 84x84), 2 from 128 on; of the shorter side.
    """
    side = min(img_size)
    return (side >= 64) + (side >= 128)


def checkpoint_filter_fn(
        state_dict: Dict[str, torch.Tensor],
        model: TemplateMatchingNet,
        keep_templates: bool = True,
) -> Dict[str, torch.Tensor]:
    """Fit the templates of the model and of the checkpoint to each other.

    Args:
        state_dict: Weights of the checkpoint.
        model: Model they will be loaded into.
        keep_templates: Give the model as many templates as the checkpoint has. Otherwise templates of another number
            are left out of the checkpoint, and the model keeps its newly initialized ones.
    """
    weight = state_dict.get('tm.match.weight')
    if weight is None or not model.has_template_matching or len(weight) == model.tm.num_templates:
        return state_dict
    if keep_templates:
        model.reset_templates(len(weight))
        return state_dict
    _logger.info(
        'The %d templates of the checkpoint are left out; the model keeps its %d new ones.',
        len(weight), model.tm.num_templates)
    new = {k: v for k, v in model.state_dict().items() if k.startswith(('tm.match.', 'tm.norm.', 'tm.value.'))}
    return {**state_dict, **new}


def create_network(
        model_cls: Type[TemplateMatchingNet],
        variant: str,
        pretrained: bool = False,
        **kwargs,
) -> TemplateMatchingNet:
    """Build a network by timm's `build_model_with_cfg`, configured for the input size of its pretrained config.

    `img_size` lays it out for another size and becomes the input size. Templates are as in `checkpoint_filter_fn`.
    """
    saved = kwargs.get('pretrained_model_args') or {}  # of the model of a folder or repository
    keep_templates = kwargs.get('num_templates') in (None, saved.get('num_templates'))
    overlay = dict(kwargs.pop('pretrained_cfg_overlay', None) or {})
    given = kwargs.get('pretrained_cfg')
    cfg = resolve_pretrained_cfg(variant, given, overlay)
    others = any(overlay.get(key) is not None for key in ('url', 'hf_hub_id', 'file', 'state_dict'))
    if cfg.file == weights_path(f'{variant}.{cfg.tag}'):
        if cfg.url or cfg.hf_hub_id:  # timm would prefer the file; its scripts put an overlay into the config
            overlay['file'], others = None, True
        elif kwargs.get('num_classes') is not None and not pretrained and not isinstance(given, str):  # which is a tag
            others = True
    num_classes = cfg.num_classes if kwargs.get('num_classes') is None else kwargs['num_classes']
    if num_classes != 0 and not 0 < num_classes == cfg.num_classes:  # a new classifier, or a file of unknown classes
        others = True
    if others:  # as many classes as the weights have, perhaps, but not the same ones
        overlay.setdefault('label_names', None)
        overlay.setdefault('label_descriptions', None)
    if kwargs.get('template_matching') and num_classes == 0 and kwargs.get('num_templates') is None:
        # without a classifier, as many as the untouched model has
        known = cfg.num_classes if cfg.num_classes > 0 else get_pretrained_cfg(variant).num_classes
        kwargs['num_templates'] = known
    img_size, input_size = kwargs.pop('img_size', None), tuple(cfg.input_size[1:])
    # what a folder was configured for: its config may have images of another size, and those asked for come first
    was_saved = img_size is not None and to_2tuple(img_size) == to_2tuple(saved.get('img_size'))
    img_size = input_size if img_size is None or was_saved and 'input_size' in overlay else to_2tuple(img_size)
    if img_size != input_size and not was_saved:
        overlay.update(input_size=(cfg.input_size[0], *img_size), pool_size=None)
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg_overlay=overlay,
        feature_cfg=dict(out_indices=tuple(range(model_cls.count_features(img_size)))),
        pretrained_filter_fn=partial(checkpoint_filter_fn, keep_templates=keep_templates),
        img_size=img_size,
        **kwargs,
    )
    if not isinstance(model, TemplateMatchingNet):  # but its features
        return model
    if img_size == tuple(model.pretrained_cfg['input_size'][1:]):
        model.pretrained_cfg['pool_size'] = model.pool_size
    if model.has_template_matching:
        # a saved model is rebuilt from these, then perhaps with another number of classes
        update_model_args(model, num_templates=model.tm.num_templates)
    if img_size != (32, 32):
        _logger.info(
            '%s is configured for %dx%d images: reduced by %d, patches of %dx%d pixels of that map.',
            variant, *img_size, model.patch_reduction, model.patch_size, model.patch_size)
    return model


def create_cfg(**kwargs) -> Dict[str, Any]:
    """Pretrained config of a network of 32x32 images."""
    return {
        'url': '',
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (8, 8),
        'crop_pct': 1.0, 'interpolation': 'bicubic',  # 32x32 images are neither resized nor cropped
        'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2470, 0.2435, 0.2616),
        'first_conv': 'conv1', 'classifier': 'fc',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2210.00992',
        'paper_name': 'Feature Embedding by Template Matching as a ResNet Block',
        **kwargs
    }


def create_cifar10_cfg(name: str) -> Dict[str, Any]:
    """Config of weights in the package that were trained on CIFAR-10."""
    return create_cfg(file=weights_path(name), label_names=CIFAR10_LABELS)


def create_cifar100_cfg(name: str) -> Dict[str, Any]:
    """Config of weights in the package that were trained on CIFAR-100."""
    return create_cfg(
        file=weights_path(name), label_names=CIFAR100_LABELS, num_classes=100,
        mean=(0.5071, 0.4866, 0.4409), std=(0.2673, 0.2564, 0.2762))


def create_mini_imagenet_cfg(pool_size: int = 11) -> Dict[str, Any]:
    """Config of a network of 84x84 images, as in section 4."""
    return create_cfg(
        num_classes=100, input_size=(3, 84, 84), pool_size=(pool_size, pool_size),
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)


def weights_path(name: str) -> str:
    """File of weights that come with the package."""
    return str(Path(__file__).parent.parent / 'weights' / f'{name}.safetensors')
