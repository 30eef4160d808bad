""" Folding of batch norms into the convolutions they follow, for inference
"""
from copy import deepcopy
from typing import Any, Tuple

import torch.nn as nn
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch.nn.utils import fuse_conv_bn_weights

BATCH_NORMS = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)


def fuse_conv_norm(conv: nn.Conv2d, norm: nn.Module) -> Tuple[nn.Conv2d, nn.Module]:
    """Fold a norm + activation layer into the convolution before it.

    Returns:
        A convolution with bias and the activation that follows it; both arguments if the norm is not a batch norm with
        running statistics, or the weight is computed from others, as where it is pruned or parametrized.
    """
    if not isinstance(norm, BATCH_NORMS) or norm.running_mean is None:
        return conv, norm
    if conv._parameters.get('weight') is None:
        return conv, norm
    fused = deepcopy(conv)
    tensors: Any = [  # in float64, as it is done once, and on the CPU, as Apple's GPUs have none
        None if t is None else (t if t.is_meta else t.cpu()).double()
        for t in (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    weight, bias, mean, var, gamma, beta = tensors
    fused.weight, fused.bias = (
        nn.Parameter(p.to(conv.weight), requires_grad=conv.weight.requires_grad)
        for p in fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, gamma, beta))
    return fused, norm.act
