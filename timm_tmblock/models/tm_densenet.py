""" DenseNet-BC for small images, with and without the template matching block

Papers:
    * `Feature Embedding by Template Matching as a ResNet Block` - https://arxiv.org/abs/2210.00992
    * `Densely Connected Convolutional Networks` - https://arxiv.org/abs/1608.06993

The networks have four stages; template matching sits between the last two and takes features without a norm.
"""
from typing import TYPE_CHECKING, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, get_norm_act_layer
from timm.models import checkpoint, generate_default_cfgs, register_model

from ..layers import fuse_conv_norm
from ..layers.dense_features import can_share_features, forward_shared
from ._base import (
    TemplateMatchingNet,
    count_extra_halvings,
    create_cifar10_cfg,
    create_cifar100_cfg,
    create_mini_imagenet_cfg,
    create_network,
)

__all__ = ['DenseNetSmall']  # model_registry will add each entrypoint fn to this


class DenseLayer(nn.Module):
    """The features a layer adds, norm-act-conv 1x1 and norm-act-conv 3x3: (B, C, H, W) -> (B, growth_rate, H, W)."""

    def __init__(
            self,
            in_chs: int,
            mid_chs: int,
            growth_rate: int,
            norm_act_layer: Type[nn.Module] = BatchNormAct2d,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            mid_chs: Channels between the convolutions.
            growth_rate: Output channels.
            norm_act_layer: Norm + activation layer.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = norm_act_layer(in_chs, **dd)
        self.conv1 = nn.Conv2d(in_chs, mid_chs, 1, bias=False, **dd)
        self.norm2 = norm_act_layer(mid_chs, **dd)
        self.conv2 = nn.Conv2d(mid_chs, growth_rate, 3, padding=1, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(self.norm1(x))
        x = self.conv2(self.norm2(x))
        return x

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the norm that follows a convolution into it, for inference."""
        self.conv1, self.norm2 = fuse_conv_norm(self.conv1, self.norm2)


class DenseStage(nn.Module):
    """Dense layers of one resolution: (B, C, H, W) -> (B, C + depth * growth_rate, H, W)."""

    def __init__(
            self,
            in_chs: int,
            mid_chs: int,
            growth_rate: int,
            depth: int,
            memory_efficient: Optional[bool] = None,
            norm_act_layer: Type[nn.Module] = BatchNormAct2d,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            mid_chs: Channels between the convolutions of a layer.
            growth_rate: Channels each layer adds.
            depth: Number of layers.
            memory_efficient: Train over a shared buffer of features, which takes less memory and allows no second
                derivatives; on a CPU alone if None, as it takes less time there and more on a GPU. Only where the
                layers are plain BN-ReLU-convolutions in eager training, not compiled, checkpointed, with hooks, or
                sharded one by one. Nothing is computed twice, unlike with `memory_efficient` of timm's DenseNet, which
                here is `set_grad_checkpointing`.
            norm_act_layer: Norm + activation layer.
        """
        super().__init__()
        self.grad_checkpointing = False
        self.memory_efficient = memory_efficient
        self.blocks = nn.ModuleList([
            DenseLayer(
                in_chs + i * growth_rate,
                mid_chs,
                growth_rate,
                norm_act_layer=norm_act_layer,
                device=device,
                dtype=dtype,
            )
            for i in range(depth)
        ])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if self.grad_checkpointing:
                return self._forward_checkpointed(x)
            # under torch.fx `x` is a Proxy without a device; the last check is the long one
            if type(x) is torch.Tensor and (
                    x.device.type == 'cpu' if self.memory_efficient is None else self.memory_efficient
            ) and can_share_features(self.blocks, x, DenseLayer):
                return forward_shared(self.blocks, x)
        for layer in self.blocks:
            x = torch.cat([x, layer(x)], dim=1)
        return x

    def _forward_checkpointed(self, x: torch.Tensor) -> torch.Tensor:
        # concatenations are made again in the backward, as in timm's DenseNet; checkpoint_seq would keep all of them
        features = [x]
        for layer in self.blocks:
            def add(*features: torch.Tensor, layer: nn.Module = layer) -> torch.Tensor:
                return layer(torch.cat(features, dim=1))
            features.append(checkpoint(add, *features))
        return torch.cat(features, dim=1)


class DenseTransition(nn.Module):
    """Norm-act-conv 1x1 and 2x2 average pooling."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            norm_act_layer: Type[nn.Module] = BatchNormAct2d,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            norm_act_layer: Norm + activation layer.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm = norm_act_layer(in_chs, **dd)
        self.conv = nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.conv(self.norm(x)))


class DenseNetSmall(TemplateMatchingNet):
    """DenseNet-BC of four stages, for images of about 32x32; transitions follow the first two."""
    if TYPE_CHECKING:  # set by name, which type checkers cannot follow
        layer1: nn.Module
        layer2: nn.Module
        layer3: nn.Module
        layer4: nn.Module
        transition1: nn.Module
        transition2: nn.Module

    def __init__(
            self,
            layers: Tuple[int, ...] = (16, 16, 16, 16),
            growth_rate: int = 12,
            bn_size: int = 4,
            num_classes: int = 10,
            in_chans: int = 3,
            img_size: Union[int, Tuple[int, int]] = 32,
            global_pool: str = 'avg',
            stem_width: int = 24,
            template_matching: bool = False,
            num_templates: Optional[int] = None,
            patch_size: Optional[int] = None,
            concat: bool = False,
            memory_efficient: Optional[bool] = None,
            act_layer: str = 'relu',
            norm_layer: str = 'batchnorm2d',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            layers: Dense layers in each stage.
            growth_rate: Channels each layer adds.
            bn_size: Channels between the convolutions of a layer, in growth rates.
            num_classes: Number of classes, 0 for no classifier.
            in_chans: Number of input channels.
            img_size: Image size the network is configured for. From 64 on there is a 2x2 average pooling after stage 3
                too, from 128 on the stem is strided. Other sizes work too, unless pooling leaves nothing.
            global_pool: Global pooling type.
            stem_width: Output channels of the stem convolution.
            template_matching: Put a template matching block between the last two stages.
            num_templates: Templates of that block, `num_classes` if None. They do not change with the classifier.
            patch_size: Side of the matched patch at the input of the last stage, in pixels of that map; half the map
                if None.
            concat: Concatenate value vectors, as wide as what a stage adds, to the features instead of adding them.
            memory_efficient: Train stages over a shared buffer of features where that can be, see DenseStage; on a CPU
                alone if None.
            act_layer: Activation layer.
            norm_layer: Normalization layer.
            drop_rate: Dropout rate before the classifier.

        Raises:
            ValueError: If templates or `concat` are asked for without template matching, or the number of templates
                cannot be determined; if there are not four stages; for images below 4 pixels, or a `patch_size` that
                is not a whole number of at least 1.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_classes, in_chans, img_size, drop_rate)
        if len(layers) != 4:
            raise ValueError(f'layers must be of 4 stages, got {len(layers)}.')
        if concat and not template_matching:
            raise ValueError('concat requires template_matching=True.')
        norm_act_layer = get_norm_act_layer(norm_layer, act_layer=act_layer)

        reduction = 2 if self.extra_halvings > 1 else 1
        map_size = (-(-self.img_size[0] // reduction), -(-self.img_size[1] // reduction))
        self.conv1 = nn.Conv2d(in_chans, stem_width, 3, stride=reduction, padding=1, bias=False, **dd)
        self.feature_info = []
        chs = stem_width
        for i, depth in enumerate(layers):
            name = f'layer{i + 1}'
            if i == 3:
                self.tm = self._create_tm(
                    template_matching, chs, map_size, reduction, num_templates, patch_size, concat=concat,
                    value_dim=depth * growth_rate if concat else None, norm_act_layer=norm_act_layer, **dd)
                if template_matching:
                    chs = self.tm.out_dim
            self.add_module(name, DenseStage(
                chs, bn_size * growth_rate, growth_rate, depth, memory_efficient, norm_act_layer, **dd))
            chs += depth * growth_rate
            halved = i < 2 or i == 2 and self.extra_halvings > 0
            if halved:
                self.feature_info.append(dict(num_chs=chs, reduction=reduction, module=name))
                map_size = (map_size[0] // 2, map_size[1] // 2)
                reduction *= 2
            if i < 2:
                self.add_module(f'transition{i + 1}', DenseTransition(
                    chs, chs // 2, norm_act_layer=norm_act_layer, **dd))
                chs //= 2
            elif i == 2:
                self.pool3 = nn.AvgPool2d(2) if halved else nn.Identity()
        self.pool_size = map_size
        self.norm = norm_act_layer(chs, **dd)
        # one tap for each reduction, the last module at it; stages 3 and 4 share theirs unless one is pooled
        self.feature_info.append(dict(num_chs=chs, reduction=reduction, module='norm'))
        self._create_head(chs, global_pool, **dd)
        self.init_weights()

    @staticmethod
    def count_features(img_size: Tuple[int, int]) -> int:
        return 4 if count_extra_halvings(img_size) else 3

    def _forward_trunk(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)  # (B, 24, H, W); shapes are those at img_size 32
        x = self.transition1(self.layer1(x))  # (B, 108, H/2, W/2)
        x = self.transition2(self.layer2(x))  # (B, 150, H/4, W/4)
        return self.pool3(self.layer3(x))  # (B, D, H/4, W/4), f of section 3.3

    def _forward_last(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer4(x))


def _create_densenet(variant: str, pretrained: bool = False, **kwargs) -> TemplateMatchingNet:
    return create_network(DenseNetSmall, variant, pretrained, **kwargs)


default_cfgs = generate_default_cfgs({
    'dn100.cifar10': create_cifar10_cfg('dn100.cifar10'),
    'dn100.cifar100': create_cifar100_cfg('dn100.cifar100'),
    'dn100.mini_imagenet': create_mini_imagenet_cfg(pool_size=10),
    'dn100_tm.dist_cifar10': create_cifar10_cfg('dn100_tm.dist_cifar10'),
    'dn100_tm.cifar10': create_cifar10_cfg('dn100_tm.cifar10'),
    'dn100_tm.cifar100': create_cifar100_cfg('dn100_tm.cifar100'),
    'dn100_tm.dist_cifar100': create_cifar100_cfg('dn100_tm.dist_cifar100'),
    'dn100_tm.mini_imagenet': create_mini_imagenet_cfg(pool_size=10),
    'dn100_tm_cat.cifar10': create_cifar10_cfg('dn100_tm_cat.cifar10'),
    'dn100_tm_cat.cifar100': create_cifar100_cfg('dn100_tm_cat.cifar100'),
    'dn100_tm_cat.mini_imagenet': create_mini_imagenet_cfg(pool_size=10),
})


@register_model
def dn100(pretrained: bool = False, **kwargs) -> TemplateMatchingNet:
    """ DN100: DenseNet-BC of growth rate 12, 16 layers a stage. 1,201,546 parameters with 10 classes.
    """
    return _create_densenet('dn100', pretrained, **kwargs)


@register_model
def dn100_tm(pretrained: bool = False, **kwargs) -> TemplateMatchingNet:
    """ DN100 with the template matching block, values added. 1,325,380 parameters with 10 classes.
    """
    model_args = dict(template_matching=True)
    return _create_densenet('dn100_tm', pretrained, **dict(model_args, **kwargs))


@register_model
def dn100_tm_cat(pretrained: bool = False, **kwargs) -> TemplateMatchingNet:
    """ DN100 with the template matching block, values concatenated. 1,362,820 parameters with 10 classes.
    """
    model_args = dict(template_matching=True, concat=True)
    return _create_densenet('dn100_tm_cat', pretrained, **dict(model_args, **kwargs))
