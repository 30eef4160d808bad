""" Pre-activation ResNet for small images, with and without the template matching block

Papers:
    * `Feature Embedding by Template Matching as a ResNet Block` - https://arxiv.org/abs/2210.00992
    * `Identity Mappings in Deep Residual Networks` - https://arxiv.org/abs/1603.05027
    * `Wide Residual Networks` - https://arxiv.org/abs/1605.07146

The networks have four stages; template matching sits between the last two and takes the raw output of stage 3.
"""
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, create_classifier, get_device_dtype, get_norm_act_layer
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args

from ..layers import TemplateMatching

__all__ = ['PreActResNet']  # model_registry will add each entrypoint fn to this

CIFAR10_LABELS = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')


class PreActBottleneck(nn.Module):
    """Pre-activation bottleneck: three times norm-act-conv, 1x1, 3x3 (strided), 1x1."""

    def __init__(
            self,
            in_chs: int,
            mid_chs: int,
            out_chs: int,
            stride: int = 1,
            project: bool = False,
            norm_act_layer: Type[nn.Module] = BatchNormAct2d,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            mid_chs: Channels of the 3x3 convolution.
            out_chs: Output channels.
            stride: Stride of the 3x3 convolution and the shortcut.
            project: Use a 1x1 projection of the pre-activated input as shortcut, the input itself otherwise.
            norm_act_layer: Norm + activation layer.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = norm_act_layer(in_chs, **dd)
        self.conv1 = nn.Conv2d(in_chs, mid_chs, 1, bias=False, **dd)
        self.norm2 = norm_act_layer(mid_chs, **dd)
        self.conv2 = nn.Conv2d(mid_chs, mid_chs, 3, stride=stride, padding=1, bias=False, **dd)
        self.norm3 = norm_act_layer(mid_chs, **dd)
        self.conv3 = nn.Conv2d(mid_chs, out_chs, 1, bias=False, **dd)
        self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, **dd) if project else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(y)
        y = self.conv2(self.norm2(y))
        y = self.conv3(self.norm3(y))
        return y + shortcut


class PreActBasic(nn.Module):
    """Pre-activation basic block: twice norm-act-conv, 3x3 (strided), 3x3."""

    def __init__(
            self,
            in_chs: int,
            mid_chs: int,
            out_chs: int,
            stride: int = 1,
            project: bool = False,
            norm_act_layer: Type[nn.Module] = BatchNormAct2d,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            mid_chs: Output channels of the first convolution.
            out_chs: Output channels.
            stride: Stride of the first convolution and the shortcut.
            project: Use a 1x1 projection of the pre-activated input as shortcut, the input itself otherwise.
            norm_act_layer: Norm + activation layer.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = norm_act_layer(in_chs, **dd)
        self.conv1 = nn.Conv2d(in_chs, mid_chs, 3, stride=stride, padding=1, bias=False, **dd)
        self.norm2 = norm_act_layer(mid_chs, **dd)
        self.conv2 = nn.Conv2d(mid_chs, out_chs, 3, padding=1, bias=False, **dd)
        self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, **dd) if project else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(y)
        y = self.conv2(self.norm2(y))
        return y + shortcut


