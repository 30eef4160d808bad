""" Training of dense stages without copies of the growing feature map

In a plain DenseNet each layer concatenates all features before it, normalises the copy and keeps both for the backward:
memory and traffic grow with the square of the depth. Here the features of a stage lie in one buffer, channels first,
so that those before a layer are a slice of it; a layer keeps only its normalised slice; and the batch statistics of a
channel are taken once. Results are those of the plain layers up to rounding. A GPU normalises channels-first features
slower than channels_last ones, so the plain layers are the faster ones there.
"""
from typing import Any, Iterable, Optional, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d

# private names that tell of functorch, forward-mode AD and global hooks; if torch lacks one, the plain layers run
_PRIVATE = (
    (torch._C, '_are_functorch_transforms_active'), (torch.autograd.forward_ad, '_current_level'),
    (torch.nn.modules.module, '_has_any_global_hook'))


def can_share_features(layers: Iterable[Any], x: torch.Tensor, layer_type: Type[nn.Module]) -> bool:
    """Whether `forward_shared` may stand in for the layers: those of `layer_type` in training, called as they are."""
    if not _is_plain_call(x):
        return False
    layers = list(layers)
    if not layers or any(type(layer) is not layer_type for layer in layers):
        return False  # wrapped, to be sharded or checkpointed
    eps = getattr(layers[-1].norm1, 'eps', None)
    return all(_is_plain_layer(layer, eps) for layer in layers)


def _is_plain_call(x: torch.Tensor) -> bool:
    """Whether nothing but autograd traces the call, and in one precision."""
    if not all(hasattr(module, name) for module, name in _PRIVATE):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active() \
            or torch.autograd.forward_ad._current_level >= 0 or torch.nn.modules.module._has_any_global_hook():
        return False
    if type(x) is not torch.Tensor or x.device.type not in ('cpu', 'cuda') or x.numel() <= x.shape[1]:
        return False
    device = x.device.type  # otherwise what is kept for the backward would have two types
    return not torch.is_autocast_enabled(device) or x.dtype == torch.get_autocast_dtype(device)


def _is_plain_layer(layer: Any, eps: Optional[float]) -> bool:
    """Whether a layer trains by batch statistics, with nothing in it that others have changed or look at."""
    norm, conv = layer.norm1, layer.conv1
    if any(type(m) is not BatchNormAct2d for m in (norm, layer.norm2)) \
            or any(type(m) is not nn.Conv2d or m.bias is not None for m in (conv, layer.conv2)):
        return False  # synchronized, frozen, parametrized, fused, ...
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding not in ((0, 0), 'valid') or conv.groups != 1:
        return False
    if not norm.training or norm.momentum is None or not norm.track_running_stats or norm.eps != eps \
            or type(norm.act) is not nn.ReLU or type(norm.drop) is not nn.Identity or norm.weight is None \
            or norm.weight.dtype not in (torch.float32, torch.float64):
        return False
    return not any(map(_is_intercepted, layer.modules()))


def _is_intercepted(module: nn.Module) -> bool:
    # by hooks, a compiler, or a `forward` of the instance as Accelerate gives it; most would not be called, and what
    # others return may cut a layer off from the backward, which goes from layer to layer
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks or 'forward' in vars(module)
                or getattr(module, '_compiled_call_impl', None) is not None)


