"""A training step as a CUDA graph."""
import warnings
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
from timm.optim import Muon, NAdamW

from timm_tmblock.errors import InputError, first_line

# others read numbers in Python that change from step to step, or wait for the GPU
CAPTURABLE = (Muon, NAdamW, torch.optim.NAdam, torch.optim.AdamW, torch.optim.Adam)
Step = Callable[[torch.Tensor, torch.Tensor], Dict[str, torch.Tensor]]
WARMUP_STEPS = 3  # in which the optimizer makes its state, cuDNN chooses kernels and a compiler compiles


def set_capturable(optimizer: Any, capturable: bool, device: torch.device) -> None:
    """Let an optimizer count its steps on the GPU, where a graph can, or on the CPU.

    Its state may be of a checkpoint, written with the other setting or loaded onto the GPU with the weights.
    """
    for group in optimizer.param_groups:
        if 'capturable' not in group:
            continue
        group['capturable'] = capturable
        on_device = capturable or group.get('fused')
        for state in (optimizer.state[p] for p in group['params'] if p in optimizer.state):
            for key in ('step', 'mu_product'):
                if key in state:
                    state[key] = state[key].to(device if on_device else 'cpu')


class GraphedStep:
    """A training step (forward, backward and update) that is captured once and then replayed.

    Networks of small images have hundreds of small kernels, and Muon has dozens more for each weight; to launch them
    can take longer than to run them. The first steps, and batches of another shape, run as they are.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        """
        Args:
            step: Takes images and targets, updates the weights, leaves no gradients, and returns tensors. It must not
                wait for the device.
            optimizer: Optimizer of the step, set capturable.
            device: GPU the step runs on.

        Raises:
            InputError: If the optimizer cannot be captured.
        """
        if type(getattr(optimizer, 'optimizer', optimizer)) not in CAPTURABLE:  # Accelerate's has one in it
            raise InputError(
                '--cuda-graph needs an optimizer whose steps can be captured; use --opt muon, nadamw, nadam, adamw or '
                'adam.')
        self.step = step
        self.optimizer = optimizer
        self.device = device
        self.steps = 0
        self.stream = torch.cuda.Stream(device)
        self.graph: Optional[torch.cuda.CUDAGraph] = None
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> Dict[str, torch.Tensor]:
        """
        Raises:
            InputError: If the step cannot be captured.
        """
        if self.steps == WARMUP_STEPS:
            self.images, self.targets = images.clone(), targets.clone()
            self._capture()
        self.steps += 1
        for rate, group in zip(self.rates, self.optimizer.param_groups):
            rate.fill_(group['lr'])
        if self.graph is None or images.shape != self.images.shape or targets.shape != self.targets.shape:
            return self._run(images, targets)
        self.images.copy_(images)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.result

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Learning rates as tensors: a schedule writes numbers, which a graph would hold for good."""
        groups = self.optimizer.param_groups
        numbers = [group['lr'] for group in groups]
        for group, rate in zip(groups, self.rates):
            group['lr'] = rate
        try:
            yield
        finally:
            for group, number in zip(groups, numbers):
                group['lr'] = number

    def _run(self, images: torch.Tensor, targets: torch.Tensor) -> Dict[str, torch.Tensor]:
        # on another stream, as what the default one began cannot be captured
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), self._rates_on_device(), warnings.catch_warnings():
            warnings.filterwarnings('ignore', '.*capturable=True')  # PyTorch wants to see it captured at once
            result = self.step(images, targets)
        current.wait_stream(self.stream)
        return result

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that pins the next batches goes on
        capturing = torch.cuda.graph(graph, stream=self.stream, capture_error_mode='thread_local')
        try:
            with self._rates_on_device(), capturing:
                self.result = {k: v.detach() for k, v in self.step(self.images, self.targets).items()}
        except RuntimeError as e:
            errors: List[BaseException] = [e]  # the end of a capture that failed is an error too
            while errors[-1].__context__ is not None:
                errors.append(errors[-1].__context__)
            for error in errors:
                if isinstance(error, torch.OutOfMemoryError):
                    raise error from None
            reason = first_line(errors[-1])
            raise InputError(f'This step cannot be captured ({reason}); use --no-cuda-graph.') from e
        self.graph = graph
