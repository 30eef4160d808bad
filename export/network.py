"""The network as it is exported: folded, in the form deployment runtimes know best, with what goes around it."""
from copy import deepcopy
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d

from timm_tmblock.errors import InputError
from timm_tmblock.explanation import forward_class_activation
from timm_tmblock.layers import PatchMean, PerturbedMaximizer, TemplateMatching, fuse_conv_norm

# operators of timm's kinds of global pooling
GLOBAL_POOLS = dict(
    avg=['GlobalAveragePool'], max=['GlobalMaxPool'],
    avgmax=['GlobalAveragePool', 'GlobalMaxPool'], catavgmax=['GlobalAveragePool', 'GlobalMaxPool'])


class OnnxPatchMean(nn.Module):
    """PatchMean as ONNX AveragePool with the same padding on all sides, and for even patches one Slice, as in PyTorch.

    AveragePool may have more padding on one side, but ONNX Runtime's CUDA provider leaves that out without a word, in
    releases before https://github.com/microsoft/onnxruntime/pull/29631.
    """
    starts: torch.Tensor
    ends: torch.Tensor
    axes: torch.Tensor

    def __init__(self, patch_size: int, opset: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.opset = opset
        self.register_buffer('starts', torch.tensor([1, 1]))
        self.register_buffer('ends', torch.tensor([torch.iinfo(torch.int64).max] * 2))
        self.register_buffer('axes', torch.tensor([2, 3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.patch_size
        b, c, h, w = x.shape
        grown = 1 - p % 2  # in rows and columns, of windows that start too early
        y = torch.onnx.ops.symbolic(
            'AveragePool', (x,), dict(kernel_shape=[p, p], strides=[1, 1], pads=[p // 2] * 4),
            dtype=x.dtype, shape=(b, c, h + grown, w + grown), version=self.opset)
        if not grown:
            return y
        return torch.onnx.ops.symbolic(
            'Slice', (y, self.starts, self.ends, self.axes), dtype=x.dtype, shape=x.shape, version=self.opset)


class OnnxGlobalPool(nn.Module):
    """Global pooling by ONNX GlobalAveragePool and GlobalMaxPool.

    What torch.onnx writes of the average, ReduceMean with its axes as an input, is misread by TensorRT 8 and refused by
    some of 10; for the maximum PyTorch 2.11 has nothing.
    """

    def __init__(self, pool_type: str, opset: int) -> None:
        super().__init__()
        self.pool_type = pool_type
        self.opset = opset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = [
            torch.onnx.ops.symbolic(operator, (x,), dtype=x.dtype, shape=(*x.shape[:2], 1, 1), version=self.opset)
            for operator in GLOBAL_POOLS[self.pool_type]]
        if self.pool_type == 'avgmax':
            y = 0.5 * (pooled[0] + pooled[1])
        else:
            y = torch.cat(pooled, 1) if len(pooled) > 1 else pooled[0]
        # not flatten(1), of which torch.onnx makes a Reshape that some cannot read, or three nodes
        return torch.onnx.ops.symbolic(
            'Flatten', (y,), dict(axis=1), dtype=y.dtype, shape=y.shape[:2], version=self.opset)


def check_deterministic(model: nn.Module) -> None:
    """
    Raises:
        InputError: If the network draws random numbers in evaluation.
    """
    for m in model.modules():
        if isinstance(m, PerturbedMaximizer):
            raise InputError(
                f'The model has perturbed maximizers, which draw {m.num_samples} random samples in each forward pass, '
                f'so no ONNX file can repeat its results; export a model with maximizer=softmax.')


def fold(model: Any, opset: int, patch_logits: bool, norms_as_convolutions: bool = False) -> Any:
    """A copy of a network for export: norms folded where they can be, pooling in ONNX's own operators.

    Norms that stay are y = scale * x + shift with statistics 0 and 1, so that half precision takes no root of a small
    variance. That of template matching stays where the patch logits before it are wanted.

    Args:
        model: Network, left as it is.
        opset: Of the ONNX operators.
        patch_logits: Whether the patch logits are wanted.
        norms_as_convolutions: Write norms that stay as depthwise 1x1 convolutions, which can be quantized. Between two
            norms in floating point, a CPU would change back and forth.

    Raises:
        InputError: If the network draws random numbers in evaluation.
    """
    check_deterministic(model)
    model = deepcopy(model).float().cpu().eval()
    tm, model.tm = model.tm, nn.Identity()
    model.fuse()
    model.tm = tm  # as it is: one convolution for matching and shortcut, as fuse() makes it, costs slices in ONNX
    if isinstance(tm, TemplateMatching) and not patch_logits:
        tm.match, tm.norm = fuse_conv_norm(tm.match, tm.norm)
    for name, m in list(model.named_modules()):
        if isinstance(m, PatchMean):
            model.set_submodule(name, OnnxPatchMean(m.patch_size, opset))
        elif isinstance(m, SelectAdaptivePool2d) and m.pool_type in GLOBAL_POOLS and isinstance(m.flatten, nn.Flatten):
            model.set_submodule(name, OnnxGlobalPool(m.pool_type, opset))
        elif isinstance(m, BatchNormAct2d) and m.running_mean is not None:
            _standardize(m)
            if norms_as_convolutions:
                model.set_submodule(name, nn.Sequential(_to_convolution(m), m.act))
    return model


@torch.no_grad()
def _standardize(norm: Any) -> None:
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    norm.bias.copy_(norm.bias.double() - norm.running_mean.double() * scale)
    norm.weight.copy_(scale)
    norm.running_mean.zero_()
    norm.running_var.fill_(1)
    norm.eps = 1e-8  # adds nothing to 1 in float32; PyTorch 2.11 refuses 0


def _to_convolution(norm: Any) -> nn.Conv2d:
    conv = nn.Conv2d(norm.num_features, norm.num_features, 1, groups=norm.num_features)
    conv.weight = nn.Parameter(norm.weight.detach().view(-1, 1, 1, 1))
    conv.bias = nn.Parameter(norm.bias.detach())
    return conv


def forward_scores(model: Any, x: torch.Tensor, patch_method: Optional[str]) -> Tuple[torch.Tensor, ...]:
    """Class scores and, by one of timm_tmblock.explanation.METHODS, those of each region; without them if None."""
    if patch_method == 'cam':
        return forward_class_activation(model, x)
    return model.forward_patch_logits(x) if patch_method else (model(x),)


class ExportedNetwork(nn.Module):
    """What is traced: image in, class scores and, if asked for, those of each region out, both float32."""

    def __init__(
            self,
            model: nn.Module,
            data_config: Dict[str, Any],
            patch_method: Optional[str] = None,
            softmax: bool = False,
            preprocessing: Optional[str] = None,
            dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            model: Network of `fold`.
            data_config: Its mean and std, of pixels in [0, 1].
            patch_method: Also return the class scores of each region: 'match', those of template matching, or 'cam', of
                the classifier at each position of the last feature map.
            softmax: Return probabilities.
            preprocessing: 'NHWC' or 'NCHW' takes uint8 pixels so laid out and normalises them; None takes (B, C, H, W)
                normalised.
            dtype: Precision inside.
        """
        super().__init__()
        self.patch_method = patch_method
        self.model: Any = model.to(dtype)
        self.softmax = softmax
        self.preprocessing = preprocessing
        self.dtype = dtype
        mean, std = (torch.tensor(data_config[k], dtype=torch.float64).view(-1, 1, 1) for k in ('mean', 'std'))
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.register_buffer('scale', (1 / (255 * std)).float())
        self.register_buffer('shift', (-mean / std).float())

    def forward(self, image: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        x = image.float()
        if self.preprocessing == 'NHWC':
            x = x.permute(0, 3, 1, 2)  # as floats: TensorRT takes uint8 as an input and casts it, no more
        if self.preprocessing:
            x = x * self.scale + self.shift
        x = x.to(self.dtype)
        outputs = tuple(y.float() for y in forward_scores(self.model, x, self.patch_method))
        return tuple(y.softmax(1) for y in outputs) if self.softmax else outputs
