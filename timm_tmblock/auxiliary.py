""" Auxiliary supervision of a network without the block, the RN26-aux of Table 1

The patch classifier of section 3.3 on the output of stage 3, used for the loss of equation 3.1 and nothing else, from
`Feature Embedding by Template Matching as a ResNet Block` - https://arxiv.org/abs/2210.00992 (section 4.2)
"""
from typing import Any, Callable, Dict, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.models import group_parameters
from timm.utils import unwrap_model

from .layers import PatchClassifier
from .models._base import TemplateMatchingNet, has_fused_norms


class PatchSupervised(nn.Module):
    """A baseline and, for its training, a classifier of the patches at the input of its last stage.

    `model` stays as it is: evaluate, save and export it; it contains nothing of `aux`. To distribute, shard or hook
    training use the whole module, as training calls the parts of `model` one by one.

    Examples:

        ```python
        supervised = PatchSupervised(timm.create_model('rn26', num_classes=10))
        task = TemplateMatchingTask(supervised)
        ...
        torch.save(supervised.model.state_dict(), 'rn26.pth')
        ```
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: Network of this package without template matching.

        Raises:
            ValueError: If the model has no place for the classifier, has patch logits of its own, has no classes, or is
                fused.
        """
        super().__init__()
        if not isinstance(model, TemplateMatchingNet) and isinstance(unwrap_model(model), TemplateMatchingNet):
            raise ValueError('This model is compiled or distributed; wrap it in PatchSupervised before that.')
        if not isinstance(model, TemplateMatchingNet):
            raise ValueError(
                f'{type(model).__name__} is not of this package, so its last stage is unknown; use rn26, or give the '
                f'network a timm_tmblock.layers.PatchClassifier.')
        if model.has_template_matching:
            raise ValueError('This model has patch logits of its own; train it as it is.')
        if model.num_classes < 1:
            raise ValueError('This model has no classes to tell patches apart by; create it with num_classes.')
        if has_fused_norms(name for name, _ in model.named_parameters()):
            raise ValueError('This model is fused, which is for inference; wrap it before fuse().')
        parameter = next(model.parameters())
        self.aux = PatchClassifier(
            model.patch_channels, model.num_classes, model.patch_size, device=parameter.device, dtype=parameter.dtype)
        self.model = model  # last, for the head is where timm looks for it: AGC leaves out the last two parameters
        self.patch_supervision = True

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def in_chans(self) -> int:
        return self.model.in_chans

    @property
    def _traits(self) -> Dict[str, Any]:
        # of the input, beside in_chans and pretrained_cfg, for timm's data config
        return getattr(self.model, '_traits', {})

    @property
    def pretrained_cfg(self) -> Optional[Dict[str, Any]]:
        """The model's, from which timm's data config resolves its preprocessing."""
        return getattr(self.model, 'pretrained_cfg', None)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing."""
        self.model.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Get the classifier module."""
        return self.model.get_classifier()

    @torch.jit.ignore
    def set_patch_supervision(self, enable: bool = True) -> None:
        """Make `forward` return `(logits, patch_logits)` in training, which it does unless switched off."""
        self.patch_supervision = enable

    @torch.jit.ignore
    def get_patch_classifier(self) -> nn.Module:
        """Get the module whose class scores are the patch logits."""
        return self.aux

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layer of each parameter, for layer-wise learning rates: the model's, with `aux` in the last one."""
        layers = group_parameters(self.model, self.model.group_matcher(coarse), reverse=True)
        last = max(layers.values())
        return lambda name: layers.get(name.removeprefix('model.'), last)

    def forward(self, x: torch.Tensor) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
        """Logits (B, num_classes), in training also patch logits (B, num_classes, H/r, W/r)."""
        if not (self.patch_supervision and self.training):
            return self.model(x)
        x = self.model._forward_trunk(x)
        patch_logits = self.aux(x)
        return self.model.forward_head(self.model._forward_last(x)), patch_logits
