"""Whether the classes the map shows are those whose value vectors the block adds, with weights of another scale."""
from typing import Any, Dict, Iterable, List

import torch
from scipy.stats import sem

from timm_tmblock.analysis import split_activations

MEASURES = ('agreement', 'matched_share', 'matched_off')


@torch.inference_mode()
def measure_mixing(model: Any, batches: Iterable[torch.Tensor]) -> Dict[str, float]:
    """How far the mixing coefficients follow the patch logits.

    The class a region matched is that of the largest patch logit. What is mixed is ReLU(BN(patch logits)) (section
    3.3), with a scale and a shift of each class, so that the largest coefficient may be another's.

    Args:
        model: A network with a template matching block, in evaluation mode.
        batches: Images (B, C, H, W), as normalised for the model.

    Returns:
        Means over regions in [0, 1] with their standard errors over images (`*_error`). agreement: regions whose best
        match has the largest coefficient; matched_share: what it has of the sum of them, 0 where all are 0;
        matched_off: regions where its coefficient is 0. And value_spread: root of the variance of the summed value
        vectors over that of what they are added to or concatenated with, both over regions and summed over channels.
    """
    found: Dict[str, List[torch.Tensor]] = {name: [] for name in MEASURES}
    spreads = {'values': Spread(), 'rest': Spread()}
    for images in batches:
        f = model._forward_trunk(images)
        logits = model.tm.patch_logits(f)
        p = model.tm.mix(logits)  # (B, K, H, W)
        matched = logits.argmax(1, keepdim=True)
        own, largest = p.gather(1, matched), p.amax(1, keepdim=True)
        regions = dict(
            agreement=(own == largest) & (own > 0),
            matched_share=split_activations(p)[0].gather(1, matched),
            matched_off=own == 0)
        for name, x in regions.items():
            found[name].append(x.float().mean(dim=(1, 2, 3)).cpu().double())
        spreads['values'].add(model.tm.value(p))
        spreads['rest'].add(f if model.tm.shortcut is None else model.tm.shortcut(f))
    values = {}
    for name, parts in found.items():
        means = torch.cat(parts).numpy()
        values[name], values[f'{name}_error'] = float(means.mean()), float(sem(means))
    values['value_spread'] = (spreads['values'].variance() / spreads['rest'].variance()) ** 0.5
    return values


class Spread:
    """Variance over regions, summed over channels, of maps that come in batches."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, torch.zeros(()), 0.

    def add(self, x: torch.Tensor) -> None:
        x = x.cpu().double()  # (B, D, H, W)
        self.count += x.numel() // x.shape[1]
        self.sum = self.sum + x.sum(dim=(0, 2, 3))
        self.squares += x.square().sum().item()

    def variance(self) -> float:
        return self.squares / self.count - (self.sum / self.count).square().sum().item()
