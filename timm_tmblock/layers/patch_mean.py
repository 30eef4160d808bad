""" Patch Mean

Mean of a feature map over the patch centred at each pixel, the `x_g` of section 3.3 in
`Feature Embedding by Template Matching as a ResNet Block` - https://arxiv.org/abs/2210.00992
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


def _contiguous_for_gradient(x: torch.Tensor) -> torch.Tensor:
    # avg_pool2d with padding has wrong gradients where x is channels_last: on CUDA in releases before the fix of
    # https://github.com/pytorch/pytorch/issues/188344, and on MPS; there a batch norm of a part of the result is wrong
    # too, https://github.com/pytorch/pytorch/issues/174345
    return x.contiguous() if x.device.type == 'mps' or x.requires_grad and x.device.type != 'cpu' else x


torch.fx.wrap('_contiguous_for_gradient')  # it asks of tensors what a trace does not know


def check_patch_size(patch_size: float) -> int:
    """The patch size as an int.

    Raises:
        ValueError: If it is less than 1 or no whole number.
    """
    if patch_size < 1 or patch_size % 1:
        raise ValueError(f'patch_size must be a whole number of at least 1, got {patch_size}.')
    return int(patch_size)


class PatchMean(nn.Module):
    """Mean over the P x P window around each pixel, stride 1, same size out.

    The window covers offsets `-((P - 1) // 2) ... P // 2`, so for even P it reaches one pixel further right and down.
    At the border only the pixels inside the map count: the divisor is the number of features in the patch, |x_box|.

    Shape: (B, C, H, W) -> (B, C, H, W), for any H and W >= 1.
    """

    def __init__(self, patch_size: int) -> None:
        """
        Args:
            patch_size: Side P of the patch, in pixels of the feature map.

        Raises:
            ValueError: If `patch_size` is less than 1 or no whole number.
        """
        super().__init__()
        self.patch_size = check_patch_size(patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.patch_size
        x = _contiguous_for_gradient(x)
        x = F.avg_pool2d(x, p, stride=1, padding=p // 2, count_include_pad=False)
        if p % 2 == 0:
            x = x[:, :, 1:, 1:]  # symmetric padding starts an even window one pixel too early
        return x

    def extra_repr(self) -> str:
        return f'patch_size={self.patch_size}'
