""" Pre-activation ResNet for small images, with and without the template matching block

Papers:
    * `Feature Embedding by Template Matching as a ResNet Block` - https://arxiv.org/abs/2210.00992
    * `Identity Mappings in Deep Residual Networks` - https://arxiv.org/abs/1603.05027
    * `Wide Residual Networks` - https://arxiv.org/abs/1605.07146

The networks have four stages, RN20 three; template matching sits before the last and takes the raw output of the one
before it.
"""
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, DropPath, calculate_drop_path_rates, get_norm_act_layer
from timm.models import checkpoint_seq, generate_default_cfgs, register_model

from ..layers import fuse_conv_norm, get_maximizer_layer
from ._base import (
    TemplateMatchingNet,
    create_cfg,
    create_cifar10_cfg,
    create_cifar100_cfg,
    create_mini_imagenet_cfg,
    create_network,
)

__all__ = ['PreActResNet', 'PreActBasic', 'PreActBottleneck']  # model_registry will add each entrypoint fn to this


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
            maximizer_layer: Optional[Callable[[], nn.Module]] = None,
            drop_path_rate: float = 0.,
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
            maximizer_layer: What follows the 3x3 convolution instead of norm + activation.
            drop_path_rate: Probability that an image skips the residual branch in training (stochastic depth).
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = norm_act_layer(in_chs, **dd)
        self.conv1 = nn.Conv2d(in_chs, mid_chs, 1, bias=False, **dd)
        self.norm2 = norm_act_layer(mid_chs, **dd)
        self.conv2 = nn.Conv2d(mid_chs, mid_chs, 3, stride=stride, padding=1, bias=False, **dd)
        self.norm3 = maximizer_layer() if maximizer_layer else norm_act_layer(mid_chs, **dd)
        self.conv3 = nn.Conv2d(mid_chs, out_chs, 1, bias=False, **dd)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0. else nn.Identity()
        self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, **dd) if project else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(y)
        y = self.conv2(self.norm2(y))
        y = self.conv3(self.norm3(y))
        return self.drop_path(y) + shortcut

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the norms that follow a convolution into it, for inference."""
        self.conv1, self.norm2 = fuse_conv_norm(self.conv1, self.norm2)
        self.conv2, self.norm3 = fuse_conv_norm(self.conv2, self.norm3)


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
            maximizer_layer: Optional[Callable[[], nn.Module]] = None,
            drop_path_rate: float = 0.,
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
            maximizer_layer: What follows the (first) 3x3 convolution instead of norm + activation.
            drop_path_rate: Probability that an image skips the residual branch in training (stochastic depth).
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = norm_act_layer(in_chs, **dd)
        self.conv1 = nn.Conv2d(in_chs, mid_chs, 3, stride=stride, padding=1, bias=False, **dd)
        self.norm2 = maximizer_layer() if maximizer_layer else norm_act_layer(mid_chs, **dd)
        self.conv2 = nn.Conv2d(mid_chs, out_chs, 3, padding=1, bias=False, **dd)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0. else nn.Identity()
        self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, **dd) if project else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(y)
        y = self.conv2(self.norm2(y))
        return self.drop_path(y) + shortcut

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the norm that follows a convolution into it, for inference."""
        self.conv1, self.norm2 = fuse_conv_norm(self.conv1, self.norm2)


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
            maximizer_layer: Optional[Callable[[], nn.Module]] = None,
            drop_path_rates: Optional[List[float]] = None,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            block: PreActBottleneck, the first of which always projects its shortcut, or PreActBasic, which does where
                channels or resolution change.
            in_chs: Input channels.
            mid_chs: Channels inside the blocks.
            out_chs: Output channels.
            depth: Number of blocks.
            stride: Stride of the first block.
            norm_act_layer: Norm + activation layer.
            maximizer_layer: What follows 3x3 convolutions inside the blocks instead of norm + activation.
            drop_path_rates: Stochastic depth rate of each block.
        """
        super().__init__()
        self.grad_checkpointing = False
        project = block is PreActBottleneck or in_chs != out_chs or stride != 1
        self.blocks = nn.Sequential(*[
            block(
                in_chs if i == 0 else out_chs,
                mid_chs,
                out_chs,
                stride=stride if i == 0 else 1,
                project=project and i == 0,
                norm_act_layer=norm_act_layer,
                maximizer_layer=maximizer_layer,
                drop_path_rate=drop_path_rates[i] if drop_path_rates else 0.,
                device=device,
                dtype=dtype,
            )
            for i in range(depth)
        ])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


STRIDES = (1, 2, 2, 1)  # of the first block of each stage, which feature_info relies on


class PreActResNet(TemplateMatchingNet):
    """Pre-activation ResNet of three or four stages, for images of about 32x32."""
    if TYPE_CHECKING:  # set by name, which type checkers cannot follow
        layer1: nn.Module
        layer2: nn.Module
        layer3: nn.Module
        layer4: nn.Module

    def __init__(
            self,
            block: Type[nn.Module] = PreActBottleneck,
            layers: Tuple[int, ...] = (2, 2, 2, 2),
            mid_channels: Tuple[int, ...] = (32, 64, 128, 128),
            channels: Tuple[int, ...] = (64, 128, 128, 256),
            num_classes: int = 10,
            in_chans: int = 3,
            img_size: Union[int, Tuple[int, int]] = 32,
            global_pool: str = 'avg',
            stem_width: int = 16,
            template_matching: bool = False,
            num_templates: Optional[int] = None,
            patch_size: Optional[int] = None,
            maximizer: str = 'bn_relu',
            maximizer_kwargs: Optional[Dict[str, Any]] = None,
            act_layer: str = 'relu',
            norm_layer: str = 'batchnorm2d',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            block: Class of the residual blocks, PreActBottleneck or PreActBasic.
            layers: Blocks in each stage.
            mid_channels: Channels inside the blocks of each stage.
            channels: Output channels of each stage.
            num_classes: Number of classes, 0 for no classifier.
            in_chans: Number of input channels.
            img_size: Image size the network is configured for. From 64 on the first stage is strided too, from 128 on
                also the stem. Other sizes work too.
            global_pool: Global pooling type.
            stem_width: Output channels of the stem convolution.
            template_matching: Put a template matching block between the last two stages.
            num_templates: Templates of that block, `num_classes` if None. They do not change with the classifier.
            patch_size: Side of the matched patch at the input of the last stage, in pixels of that map; half the map
                if None.
            maximizer: What follows the 3x3 convolutions inside the blocks: 'bn_relu', i.e. norm and activation layer,
                'softmax' or 'perturbed', as in section 4.1.
            maximizer_kwargs: Arguments of a maximizer other than BN-ReLU: mu, eta, epsilon, of 'perturbed' also
                num_samples.
            act_layer: Activation layer.
            norm_layer: Normalization layer.
            drop_rate: Dropout rate before the classifier.
            drop_path_rate: Stochastic depth rate of the last residual block, rising linearly from 0 at the first.

        Raises:
            ValueError: If templates are asked for without template matching, or their number cannot be determined;
                for an unknown maximizer, an epsilon or a number of samples that is not positive, or arguments of
                BN-ReLU, which has none; if there are not three or four stages, each with its channels; for images below
                4 pixels, or a `patch_size` that is not a whole number of at least 1.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_classes, in_chans, img_size, drop_rate)
        if len(layers) not in (3, 4) or not len(layers) == len(mid_channels) == len(channels):
            raise ValueError(
                f'layers, mid_channels and channels must be of 3 or of 4 stages, got {len(layers)}, '
                f'{len(mid_channels)} and {len(channels)}.')
        norm_act_layer = get_norm_act_layer(norm_layer, act_layer=act_layer)
        maximizer_layer = get_maximizer_layer(maximizer, **maximizer_kwargs or {})
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(layers), stagewise=True)

        reduction = 2 if self.extra_halvings > 1 else 1
        self.conv1 = nn.Conv2d(in_chans, stem_width, 3, stride=reduction, padding=1, bias=False, **dd)
        self.feature_info = []
        in_chs = stem_width
        for i, (depth, mid_chs, out_chs, stride) in enumerate(zip(layers, mid_channels, channels, STRIDES)):
            if i == 0 and self.extra_halvings > 0:
                stride *= 2
            name = f'layer{i + 1}'
            if i == len(layers) - 1:
                name = 'layer4'  # whatever their number
                if i == 2:
                    self.layer3 = nn.Identity()
                map_size = (-(-self.img_size[0] // reduction), -(-self.img_size[1] // reduction))
                self.tm = self._create_tm(
                    template_matching, in_chs, map_size, reduction, num_templates, patch_size,
                    norm_act_layer=norm_act_layer, **dd)
            self.add_module(name, PreActStage(
                block, in_chs, mid_chs, out_chs, depth, stride, norm_act_layer=norm_act_layer,
                maximizer_layer=maximizer_layer, drop_path_rates=drop_path_rates[i], **dd))
            in_chs = out_chs
            reduction *= stride
            if i < 2:
                self.feature_info.append(dict(num_chs=out_chs, reduction=reduction, module=name))
        if len(layers) == 3 and template_matching:
            self.feature_info[1]['module'] = 'tm'
        self.pool_size = (-(-self.img_size[0] // reduction), -(-self.img_size[1] // reduction))
        self.norm = norm_act_layer(in_chs, **dd)
        # one tap for each reduction, the last module at it; stages 3 and 4 share theirs
        self.feature_info.append(dict(num_chs=in_chs, reduction=reduction, module='norm'))
        self._create_head(in_chs, global_pool, **dd)
        self.init_weights()

    def _forward_trunk(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = self.layer1(x)  # (B, C, H, W)
        x = self.layer2(x)  # (B, C, H/2, W/2)
        return self.layer3(x)  # (B, D, H/4, W/4), f of section 3.3; as before with three stages

    def _forward_last(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer4(x))

    @torch.jit.ignore
    def fuse(self) -> 'PreActResNet':
        """As `timm.utils.reparameterize_model`, and also the norm after the stem, which that cannot reach as it handles
        one module at a time.
        """
        super().fuse()
        first: Any = self.get_submodule('layer1.blocks.0')
        # without a shortcut of its own the stem's output is needed before the norm too; wrappers keep the norm
        if isinstance(first, (PreActBottleneck, PreActBasic)) and first.shortcut is not None:
            self.conv1, first.norm1 = fuse_conv_norm(self.conv1, first.norm1)
        return self


def _create_resnet(variant: str, pretrained: bool = False, **kwargs) -> TemplateMatchingNet:
    return create_network(PreActResNet, variant, pretrained, **kwargs)


default_cfgs = generate_default_cfgs({
    'rn20.untrained': create_cfg(),
    'rn20.mini_imagenet': create_mini_imagenet_cfg(),
    'rn20_tm.untrained': create_cfg(),
    'rn20_tm.mini_imagenet': create_mini_imagenet_cfg(),
    'rn26.cifar10': create_cifar10_cfg('rn26.cifar10'),
    'rn26.cifar100': create_cifar100_cfg('rn26.cifar100'),
    'rn26.mini_imagenet': create_mini_imagenet_cfg(),
    'rn26_tm.cifar10': create_cifar10_cfg('rn26_tm.cifar10'),
    'rn26_tm.dist_cifar10': create_cifar10_cfg('rn26_tm.dist_cifar10'),
    'rn26_tm.cifar100': create_cifar100_cfg('rn26_tm.cifar100'),
    'rn26_tm.dist_cifar100': create_cifar100_cfg('rn26_tm.dist_cifar100'),
    'rn26_tm.mini_imagenet': create_mini_imagenet_cfg(),
    'rn38.untrained': create_cfg(),
    'rn38.mini_imagenet': create_mini_imagenet_cfg(),
    'rn38_tm.cifar10': create_cifar10_cfg('rn38_tm.cifar10'),
    'rn38_tm.cifar100': create_cifar100_cfg('rn38_tm.cifar100'),
    'rn38_tm.mini_imagenet': create_mini_imagenet_cfg(),
    'wrn16.untrained': create_cfg(),
    'wrn16.mini_imagenet': create_mini_imagenet_cfg(),
    'wrn16_tm.cifar10': create_cifar10_cfg('wrn16_tm.cifar10'),
    'wrn16_tm.cifar100': create_cifar100_cfg('wrn16_tm.cifar100'),
    'wrn16_tm.mini_imagenet': create_mini_imagenet_cfg(),
})


@register_model
def rn20(pretrained: bool = False, **kwargs) -> TemplateMatchingNet:
    """ RN20: pre-activation bottleneck ResNet of three stages, two blocks each. 585,690 parameters with 10 classes.
    """
    model_args = dict(layers=(2, 2, 2), mid_channels=(32, 64, 128), channels=(64, 128, 256))
    return _create_resnet('rn20', pretrained, **dict(model_args, **kwargs))


@register_model
def rn20_tm(pretrained: bool = False, **kwargs) -> TemplateMatchingNet:
    """ RN20 with the template matching block, on a map of half the image's size. 604,664 parameters with 10 classes.
    """
    model_args = dict(
        layers=(2, 2, 2), mid_channels=(32, 64, 128), channels=(64, 128, 256), template_matching=True)
    return _create_resnet('rn20_tm', pretrained, **dict(model_args, **kwargs))


@register_model
def rn26(pretrained: bool = False, **kwargs) -> TemplateMatchingNet:
    """ RN26: pre-activation bottleneck ResNet, two blocks a stage. 964,058 parameters with 10 classes.
    """
    model_args = dict(layers=(2, 2, 2, 2))
    return _create_resnet('rn26', pretrained, **dict(model_args, **kwargs))


@register_model
def rn26_tm(pretrained: bool = False, **kwargs) -> TemplateMatchingNet:
    """ RN26 with the template matching block. 983,032 parameters with 10 classes.
    """
    model_args = dict(layers=(2, 2, 2, 2), template_matching=True)
    return _create_resnet('rn26_tm', pretrained, **dict(model_args, **kwargs))


@register_model
def rn38(pretrained: bool = False, **kwargs) -> TemplateMatchingNet:
    """ RN38: pre-activation bottleneck ResNet, three blocks a stage. 1,426,394 parameters with 10 classes.
    """
    model_args = dict(layers=(3, 3, 3, 3))
    return _create_resnet('rn38', pretrained, **dict(model_args, **kwargs))


@register_model
def rn38_tm(pretrained: bool = False, **kwargs) -> TemplateMatchingNet:
    """ RN38 with the template matching block. 1,445,368 parameters with 10 classes.
    """
    model_args = dict(layers=(3, 3, 3, 3), template_matching=True)
    return _create_resnet('rn38_tm', pretrained, **dict(model_args, **kwargs))


@register_model
def wrn16(pretrained: bool = False, **kwargs) -> TemplateMatchingNet:
    """ WRN16: pre-activation basic ResNet of width factor 2, two blocks a stage. 1,282,522 parameters with 10 classes.
    """
    model_args = dict(block=PreActBasic, mid_channels=(32, 64, 128, 128), channels=(32, 64, 128, 128))
    return _create_resnet('wrn16', pretrained, **dict(model_args, **kwargs))


@register_model
def wrn16_tm(pretrained: bool = False, **kwargs) -> TemplateMatchingNet:
    """ WRN16 with the template matching block. 1,301,496 parameters with 10 classes.
    """
    model_args = dict(
        block=PreActBasic, mid_channels=(32, 64, 128, 128), channels=(32, 64, 128, 128), template_matching=True)
    return _create_resnet('wrn16_tm', pretrained, **dict(model_args, **kwargs))