class PreActStage(nn.Module):
    """Pre-activation blocks of one resolution; the first one is strided."""

    def __init__(
            self,
            block: Type[nn.Module],
            in_chs: int,
            mid_chs: int,
            out_chs: int,
            depth: int,
            stride: int = 1,
            norm_act_layer: Type[nn.Module] = BatchNormAct2d,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            block: PreActBottleneck, whose first one projects its shortcut, or PreActBasic, where channels change.
            in_chs: Input channels.
            mid_chs: Channels inside the blocks.
            out_chs: Output channels.
            depth: Number of blocks.
            stride: Stride of the first block.
            norm_act_layer: Norm + activation layer.
        """
        super().__init__()
        self.grad_checkpointing = False
        project = block is PreActBottleneck or in_chs != out_chs
        self.blocks = nn.Sequential(*[
            block(
                in_chs if i == 0 else out_chs,
                mid_chs,
                out_chs,
                stride=stride if i == 0 else 1,
                project=project and i == 0,
                norm_act_layer=norm_act_layer,
                device=device,
                dtype=dtype,
            )
            for i in range(depth)
        ])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class PreActResNet(nn.Module):
    """Pre-activation ResNet of four stages, for images of about 32x32.

    With `template_matching` the block of `timm_tmblock.layers.TemplateMatching` stands between stages 3 and 4. Its
    patch logits (B, K, H/r, W/r), r = `patch_reduction`, are returned beside the logits by `forward_patch_logits`, and
    by `forward` in training once `set_patch_supervision` switched them on.
    """
    if TYPE_CHECKING:  # set by name, which type checkers cannot follow
        layer1: nn.Module
        layer2: nn.Module
        layer3: nn.Module
        layer4: nn.Module
        tm: Any

    def __init__(
            self,
            block: Type[nn.Module] = PreActBottleneck,
            layers: Tuple[int, ...] = (2, 2, 2, 2),
            mid_channels: Tuple[int, ...] = (32, 64, 128, 128),
            channels: Tuple[int, ...] = (64, 128, 128, 256),
            strides: Tuple[int, ...] = (1, 2, 2, 1),
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            stem_width: int = 16,
            template_matching: bool = False,
            num_templates: Optional[int] = None,
            patch_size: int = 4,
            act_layer: str = 'relu',
            norm_layer: str = 'batchnorm2d',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            block: Class of the residual blocks, PreActBottleneck or PreActBasic.
            layers: Blocks in each stage.
            mid_channels: Channels inside the blocks of each stage.
            channels: Output channels of each stage.
            strides: Stride of the first block of each stage.
            num_classes: Number of classes, 0 for no classifier.
            in_chans: Number of input channels.
            global_pool: Global pooling type.
            stem_width: Output channels of the stem convolution.
            template_matching: Put a template matching block between the last two stages.
            num_templates: Templates of that block, `num_classes` if None. They do not change with the classifier.
            patch_size: Side of the matched patch at the input of the last stage, in pixels of that map.
            act_layer: Activation layer.
            norm_layer: Normalization layer.
            drop_rate: Dropout rate before the classifier.

        Raises:
            ValueError: If templates are asked for without template matching, or their number cannot be told.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if num_templates is None:
            num_templates = num_classes
        elif not template_matching:
            raise ValueError('num_templates needs template_matching=True; the baselines have no templates.')
        if template_matching and num_templates < 1:
            raise ValueError('num_templates must be given when num_classes is 0.')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.has_template_matching = template_matching
        self.patch_supervision = False
        norm_act_layer = get_norm_act_layer(norm_layer, act_layer=act_layer)

        self.conv1 = nn.Conv2d(in_chans, stem_width, 3, padding=1, bias=False, **dd)
        self.feature_info = []
        reduction = 1
        in_chs = stem_width
        for i, (depth, mid_chs, out_chs, stride) in enumerate(zip(layers, mid_channels, channels, strides)):
            if i == 3:
                self.patch_reduction = reduction
                self.tm = TemplateMatching(
                    in_chs,
                    num_templates,
                    patch_size=patch_size,
                    norm_act_layer=norm_act_layer,
                    **dd,
                ) if template_matching else nn.Identity()
            self.add_module(f'layer{i + 1}', PreActStage(
                block, in_chs, mid_chs, out_chs, depth, stride, norm_act_layer=norm_act_layer, **dd))
            in_chs = out_chs
            reduction *= stride
            if i < 2:
                self.feature_info.append(dict(num_chs=out_chs, reduction=reduction, module=f'layer{i + 1}'))
        self.num_features = in_chs
        self.norm = norm_act_layer(self.num_features, **dd)
        # one tap for each reduction, the last module at it; stages 3 and 4 share theirs
        self.feature_info.append(dict(num_chs=self.num_features, reduction=reduction, module='norm'))

        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialize all parameters and buffers, Kaiming normal (fan-out) for convolutions."""
        for m in self.modules():
            reset_parameters = getattr(m, 'reset_parameters', None)
            if reset_parameters is not None:
                reset_parameters()
            if isinstance(m, nn.Conv2d) and m.bias is None:  # the one with bias is the classifier of the patches
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Create regex patterns for parameter grouping."""
        return dict(
            stem=r'^conv1',
            blocks=[
                (r'^layer([123])' if coarse else r'^layer([123])\.blocks\.(\d+)', None),
                (r'^tm', (3, 99)),  # between stages 3 and 4
                (r'^layer(4)' if coarse else r'^layer(4)\.blocks\.(\d+)', None),
                (r'^norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing."""
        for m in self.modules():
            if isinstance(m, PreActStage):
                m.grad_checkpointing = enable

    @torch.jit.ignore
    def set_patch_supervision(self, enable: bool = True) -> None:
        """Make `forward` return `(logits, patch_logits)` in training; in evaluation it returns logits all the same.

        Raises:
            ValueError: If the model has no template matching block.
        """
        if enable:
            self._check_template_matching()
        self.patch_supervision = enable

    @torch.jit.ignore
    def _check_template_matching(self) -> None:
        if not self.has_template_matching:
            raise ValueError('This model has no template matching block, so it has no patch logits.')

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Get the classifier module."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Reset the classifier head; the templates stay.

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

    @torch.jit.ignore
    def reset_templates(self, num_templates: int) -> None:
        """Replace the templates by `num_templates` newly initialized ones.

        Raises:
            ValueError: If the model has no template matching block.
        """
        self._check_template_matching()
        self.tm.reset_templates(num_templates)
        update_model_args(self, num_templates=num_templates)

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
                Indices 0 and 1 are the outputs of the first two stages, index 2 the final norm output.
            norm: Apply norm layer to compatible intermediates (unused, the last feature is the final norm output).
            stop_early: Stop iterating over blocks when last desired intermediate hit.
            output_fmt: Shape of intermediate feature outputs.
            intermediates_only: Only return intermediate features.

        Returns:
            Features and list of intermediate features or just intermediate features.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(3, indices)

        x = self.conv1(x)
        for i, stage in enumerate((self.layer1, self.layer2)):
            if stop_early and i > max_index:
                break
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        if not stop_early or max_index == 2:
            x = self.layer3(x)
            x = self.tm(x)
            x = self.layer4(x)
            x = self.norm(x)
            if 2 in take_indices:
                intermediates.append(x)

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
        take_indices, max_index = feature_take_indices(3, indices)
        prune_end = max_index < 2
        if max_index == 0:
            self.layer2 = nn.Identity()
        if prune_end:
            self.layer3 = nn.Identity()
            self.tm = nn.Identity()
            self.layer4 = nn.Identity()
            self.norm = nn.Identity()
            self.has_template_matching = self.patch_supervision = False
            # features now end at the last kept tap, the head is sized for the final features so it goes too
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def _forward_trunk(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = self.layer1(x)  # (B, 64, H, W)
        x = self.layer2(x)  # (B, 128, H/2, W/2)
        return self.layer3(x)  # (B, 128, H/4, W/4), f of section 3.3

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Forward pass through feature extraction layers."""
        x = self._forward_trunk(x)
        x = self.tm(x)
        x = self.layer4(x)  # (B, 256, H/4, W/4)
        return self.norm(x)

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
        """
        self._check_template_matching()
        x = self._forward_trunk(x)
        patch_logits = self.tm.patch_logits(x)
        x = self.tm.embed(x, patch_logits)
        x = self.norm(self.layer4(x))
        return self.forward_head(x), patch_logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Forward pass."""
        if self.patch_supervision and self.training and not torch.jit.is_scripting():
            return self.forward_patch_logits(x)
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def checkpoint_filter_fn(
        state_dict: Dict[str, torch.Tensor],
        model: PreActResNet,
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
    if weight is None or not isinstance(model.tm, TemplateMatching) or len(weight) == model.tm.num_templates:
        return state_dict
    if keep_templates:
        model.reset_templates(len(weight))
        return state_dict
    new = {k: v for k, v in model.state_dict().items() if k.startswith(('tm.match.', 'tm.norm.', 'tm.value.'))}
    return {**state_dict, **new}


def _create_resnet(variant: str, pretrained: bool = False, **kwargs) -> PreActResNet:
    keep_templates = 'num_templates' not in kwargs
    if kwargs.get('template_matching') and kwargs.get('num_classes') == 0 and keep_templates:
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        kwargs['num_templates'] = cfg.num_classes  # without a classifier, as many as the untouched model has
    return build_model_with_cfg(
        PreActResNet,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2)),
        pretrained_filter_fn=partial(checkpoint_filter_fn, keep_templates=keep_templates),
        **kwargs,
    )


def _cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (8, 8),
        'crop_pct': 1.0, 'interpolation': 'bicubic',  # 32x32 images are neither resized nor cropped
        'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2470, 0.2435, 0.2616),
        'first_conv': 'conv1', 'classifier': 'fc',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2210.00992',
        'paper_name': 'Feature Embedding by Template Matching as a ResNet Block',
        **kwargs
    }


def _weights(name: str) -> str:
    return str(Path(__file__).parent.parent / 'weights' / f'{name}.safetensors')


default_cfgs = generate_default_cfgs({
    'rn26.untrained': _cfg(),
    'rn26_tm.cifar10': _cfg(file=_weights('rn26_tm.cifar10'), label_names=CIFAR10_LABELS),
    'rn38.untrained': _cfg(),
    'rn38_tm.untrained': _cfg(),
    'wrn16.untrained': _cfg(),
    'wrn16_tm.untrained': _cfg(),
})


@register_model
def rn26(pretrained: bool = False, **kwargs) -> PreActResNet:
    """ RN26: pre-activation bottleneck ResNet, two blocks a stage. 964,058 parameters with 10 classes.
    """
    model_args = dict(layers=(2, 2, 2, 2))
    return _create_resnet('rn26', pretrained, **dict(model_args, **kwargs))


@register_model
def rn26_tm(pretrained: bool = False, **kwargs) -> PreActResNet:
    """ RN26 with the template matching block. 983,032 parameters with 10 classes.
    """
    model_args = dict(layers=(2, 2, 2, 2), template_matching=True)
    return _create_resnet('rn26_tm', pretrained, **dict(model_args, **kwargs))


@register_model
def rn38(pretrained: bool = False, **kwargs) -> PreActResNet:
    """ RN38: pre-activation bottleneck ResNet, three blocks a stage. 1,426,394 parameters with 10 classes.
    """
    model_args = dict(layers=(3, 3, 3, 3))
    return _create_resnet('rn38', pretrained, **dict(model_args, **kwargs))


@register_model
def rn38_tm(pretrained: bool = False, **kwargs) -> PreActResNet:
    """ RN38 with the template matching block. 1,445,368 parameters with 10 classes.
    """
    model_args = dict(layers=(3, 3, 3, 3), template_matching=True)
    return _create_resnet('rn38_tm', pretrained, **dict(model_args, **kwargs))


@register_model
def wrn16(pretrained: bool = False, **kwargs) -> PreActResNet:
    """ WRN16: pre-activation basic ResNet of width factor 2, two blocks a stage. 1,282,522 parameters with 10 classes.
    """
    model_args = dict(block=PreActBasic, mid_channels=(32, 64, 128, 128), channels=(32, 64, 128, 128))
    return _create_resnet('wrn16', pretrained, **dict(model_args, **kwargs))


@register_model
def wrn16_tm(pretrained: bool = False, **kwargs) -> PreActResNet:
    """ WRN16 with the template matching block. 1,301,496 parameters with 10 classes.
    """
    model_args = dict(
        block=PreActBasic, mid_channels=(32, 64, 128, 128), channels=(32, 64, 128, 128), template_matching=True)
    return _create_resnet('wrn16_tm', pretrained, **dict(model_args, **kwargs))
