""" Training task of networks with template matching

Equation 3.1 of `Feature Embedding by Template Matching as a ResNet Block` - https://arxiv.org/abs/2210.00992
"""
from typing import Any, Callable, Dict, Optional, Union

import torch
import torch.nn as nn
from timm.task import ClassificationTask
from timm.utils import unwrap_model

from .auxiliary import PatchSupervised
from .models._base import TemplateMatchingNet


class TemplateMatchingTask(ClassificationTask):
    """Classification with supervision of each region by the label of its image.

    Equation 3.1 with lambda = `patch_loss_weight`:

        loss = (1 - lambda) * criterion(logits, y) + lambda * mean over regions of criterion(patch_logits, y)

    Targets are class indices (B,) or soft labels (B, num_classes), as the criterion takes them.

    Examples:

        ```python
        model = timm.create_model('rn26_tm', num_classes=10)
        task = TemplateMatchingTask(model, criterion_kwargs=dict(smoothing=0.1))
        result = task(input, target)
        result['loss'].backward()
        ```
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: Optional[Union[nn.Module, Callable]] = None,
            criterion_kwargs: Optional[Dict[str, Any]] = None,
            patch_loss_weight: float = 0.5,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
    ) -> None:
        """
        Args:
            model: Model of this package, whose patch supervision this switches on; a baseline wrapped as
                `PatchSupervised(model)`; or another one with `num_classes`, `set_patch_supervision` and
                `get_patch_classifier`, which returns a module with `num_templates`, as `PatchClassifier`.
            criterion: Loss function that averages over samples. Created from criterion_kwargs when None.
            criterion_kwargs: Arguments for timm's create_classification_loss() when criterion is None.
            patch_loss_weight: Weight lambda of the patch loss, in [0, 1].
            device: Device for task tensors/buffers
            dtype: Dtype for task tensors/buffers
            verbose: Enable info logging

        Raises:
            ValueError: If lambda is out of range, or the model has no patch logits for its classes.
        """
        super().__init__(
            model, criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        if not 0. <= patch_loss_weight <= 1.:
            raise ValueError(f'patch_loss_weight must be in [0, 1], got {patch_loss_weight}.')
        unwrapped = unwrap_model(model)
        needed = 'num_classes', 'set_patch_supervision', 'get_patch_classifier'
        if missing := [name for name in needed if not hasattr(unwrapped, name)]:
            raise ValueError(
                f'{type(unwrapped).__name__} has no patch logits ({", ".join(missing)}); train it with '
                f'ClassificationTask.')
        if any(type(m) is nn.SyncBatchNorm and hasattr(m, 'act') for m in unwrapped.modules()):
            raise ValueError(
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm has left out the activations of timm's norms; use "
                'timm.layers.convert_sync_batchnorm.')
        num_templates, num_classes = unwrapped.get_patch_classifier().num_templates, unwrapped.num_classes
        if num_templates != num_classes:
            if isinstance(unwrapped, PatchSupervised):
                remedy = 'wrap it in PatchSupervised again'
            elif not isinstance(unwrapped, TemplateMatchingNet):
                remedy = f'create its patch classifier with {num_classes} templates'
            elif num_classes > 0:
                remedy = f'call model.reset_templates({num_classes})'
            else:
                remedy = f'call model.reset_classifier({num_templates})'
            raise ValueError(
                f'The patch loss needs one template per class, but the model has {num_templates} templates'
                f' and {num_classes} classes; {remedy}.')
        unwrapped.set_patch_supervision(True)
        self.patch_loss_weight = patch_loss_weight

    def _find_auxiliary(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[PatchSupervised]:
        module = self.get_trainable_module(ema=ema) if module is None else module
        found = None if module is None else unwrap_model(module)
        return found if isinstance(found, PatchSupervised) else None

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs) -> nn.Module:
        """Compile the model before DDP wrapping; returns the model to evaluate, in `PatchSupervised` the inner one."""
        supervised = self._find_auxiliary()
        compiled = super().compile(backend=backend, mode=mode, **compile_kwargs)
        if supervised is None:
            return compiled
        eval_model: Any = torch.compile(supervised.model, backend=backend, mode=mode, **compile_kwargs)
        self.eval_model = eval_model
        return eval_model

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """Return the model for validation and checkpoints: in `PatchSupervised(model)`, the inner one."""
        if module is None and hasattr(self, 'eval_model_ema' if ema else 'eval_model'):  # set when it was compiled
            return super().get_eval_model(ema=ema)
        supervised = self._find_auxiliary(module, ema)
        return super().get_eval_model(module, ema) if supervised is None else supervised.model

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """Return the state of the auxiliary classifier, which no evaluation needs."""
        supervised = self._find_auxiliary(module, ema)
        return {} if supervised is None else {'aux': supervised.aux.state_dict()}

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        """Load the state of the auxiliary classifier, if there is one."""
        supervised = self._find_auxiliary(module, ema)
        if supervised is not None and state:
            supervised.aux.load_state_dict(state['aux'], strict=strict)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Forward pass through model and compute the loss of equation 3.1.

        Args:
            input: Input tensor [B, C, H, W]
            target: Class indices [B] or soft labels [B, num_classes]

        Returns:
            Dictionary containing:
                - 'loss': Weighted sum of the two terms
                - 'output': Logits
                - 'class_loss': Term of the logits
                - 'patch_loss': Term of the patch logits

        Raises:
            RuntimeError: If the model is in evaluation mode, where it returns only logits, or fused.
        """
        output = self.trainable_module(input)
        if isinstance(output, torch.Tensor):
            raise RuntimeError('The loss needs patch logits, which the model returns only in training; call train().')
        logits, patch_logits = output
        regions = patch_logits.shape[-2] * patch_logits.shape[-1]
        patch_logits = patch_logits.permute(0, 2, 3, 1).flatten(0, 2)  # (B * H * W, K)
        class_loss = self.criterion(logits, target)
        patch_loss = self.criterion(patch_logits, target.repeat_interleave(regions, dim=0))
        return {
            'loss': (1. - self.patch_loss_weight) * class_loss + self.patch_loss_weight * patch_loss,
            'output': logits,
            'class_loss': class_loss,
            'patch_loss': patch_loss,
        }
