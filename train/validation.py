"""Measuring a network while it is trained; train/evaluate.py measures files of every kind."""
from typing import Dict, Optional

import torch
import torch.distributed as dist
from accelerate import Accelerator
from timm.task import ClassificationEvaluator
from tqdm import tqdm

from train.loader import Loader


class Evaluator(ClassificationEvaluator):
    """timm's, with 'balanced_accuracy' too: the mean of the top-1 accuracies of the classes that have images."""

    def reset(self) -> None:
        super().reset()
        self.by_class: Optional[torch.Tensor] = None  # images, and right ones among them, (2, num_classes)

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        before = self.num_samples
        super().update(output, target)
        output, target = (x.detach()[:self.num_samples - before] for x in (output, target))
        if self.by_class is None:
            self.by_class = torch.zeros(2, output.shape[1], dtype=torch.int64, device=self.device)
        predicted = output.float().topk(min(5, output.shape[1])).indices[:, 0]  # as there, where classes are a tie
        right = torch.stack([torch.ones_like(target), predicted.eq(target).to(target.dtype)])
        self.by_class.index_add_(1, target, right)

    def compute(self, distributed: bool = False) -> Dict[str, float]:
        values = super().compute(distributed)
        assert self.by_class is not None
        by_class = self.by_class.clone()
        if distributed:
            dist.all_reduce(by_class)
        by_class = by_class.cpu().double()  # Apple's GPUs have no float64
        images, right = by_class[:, by_class[0] > 0]
        return {**values, 'balanced_accuracy': 100 * (right / images).mean().item()}


@torch.no_grad()
def validate(
        model: torch.nn.Module,
        loader: Loader,
        accelerator: Accelerator,
        flip: bool = False,
        desc: str = 'Validating',
) -> Dict[str, float]:
    """Loss, top-1, top-5 and balanced accuracy (%) over the whole set, each image counted once.

    Args:
        model: Network, on the accelerator's device.
        loader: This process's share of the set.
        accelerator: Processes and precision.
        flip: Add 'flip_top1' and so on: the same of logits averaged over the image and its mirror image.
        desc: What the progress bar calls it.
    """
    model.eval()
    evaluators = {
        prefix: Evaluator(accelerator.device, max_samples=loader.max_samples)
        for prefix in (('', 'flip_') if flip else ('',))
    }
    batches = tqdm(
        loader.epoch(0), total=len(loader), desc=desc, unit='batch', leave=False,
        disable=not accelerator.is_main_process)
    for images, targets in batches:
        with accelerator.autocast():
            output = model(images)
            mirrored = model(images.flip(3)) if flip else output
        evaluators[''].update(output, targets)
        if flip:
            evaluators['flip_'].update((output.float() + mirrored.float()) / 2, targets)
    return {
        prefix + name: value
        for prefix, evaluator in evaluators.items()
        for name, value in evaluator.compute(distributed=accelerator.num_processes > 1).items()
    }
