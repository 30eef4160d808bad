""" Template Matching Block

Embeds each region of a feature map by the classes it matches, from
`Feature Embedding by Template Matching as a ResNet Block` - https://arxiv.org/abs/2210.00992 (sections 3.3 and 3.4)
"""
from typing import Optional, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, convert_sync_batchnorm, get_device_dtype

from .fuse import fuse_conv_norm
from .patch_mean import PatchMean


class PatchClassifier(nn.Module):
    """Class scores of the patch around each pixel, the patch logits.

        x_g = patch_mean(f)                     (B, D, H, W)
        a   = match(x_g)                        (B, K, H, W)  1x1 conv with bias (alpha, beta)

    A 1x1 convolution commutes with the patch mean, bias included, so the mean is taken of whichever of f and a has
    fewer channels.
    """

    def __init__(self, dim: int, num_templates: int, patch_size: int = 4, device=None, dtype=None) -> None:
        """
        Args:
            dim: Input channels D.
            num_templates: Number of templates K, one per class when the patch logits are supervised.
            patch_size: Side of the matched patch, in pixels of the feature map.

        Raises:
            ValueError: If `num_templates` is less than 1, or `patch_size` is not a whole number of at least 1.
        """
        super().__init__()
        if num_templates < 1:
            raise ValueError(f'num_templates must be at least 1, got {num_templates}.')
        self.dim = dim
        self.num_templates = num_templates
        self.patch_mean = PatchMean(patch_size)
        self.match = nn.Conv2d(dim, num_templates, 1, bias=True, device=device, dtype=dtype)

    def patch_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores of the patch around each pixel, before normalisation: (B, D, H, W) -> (B, K, H, W)."""
        if self.num_templates < self.dim:
            return self.patch_mean(self.match(x))
        return self.match(self.patch_mean(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.patch_logits(x)


class TemplateMatching(PatchClassifier):
    """Feature embedding by template matching.

    With f the input feature map (B, D, H, W), a its patch logits and K templates:

        p    = relu(bn(a))                      (B, K, H, W)  mixing coefficients
        f'   = value(p)                         (B, V, H, W)  1x1 conv, column k is the value vector nu_k
        out  = shortcut(f) + f'  or  [f, f']    (B, out_dim, H, W)
    """

    def __init__(
            self,
            dim: int,
            num_templates: int,
            patch_size: int = 4,
            value_dim: Optional[int] = None,
            concat: bool = False,
            norm_act_layer: Type[nn.Module] = BatchNormAct2d,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Input channels D.
            num_templates: Number of templates K, one per class when the patch logits are supervised.
            patch_size: Side of the matched patch, in pixels of the feature map; in the paper half of the map's.
            value_dim: Channels V of the value vectors, `dim` if None. Other widths need `concat`.
            concat: Concatenate the values to the input instead of adding them to its 1x1 projection.
            norm_act_layer: Norm + activation layer that turns patch logits into mixing coefficients.

        Raises:
            ValueError: If `num_templates` is less than 1, `patch_size` is not a whole number of at least 1, or
                `value_dim` differs from `dim` without `concat`.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, num_templates, patch_size, **dd)
        value_dim = dim if value_dim is None else value_dim
        if value_dim != dim and not concat:
            raise ValueError(f'value_dim ({value_dim}) must equal dim ({dim}) where values are added; set concat=True.')
        self.value_dim = value_dim
        self.out_dim = dim + value_dim if concat else dim
        self.norm_act_layer = norm_act_layer

        self.norm = norm_act_layer(num_templates, **dd)
        self.value = nn.Conv2d(num_templates, value_dim, 1, bias=False, **dd)
        self.shortcut = None if concat else nn.Conv2d(dim, dim, 1, bias=False, **dd)

    @torch.jit.ignore
    def reset_templates(self, num_templates: int) -> None:
        """Replace the templates and their value vectors by `num_templates` new ones, to be trained; the shortcut stays.

        A norm that is synchronized over processes stays so.

        Raises:
            ValueError: If `num_templates` is less than 1.
        """
        if num_templates < 1:
            raise ValueError(f'num_templates must be at least 1, got {num_templates}.')
        dd = get_device_dtype(self)
        self.num_templates = num_templates
        self.match = nn.Conv2d(self.dim, num_templates, 1, bias=True, **dd)
        norm = self.norm_act_layer(num_templates, **dd)
        if isinstance(self.norm, nn.SyncBatchNorm):
            norm = convert_sync_batchnorm(norm, self.norm.process_group)
        self.norm = norm
        self.value = nn.Conv2d(num_templates, self.value_dim, 1, bias=False, **dd)
        for module in (self.match, self.norm, self.value):
            module.train(self.training)

    def mix(self, patch_logits: torch.Tensor) -> torch.Tensor:
        """Mixing coefficients of the value vectors, with ReLU not negative: (B, K, H, W) -> (B, K, H, W)."""
        return self.norm(patch_logits)

    def embed(self, x: torch.Tensor, patch_logits: torch.Tensor) -> torch.Tensor:
        """Add or concatenate the value vectors of the matched templates: (B, D, H, W) -> (B, out_dim, H, W)."""
        values = self.value(self.mix(patch_logits))
        if self.shortcut is None:
            return torch.cat([x, values], dim=1)
        return self.shortcut(x) + values

    def forward(self, x: torch.Tensor, return_patch_logits: bool = False):
        """
        Args:
            x: Input feature map (B, D, H, W).
            return_patch_logits: Return the patch logits (B, K, H, W) too; not in TorchScript.

        Returns:
            Output (B, out_dim, H, W), or a tuple of output and patch logits.
        """
        patch_logits = self.patch_logits(x)
        y = self.embed(x, patch_logits)
        if return_patch_logits and not torch.jit.is_scripting():
            return y, patch_logits
        return y

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """The block for inference, with only `forward` and `patch_logits`; timm's `reparameterize_model` calls it.

        The block itself if its norm is not a batch norm with running statistics, the weight of a convolution is
        computed (pruned, parametrized, that of an adapter), or its class is derived from this one.
        """
        if type(self) is not TemplateMatching:  # what it overrides would be left out
            return self
        if self.shortcut is not None and self.shortcut._parameters.get('weight') is None:
            return self
        match, act = fuse_conv_norm(self.match, self.norm)
        return self if match is self.match else FusedTemplateMatching(self, match, act)


class FusedTemplateMatching(nn.Module):
    """TemplateMatching for inference: batch norm folded into the matching convolution, which with the shortcut becomes
    one 1x1 convolution of f. The mean of patches is taken after it.

    The patch logits, which lie before the batch norm, have a convolution of their own.
    """

    def __init__(self, block: TemplateMatching, match: nn.Conv2d, act: nn.Module) -> None:
        """
        Args:
            block: The block to fuse.
            match: Its matching convolution with the batch norm folded in.
            act: Its activation.
        """
        super().__init__()
        self.dim, self.out_dim, self.num_templates = block.dim, block.out_dim, block.num_templates
        self.concat = block.shortcut is None
        self.conv = match
        if block.shortcut is not None:
            assert match.bias is not None
            weight, bias = torch.cat([match.weight, block.shortcut.weight]), F.pad(match.bias, [0, block.dim])
            self.conv = nn.Conv2d(block.dim, len(weight), 1, device='meta')
            for name, value in (('weight', weight), ('bias', bias)):
                setattr(self.conv, name, nn.Parameter(value.detach(), requires_grad=match.weight.requires_grad))
        self.patch_mean = block.patch_mean
        self.act = act
        self.value = block.value
        self.match = block.match  # of the patch logits alone
        self.train(block.training)

    def patch_logits(self, x: torch.Tensor) -> torch.Tensor:
        """As the unfused block's: (B, D, H, W) -> (B, K, H, W)."""
        return self.patch_mean(self.match(x))

    def forward(self, x: torch.Tensor, return_patch_logits: bool = False):
        """As the unfused block's, but for patch logits in training, which what it mixes no longer depends on.

        Raises:
            RuntimeError: If these are asked for.
        """
        if return_patch_logits and self.training and not torch.jit.is_scripting():
            raise RuntimeError('A fused model is for inference; train it before fuse(), or call eval().')
        y = self.conv(x)  # (B, K, H, W) or (B, K + D, H, W)
        values = self.value(self.act(self.patch_mean(y[:, :self.num_templates])))
        y = torch.cat([x, values], dim=1) if self.concat else y[:, self.num_templates:] + values
        if return_patch_logits and not torch.jit.is_scripting():
            return y, self.patch_logits(x)
        return y
