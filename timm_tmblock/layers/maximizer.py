""" Maximizers of (P1)-(P3), the best matching kernel at each pixel

From `Feature Embedding by Template Matching as a ResNet Block` - https://arxiv.org/abs/2210.00992 (sections 3.1, 4.1)

With activations a (B, K, H, W) of K kernels and a margin mu that stands for no match, each gives mixing coefficients
eta * p (B, K, H, W), p >= 0 with a sum of at most 1 over the kernels. They take the place of BN-ReLU and need no batch
statistics. The defaults of mu, eta and epsilon are the paper's.
"""
from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

CHUNK = 2 ** 22  # noise values drawn at a time, 16 MB in float32; one sample of all activations if that is more


class HardMaximizer(nn.Module):
    """Arg-max, (P1): eta for the kernel of the largest activation if that is above mu, 0 for all others.

    No gradient flows back through it; the other two approach it as epsilon grows.
    """

    def __init__(self, mu: float = 2.5, eta: float = 17.) -> None:
        """
        Args:
            mu: Activation that a match has to exceed.
            eta: Scale of the result.
        """
        super().__init__()
        self.mu = mu
        self.eta = eta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, index = x.max(dim=1, keepdim=True)
        return torch.zeros_like(x).scatter(1, index, self.eta * (best > self.mu).to(x.dtype))

    def extra_repr(self) -> str:
        return f'mu={self.mu}, eta={self.eta}'


class SoftMaximizer(nn.Module):
    """Margin-augmented softmax, (P3): eta * exp(epsilon a_k) / (exp(epsilon mu) + sum of exp(epsilon a_k'))."""

    def __init__(self, mu: float = 2.5, eta: float = 17., epsilon: float = 1.) -> None:
        """
        Args:
            mu: Margin, the activation of no match.
            eta: Scale of the result.
            epsilon: Inverse temperature; the larger, the closer to arg-max.

        Raises:
            ValueError: If `epsilon` is not positive.
        """
        super().__init__()
        if epsilon <= 0:
            raise ValueError(f'epsilon must be positive, got {epsilon}.')
        self.mu, self.eta, self.epsilon = float(mu), float(eta), float(epsilon)  # TorchScript's F.pad takes only floats

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, [0, 0, 0, 0, 0, 1], value=self.mu)  # (B, K + 1, H, W)
        # the backward of softmax is Proposition 3.2 applied to a vector
        x = self.epsilon * (x - x.detach().amax(dim=1, keepdim=True))  # fp16 can overflow only to minus infinity
        return self.eta * torch.softmax(x, dim=1)[:, :-1]

    @torch.jit.ignore
    def jacobian(self, x: torch.Tensor) -> torch.Tensor:
        """Proposition 3.2: d output_j / d x_i at each pixel, eta * epsilon * (diag(p) - p p^T).

        Shape: (B, K, H, W) -> (B, K, K, H, W), symmetric in i and j.
        """
        p = self(x) / self.eta
        diagonal = torch.diag_embed(p.movedim(1, -1), dim1=1, dim2=2)
        return self.eta * self.epsilon * (diagonal - p[:, :, None] * p[:, None])

    def extra_repr(self) -> str:
        return f'mu={self.mu}, eta={self.eta}, epsilon={self.epsilon}'


@register_notrace_module
class PerturbedMaximizer(nn.Module):
    """Mean arg-max under normal noise, (P2): eta * E[argmax of (mu + z' / epsilon, a + z / epsilon)].

    The expectation is a mean over samples, in evaluation too. The backward is Proposition 3.1 with the same samples, as
    the arg-max itself has no gradient. Samples are never kept: they are drawn in chunks, and drawn again for the
    backward from the seed that torch's default generator gave for the forward, so memory does not grow with their
    number and `torch.manual_seed` makes both passes reproducible. For the same reason it is neither exported
    nor scripted.
    """

    def __init__(self, mu: float = 2.5, eta: float = 17., epsilon: float = 1., num_samples: int = 600) -> None:
        """
        Args:
            mu: Margin, the activation of no match.
            eta: Scale of the result.
            epsilon: Inverse standard deviation of the noise; the larger, the closer to arg-max.
            num_samples: Samples of the noise.

        Raises:
            ValueError: If there are no samples, or `epsilon` is not positive.
        """
        super().__init__()
        if num_samples < 1:
            raise ValueError(f'num_samples must be at least 1, got {num_samples}.')
        if epsilon <= 0:
            raise ValueError(f'epsilon must be positive, got {epsilon}.')
        self.mu = mu
        self.eta = eta
        self.epsilon = epsilon
        self.num_samples = num_samples

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_exporting = getattr(torch.compiler, 'is_exporting', bool)  # older versions do not tell
        if is_exporting() or torch.jit.is_tracing():
            raise RuntimeError(
                f'A perturbed maximizer cannot be exported: its output is a mean over {self.num_samples} random samples'
                f' drawn in each forward pass. Export a model with maximizer="softmax".')
        seed = int(torch.randint(2 ** 63 - 1, (), device='cpu'))
        return self.eta * _PerturbedArgmax.apply(x, self.mu, self.epsilon, self.num_samples, seed)

    def extra_repr(self) -> str:
        return f'mu={self.mu}, eta={self.eta}, epsilon={self.epsilon}, num_samples={self.num_samples}'


