""" BN-ReLU as a soft maximizer, measured

The quantities of sections 3.2 and 4.1 of
`Feature Embedding by Template Matching as a ResNet Block` - https://arxiv.org/abs/2210.00992
"""
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Tuple

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from .layers.fuse import BATCH_NORMS
from .mode import evaluating
from .models.tm_resnet import PreActBasic, PreActBottleneck


def match_threshold(norm: Any) -> torch.Tensor:
    """mu_k = E[a_k] - beta_k sqrt(Var(a_k)) / gamma_k, the activation above which BN-ReLU lets kernel k through.

    Where gamma_k is negative, it passes what is below.

    Args:
        norm: A batch norm.

    Returns:
        Thresholds (K,) in float64 from the running statistics; infinite or NaN where gamma_k is 0.

    Raises:
        ValueError: If the norm keeps no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError('The norm keeps no running statistics, so it has no threshold.')
    mean, var, weight, bias = (
        t.detach().cpu().double() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    return mean - bias * (var + norm.eps).sqrt() / weight


def split_activations(p: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """The mixture and the scale in activations after BN-ReLU, p = eta p*, with p* feasible for (P1) (section 3.2).

    A 1x1 convolution that follows, of value vectors nu_k, gives eta times the sum of p*_k nu_k.

    Args:
        p: Activations (B, K, H, W), none negative.

    Returns:
        p* (B, K, H, W), whose sum over kernels is 1, or 0 where no kernel is active, and eta (B, 1, H, W).
    """
    eta = p.sum(1, keepdim=True)
    return p / eta.where(eta > 0, 1.), eta


@dataclass
class MaximizerConstants:
    """Constants for soft maximizers in place of BN-ReLU, and those of each layer by its name.

    mu: mean over kernels of the thresholds that are not zero; eta: mean over pixels of the sum after BN-ReLU. Both over
    the kernels and pixels of all layers, so that a layer counts by how many it has.
    """
    mu: float
    eta: float
    layer_mu: Dict[str, float]
    layer_eta: Dict[str, float]


def measure_maximizer(model: nn.Module, batches: Iterable[torch.Tensor]) -> MaximizerConstants:
    """Measure mu and eta of the BN-ReLU layers that follow 3x3 convolutions in a trained network (section 4.1).

    Args:
        model: A ResNet of this package with BN-ReLU. It is run in evaluation mode, and left in the mode it was in.
        batches: Images (B, C, H, W), as normalised for the model.

    Raises:
        ValueError: If there are no images, or the model has no such layers or is not trained.
    """
    model = unwrap_model(model)  # a graph compiled earlier would not call the hooks
    norms = dict(_norms_after_3x3(model))
    if not norms:
        raise ValueError(
            'The model has no BN-ReLU after a 3x3 convolution; give a ResNet with maximizer="bn_relu", not fused.')
    sums: Dict[str, List[float]] = {name: [0., 0] for name in norms}  # of the output, and number of pixels

    def count(name: str):
        def hook(module: nn.Module, args: Tuple[torch.Tensor], output: torch.Tensor) -> None:
            wide = torch.float32 if output.device.type == 'mps' else torch.float64  # Apple's GPUs have no float64
            sums[name][0] += output.sum(dtype=wide).item()
            sums[name][1] += output.numel() // output.shape[1]
        return hook

    hooks = [norm.register_forward_hook(count(name)) for name, norm in norms.items()]
    try:
        with evaluating(model), torch.inference_mode():
            for images in batches:
                model(images)
    finally:
        for handle in hooks:
            handle.remove()
    if not all(pixels for _, pixels in sums.values()):
        raise ValueError('There were no images to measure on.')
    thresholds = {}
    for name, norm in norms.items():
        mu = match_threshold(norm)
        thresholds[name] = mu[mu.isfinite() & (mu != 0)]
        if not len(thresholds[name]):
            raise ValueError(f'All thresholds of {name} are 0, as before training; give a trained network.')
    totals, pixels = (sum(column) for column in zip(*sums.values()))
    return MaximizerConstants(
        mu=torch.cat(list(thresholds.values())).mean().item(),
        eta=totals / pixels,
        layer_mu={name: mu.mean().item() for name, mu in thresholds.items()},
        layer_eta={name: total / count for name, (total, count) in sums.items()})


def _norms_after_3x3(model: nn.Module) -> Iterable[Tuple[str, Any]]:
    for name, module in model.named_modules():
        attribute = {PreActBottleneck: 'norm3', PreActBasic: 'norm2'}.get(type(module))
        norm = None if attribute is None else getattr(module, attribute)
        if isinstance(norm, BATCH_NORMS) and type(norm.act) is nn.ReLU:
            yield f'{name}.{attribute}', norm
