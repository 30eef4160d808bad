"""Means over a training epoch."""
from typing import Dict, Optional

import torch
from accelerate import Accelerator


class Meter:
    """Running sums of a training epoch, kept on the device so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: Dict[str, torch.Tensor] = {}

    def update(self, result: Dict[str, torch.Tensor], targets: torch.Tensor) -> None:
        """Add the scalars of a task's result, and the top-1 accuracy against hard targets."""
        values = {k: v.detach() for k, v in result.items() if v.ndim == 0}
        values['top1'] = (result['output'].detach().argmax(1) == targets).float().mean() * 100
        values['batches'] = torch.ones((), device=self.device)
        for k, v in values.items():
            self.sums[k] = self.sums[k] + v.double() if k in self.sums else v.double()

    def means(self, accelerator: Optional[Accelerator] = None) -> Dict[str, float]:
        """Means over the batches so far, of all processes if an accelerator is given."""
        sums = self.sums if accelerator is None else accelerator.reduce(self.sums)
        batches = sums['batches'].item()
        return {k: v.item() / batches for k, v in sums.items() if k != 'batches'}

    def state_dict(self) -> Dict[str, float]:
        return {k: v.item() for k, v in self.sums.items()}

    def load_state_dict(self, state: Dict[str, float]) -> None:
        self.sums = {k: torch.tensor(v, dtype=torch.float64, device=self.device) for k, v in state.items()}