class _PerturbedArgmax(torch.autograd.Function):
    """p of (P2): (B, K, H, W) -> (B, K, H, W), computed in float32 or better."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mu: float, epsilon: float, num_samples: int, seed: int) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.constants = mu, epsilon, num_samples, seed
        if x.is_meta:  # has no generators
            return torch.empty_like(x)
        a = _at_least_float32(x)
        p = torch.zeros_like(a)
        for _, matched, index in _samples(a, *ctx.constants):
            p.scatter_add_(1, index, matched)
        return (p / num_samples).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        if torch.is_grad_enabled():  # create_graph; once_differentiable would drop gradients without a word
            raise RuntimeError('A perturbed maximizer has no second derivatives; use maximizer="softmax".')
        x, = ctx.saved_tensors
        if x.is_meta:
            return torch.empty_like(x), None, None, None, None
        mu, epsilon, num_samples, seed = ctx.constants
        a, grad = _at_least_float32(x), _at_least_float32(grad)
        # grad^T E[epsilon p~ z^T]: p~ is one-hot, so each sample adds its z times the gradient of the matched kernel
        out = torch.zeros_like(a)
        for z, matched, index in _samples(a, mu, epsilon, num_samples, seed):
            weight = grad.gather(1, index).mul_(matched).transpose(0, 1).unsqueeze(2)  # (n, B, 1, H, W)
            out += z.mul_(weight).sum(dim=0)
        return (out * (epsilon / num_samples)).to(x.dtype), None, None, None, None


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().to(torch.promote_types(x.dtype, torch.float32))


def _samples(a: torch.Tensor, mu: float, epsilon: float, num_samples: int, seed: int):
    """Chunks of n samples: noise z (n, B, K, H, W), whether a kernel matched and which (B, n, H, W)."""
    generator = torch.Generator(a.device).manual_seed(seed)
    size = max(1, min(num_samples, CHUNK // max(a.numel(), 1)))
    for start in range(0, num_samples, size):
        n = min(size, num_samples - start)
        z = torch.randn(n, *a.shape, generator=generator, device=a.device, dtype=a.dtype)
        z_margin = torch.randn(n, len(a), *a.shape[2:], generator=generator, device=a.device, dtype=a.dtype)
        best, index = torch.add(a, z, alpha=1 / epsilon).max(dim=2)
        matched = best > z_margin.div_(epsilon).add_(mu)
        yield z, matched.to(a.dtype).transpose(0, 1), index.transpose(0, 1)


_MAXIMIZERS: Dict[str, Callable[..., nn.Module]] = {
    'softmax': SoftMaximizer,
    'perturbed': PerturbedMaximizer,
}


def get_maximizer_layer(name: str, **kwargs) -> Optional[Callable[[], nn.Module]]:
    """Constructor of a maximizer, None for BN-ReLU.

    Args:
        name: 'bn_relu', 'softmax' or 'perturbed'.
        kwargs: Arguments of the maximizer.

    Raises:
        ValueError: For another name, or arguments for BN-ReLU.
    """
    if name == 'bn_relu':
        if kwargs:
            raise ValueError(f'bn_relu has no mu, eta or epsilon to set, got {", ".join(kwargs)}.')
        return None
    if name not in _MAXIMIZERS:
        raise ValueError(f'maximizer must be one of bn_relu, {", ".join(_MAXIMIZERS)}, got {name!r}.')
    return partial(_MAXIMIZERS[name], **kwargs)
