"""Means over a training epoch."""
from typing import Any, Callable, Dict, List, Optional

import torch
from accelerate import Accelerator

from timm_tmblock.errors import InputError


class Meter:
    """Running sums of a training epoch, kept on the device so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.dtype = torch.float32 if device.type == 'mps' else torch.float64  # Apple's GPUs have no float64
        self.sums: Dict[str, torch.Tensor] = {}
        self.bad_update = torch.full((), torch.inf, device=device)  # the first with a loss that is not finite
        self.bad_lr = torch.zeros((), device=device)

    def update(self, result: Dict[str, torch.Tensor], targets: torch.Tensor, update: int, lr: float) -> None:
        """Add the scalars of a task's result, and the top-1 accuracy against hard targets."""
        values = {k: v.detach() for k, v in result.items() if v.ndim == 0}
        self._note(~values['loss'].isfinite(), update, lr)
        values['top1'] = (result['output'].detach().argmax(1) == targets).float().mean() * 100
        values['batches'] = torch.ones((), device=self.device)
        for k, v in values.items():
            self.sums[k] = self.sums[k] + v.to(self.dtype) if k in self.sums else v.to(self.dtype)

    def means(self, accelerator: Optional[Accelerator] = None) -> Dict[str, float]:
        """Means over the batches so far, of all processes if an accelerator is given."""
        sums = self.sums if accelerator is None else accelerator.reduce(self.sums)
        batches = sums['batches'].item()
        return {k: v.item() / batches for k, v in sums.items() if k != 'batches'}

    @torch.no_grad()
    def check_weights(self, model: torch.nn.Module, update: int, lr: float) -> None:
        """Take weights that are not finite for a loss of `update` that was not, as that of the next would be."""
        tensors: List[Any] = [*model.parameters(), *model.buffers()]
        local = [t.to_local() if hasattr(t, 'to_local') else t for t in tensors]  # of FSDP the shards of this process
        finite = torch.stack([t.isfinite().all().to(self.device) for t in local]).all()
        self._note(~finite, update, lr)

    def _note(self, bad: torch.Tensor, update: int, lr: float) -> None:
        first = bad & self.bad_update.isinf()
        self.bad_update = torch.where(first, float(update), self.bad_update)
        self.bad_lr = torch.where(first, lr, self.bad_lr)

    def check_finite(self, resumption: Callable[[], str], accelerator: Optional[Accelerator] = None) -> None:
        """Stop a run whose loss has gone.

        Args:
            resumption: Says where the run can be taken up again.
            accelerator: Ask all processes, so that none writes down what has gone wrong on another.

        Raises:
            InputError: If a loss or a weight was not finite.
        """
        bad = torch.stack([self.bad_update, self.bad_lr])[None]
        bad = (bad if accelerator is None else accelerator.gather(bad)).cpu()
        update, lr = min(bad.tolist())
        if update != float('inf'):
            raise InputError(
                f'The loss or a weight was not finite in update {update + 1:.0f}, at learning rate {lr:g}; '
                f'{resumption()}. Use a lower --lr, a longer warmup, or --clip-grad.')

    def state_dict(self) -> Dict[str, float]:
        return {k: v.item() for k, v in self.sums.items()}

    def load_state_dict(self, states: List[Dict[str, float]], process: int) -> None:
        """Restore this process's sums; between epochs, where the number of processes may change, there are none."""
        state = states[process] if process < len(states) else {}
        self.sums = {k: torch.tensor(v, dtype=self.dtype, device=self.device) for k, v in state.items()}
