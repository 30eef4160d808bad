"""Measuring a network while it is trained; train/evaluate.py measures files of every kind."""
from typing import Dict

import torch
from accelerate import Accelerator
from timm.task import ClassificationEvaluator
from tqdm import tqdm

from train.loader import Loader


@torch.no_grad()
def validate(
        model: torch.nn.Module,
        loader: Loader,
        accelerator: Accelerator,
        flip: bool = False,
        desc: str = 'Validating',
) -> Dict[str, float]:
    """Loss, top-1 and top-5 accuracy (%) over the whole set, each image counted once.

    Args:
        model: Network, on the accelerator's device.
        loader: This process's share of the set.
        accelerator: Processes and precision.
        flip: Add 'flip_top1' and so on: the same of logits averaged over the image and its mirror image.
        desc: What the progress bar calls it.
    """
    model.eval()
    evaluators = {
        prefix: ClassificationEvaluator(accelerator.device, max_samples=loader.max_samples)
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