def forward_shared(layers: Iterable[Any], x: torch.Tensor) -> torch.Tensor:
    """Run dense layers over features in a shared buffer: (B, C, H, W) -> (B, C + growth of the layers, H, W)."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    layers = list(layers)
    batch_size, _, height, width = x.shape
    features = _Features(layers[-1].norm1, x)
    news, shared = [x], None
    for layer in layers:
        shared = _Append.apply(shared, news[-1], features)  # (C, B * H * W)
        features.update_running_stats(layer.norm1)
        y = _NormActConv.apply(shared, layer.norm1.weight, layer.norm1.bias, layer.conv1.weight, features)
        y = y.view(-1, batch_size, height, width).transpose(0, 1).contiguous(memory_format=memory_format)
        news.append(layer.conv2(layer.norm2(y)))
    del features.buffer  # from now on kept by autograd alone, which lets it go after the backward
    return torch.cat(news, dim=1)


class _Features:
    """Features of a stage and the batch statistics of each channel.

    The buffer is written through `.data`: slices saved for the backward stay valid, as only later channels change.
    """

    def __init__(self, last_norm: BatchNormAct2d, x: torch.Tensor) -> None:
        channels = last_norm.num_features
        self.eps = last_norm.eps
        self.buffer = x.new_empty(channels, x.numel() // x.shape[1])
        self.mean, self.var, self.sample_var, self.invstd = last_norm.weight.detach().new_zeros(4, channels).unbind()
        self.first, self.end = x.shape[1], 0
        self.grad: Optional[torch.Tensor] = None  # of the buffer, while in the backward

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """Write features (B, G, H, W) behind those there are, and give them all: (C + G, N)."""
        start, self.end = self.end, self.end + new.shape[1]
        rows = self.buffer.data[start:self.end]
        rows.view(-1, len(new), *new.shape[2:]).copy_(new.transpose(0, 1))
        # with a momentum of 1 the running statistics become those of the batch, the variance that of a sample
        _, var = torch.batch_norm_update_stats(
            rows[None], self.mean[start:self.end], self.sample_var[start:self.end], 1.)
        self.var[start:self.end] = var
        self.invstd[start:self.end] = (var + self.eps).rsqrt()
        return self.buffer.data[:self.end]

    @torch.no_grad()
    def update_running_stats(self, norm: BatchNormAct2d) -> None:
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(self.mean[:self.end], norm.momentum)
        norm.running_var.lerp_(self.sample_var[:self.end], norm.momentum)


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():  # in a backward, with create_graph; once_differentiable drops gradients without a word
        raise RuntimeError(
            'There are no second derivatives over a shared buffer of features; create the model with '
            'memory_efficient=False.')


class _Append(torch.autograd.Function):
    """`_Features.append` with its gradient: (C, N), (B, G, H, W) -> (C + G, N)."""

    @staticmethod
    def forward(ctx: Any, shared: Optional[torch.Tensor], new: torch.Tensor, features: _Features) -> torch.Tensor:
        ctx.start, ctx.shape = features.end, new.shape
        return features.append(new)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        _refuse_second_derivatives()
        batch_size, channels, height, width = ctx.shape
        # the layer before adds to the rest of the same buffer and gives it on
        return None, grad[ctx.start:].view(channels, batch_size, height, width).transpose(0, 1), None


class _NormActConv(torch.autograd.Function):
    """1x1 convolution of the normalised features: (C, N) -> (M, N)."""

    @staticmethod
    def forward(
            ctx: Any,
            x: torch.Tensor,
            gamma: torch.Tensor,
            beta: torch.Tensor,
            weight: torch.Tensor,
            features: _Features,
    ) -> torch.Tensor:
        c = len(x)
        y = F.batch_norm(x[None], features.mean[:c], features.var[:c], gamma, beta, eps=features.eps).relu_()[0]
        matrix = weight.flatten(1).to(x.dtype)
        ctx.features = features
        ctx.is_first, ctx.is_last = c == features.first, c == len(features.buffer)
        ctx.save_for_backward(x, y, gamma, matrix)
        return matrix @ y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        _refuse_second_derivatives()
        x, y, gamma, matrix = ctx.saved_tensors
        features, c = ctx.features, len(x)
        grad_weight = (grad @ y.T).to(gamma.dtype)[:, :, None, None] if ctx.needs_input_grad[3] else None
        grad = torch.ops.aten.threshold_backward(matrix.T @ grad, y, 0)
        grad, grad_gamma, grad_beta = torch.ops.aten.native_batch_norm_backward(
            grad[None], x[None], gamma, None, None, features.mean[:c], features.invstd[:c], True, features.eps,
            list(ctx.needs_input_grad[:3]))
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.is_last:  # the first to come here
                features.grad = grad[0]
            else:
                features.grad[:c] += grad[0]
            grad_x = features.grad[:c]
        if ctx.is_first:
            features.grad = None
        return grad_x, grad_gamma, grad_beta, grad_weight, None
