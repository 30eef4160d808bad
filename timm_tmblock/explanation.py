""" Which class each region of an image matched

The patch logits of a template matching block, read as probabilities over classes for each region, from
`Feature Embedding by Template Matching as a ResNet Block` - https://arxiv.org/abs/2210.00992

Or, of a network with the block or without it, the class scores of each position of its last feature map, from
`Learning Deep Features for Discriminative Localization` - https://arxiv.org/abs/1512.04150
"""
import colorsys
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from timm.data import create_transform, resolve_input_data_config
from timm.utils import unwrap_model

from .auxiliary import PatchSupervised
from .checkpoint import load_pretrained
from .errors import InputError
from .image import read_image
from .mode import evaluating
from .models._base import TemplateMatchingNet
from .models._labels import list_class_names

ImageSource = Union[str, Path, bytes, Image.Image, np.ndarray]
METHODS = ('match', 'cam')

# Matplotlib's tab10, then hues a golden angle apart
_COLORS = ['#1f77b4', '#ff7f0e', '#2ca02c', '#d62728', '#9467bd', '#8c564b', '#e377c2', '#7f7f7f', '#bcbd22', '#17becf']
# eight points of Matplotlib's viridis
_HEAT = np.array([
    (68, 1, 84), (70, 50, 127), (54, 92, 141), (39, 127, 142), (31, 161, 135), (74, 194, 109), (159, 218, 58),
    (253, 231, 37),
], dtype=float)


@dataclass(eq=False, repr=False)
class Explanation:
    """What a network made of an image, region by region.

    By the method 'match' a region is a patch around a position of the map that templates are matched on; by 'cam' it is
    a position of the last feature map, and there are as many templates as classes.
    """
    image: Image.Image  # what the network saw, in the resolution of the file
    probabilities: np.ndarray  # (num_classes,)
    patch_probabilities: np.ndarray  # (num_templates, H/r, W/r), sums to 1 over templates
    class_names: Sequence[str]
    template_names: Sequence[str]
    method: str = 'match'  # of METHODS
    activations: Optional[np.ndarray] = None  # by 'cam' the class scores themselves, (num_classes, H/r, W/r)

    @property
    def patch_classes(self) -> np.ndarray:
        """Index of the best template, or class, of each region, (H/r, W/r)."""
        return self.patch_probabilities.argmax(axis=0)

    def top(self, k: int = 3) -> List[Tuple[str, float]]:
        """The k most probable classes of the image, with their probabilities."""
        order = (-self.probabilities).argsort(kind='stable')[:k]  # of equals the first, as argmax
        return [(self.class_names[i], float(self.probabilities[i])) for i in order]

    def template_index(self, name: Optional[str] = None) -> int:
        """Index of a template by its class name.

        Args:
            name: The predicted class if None; if that has no template, the one most probable over all regions.

        Raises:
            InputError: If there is no such class, or it has no template.
        """
        if name is None:
            best = int(self.probabilities.argmax())
            if list(self.template_names) == list(self.class_names):  # two of which may have one name
                return best
            name = self.class_names[best]
            if name not in self.template_names:
                return int(self.patch_probabilities.mean(axis=(1, 2)).argmax())
        if name not in self.template_names:
            names = ', '.join(self.template_names)
            if name in self.class_names:
                raise InputError(
                    f'{name!r} has no template of its own; use method="cam" (--method cam) or one of: {names}.')
            kind = 'classes' if list(self.template_names) == list(self.class_names) else 'templates'
            raise InputError(f'There is no class {name!r}; the {kind} are {names}.')
        return list(self.template_names).index(name)

    def heat_map(self, class_name: Optional[str] = None) -> np.ndarray:
        """Evidence for a class at each pixel, upsampled from the regions to the image, (H, W) in [0, 1].

        By the method 'match' the probability that the region matches the class; by 'cam' its score for the class over
        the largest of any class and region, 0 where it is negative. Grad-CAM before its ReLU ranks regions in the same
        order, as it differs only by the classifier's bias and a factor.

        A region is drawn as a cell of an even grid over the image. The centre of what it scores lies up to half a cell
        from that of the cell: windows of even patches reach one region further right and down, and strided
        convolutions are centred on the upper left pixel of a cell.

        Args:
            class_name: The predicted class if None.

        Raises:
            InputError: If there is no such class.
        """
        return self._heat_map(self.template_index(class_name))

    def _heat_map(self, index: int) -> np.ndarray:
        if self.activations is None:
            values = self.patch_probabilities[index]
        else:
            values = (self.activations[index] / max(self.activations.max(), 1e-6)).clip(0, 1)
        values = values.astype(np.float32)
        return np.asarray(Image.fromarray(values).resize(self.image.size, Image.Resampling.BILINEAR)).clip(0, 1)

    def picture(self, class_name: Optional[str] = None, size: int = 288) -> Image.Image:
        """The image, the class each region matched with a legend, and the heat map of one class, side by side.

        Args:
            class_name: Class of the heat map, the predicted class if None.
            size: Width of each of the three panels, in pixels.

        Raises:
            InputError: If there is no such class.
        """
        return _draw(self, class_name, size)

    def _repr_png_(self) -> Optional[bytes]:
        """The picture, as notebooks show it."""
        return self.picture()._repr_png_()


class Explainer:
    """Explains images by one model; call it with an image, or use `explain` for a single one."""

    def __init__(self, source: Union[nn.Module, str, Path], method: Optional[str] = None) -> None:
        """
        Args:
            source: A model of this package, an ONNX file exported with patch logits, a weight file of training, the
                name of a pretrained model, or a network of your own with `num_classes`, `pretrained_cfg`,
                `get_patch_classifier` and `forward_patch_logits`, which returns logits and patch logits.
            method: 'match' for the patch logits of a template matching block, 'cam' for class activation maps. If None,
                the one a file was exported with, or 'match' for a model.

        Raises:
            InputError: If the source cannot be read, or has no map of this kind.
        """
        if method not in (None, *METHODS):
            raise InputError(f'There is no method {method!r}; the methods are {", ".join(METHODS)}.')
        self.method = method or 'match'
        if isinstance(source, nn.Module):
            self._use_torch(unwrap_model(source))  # compiled, or of DataParallel
        elif str(source).endswith('.onnx'):
            self._use_onnx(Path(source), method)
        else:
            self._use_torch(load_pretrained(str(source)))
        input_size = tuple(self.data_config['input_size'])
        channels = input_size[0]
        if channels not in (1, 3):
            raise InputError(f'The model takes images of {channels} channels; only grey and RGB ones can be explained.')
        if self.data_config.get('crop_mode') == 'border':
            raise InputError("The crop mode 'border' pads images, and padding belongs to no region; use another.")
        self.transform = create_transform(
            input_size,
            interpolation=self.data_config['interpolation'],
            mean=tuple(self.data_config['mean']),
            std=tuple(self.data_config['std']),
            crop_pct=self.data_config['crop_pct'],
            crop_mode=self.data_config.get('crop_mode'),
        )

    def _use_torch(self, model: Any) -> None:
        if isinstance(model, PatchSupervised):
            model = model.model
        if self.method == 'match' and not getattr(
                model, 'has_template_matching',
                hasattr(model, 'forward_patch_logits') and hasattr(model, 'get_patch_classifier')):
            raise InputError(
                f'{type(model).__name__} has no patch logits (forward_patch_logits, get_patch_classifier); use a *_tm '
                f"model, or the method 'cam'.")
        if self.method == 'cam' and not has_class_activation(model):
            raise InputError(
                f"The method 'cam' needs a network of this package that ends in average pooling and a linear "
                f'classifier, which {type(model).__name__} is not.')
        if not hasattr(model, 'pretrained_cfg'):
            raise InputError('The model does not say how images are prepared for it; make it with timm.create_model().')
        if model.num_classes < 1:
            raise InputError('The model has no classifier; give it one with reset_classifier().')
        self.data_config = resolve_input_data_config(model, pretrained_cfg=model.pretrained_cfg)
        names = list_class_names(model.pretrained_cfg)
        num_templates = model.num_classes
        if self.method == 'match':
            num_templates = model.get_patch_classifier().num_templates
        self._set_names(names, model.num_classes, num_templates)

        def run(x: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
            parameter = next(model.parameters())
            with evaluating(model), torch.inference_mode():
                inputs = torch.from_numpy(x).to(parameter.device, parameter.dtype)
                if self.method == 'match':
                    outputs = model.forward_patch_logits(inputs)
                else:
                    outputs = forward_class_activation(model, inputs)
            logits, patch_logits = (y.float().cpu().numpy() for y in outputs)
            return logits, patch_logits

        self.run: Callable[[np.ndarray], Tuple[np.ndarray, np.ndarray]] = run

    def _use_onnx(self, path: Path, method: Optional[str]) -> None:
        try:
            import onnxruntime
        except ImportError as e:
            raise InputError('ONNX files need ONNX Runtime; pip install onnxruntime.') from e
        if not path.is_file():
            raise InputError(f'There is no file {path}.')
        try:
            session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        except Exception as e:  # onnxruntime's errors share no public base class
            raise InputError(f'{path} is not an ONNX file that ONNX Runtime can load ({e}).') from e
        outputs = {output.name: output for output in session.get_outputs()}
        if 'patch_logits' not in outputs:
            raise InputError(f'{path} has no patch logits; export it again with --patch-logits and without --softmax.')
        if session.get_inputs()[0].type != 'tensor(float)':
            raise InputError(f'{path} takes pixels; use export/runtime.py, or export it without --preprocessing.')
        metadata = session.get_modelmeta().custom_metadata_map
        try:
            self.data_config = json.loads(metadata['preprocessing'])
            class_names = json.loads(metadata['class_names'])
            self.method = json.loads(metadata['outputs'])[1].get('method', 'match')
        except (KeyError, IndexError, ValueError) as e:
            raise InputError(f'{path} lacks the metadata that python -m export onnx writes ({e}).') from e
        if method not in (None, self.method):
            raise InputError(
                f'{path} was exported with --method {self.method}; export it again with --method '
                f'{method}.')
        self._set_names(class_names, outputs['logits'].shape[1], outputs['patch_logits'].shape[1])
        input_name = session.get_inputs()[0].name
        self.run = lambda x: tuple(session.run(['logits', 'patch_logits'], {input_name: x}))

    def _set_names(self, names: Sequence[str], num_classes: int, num_templates: int) -> None:
        self.class_names = list(names) if len(names) == num_classes else [f'class {i}' for i in range(num_classes)]
        self.template_names = self.class_names
        if num_templates != num_classes:  # templates kept from another set of classes
            self.template_names = [f'template {i}' for i in range(num_templates)]

    def __call__(self, image: ImageSource) -> Explanation:
        """
        Args:
            image: File or its bytes, PIL image or uint8 array, of any size.

        Raises:
            InputError: If the image cannot be read.
        """
        channels, height, width = self.data_config['input_size']
        picture = read_image(image)
        x = self.transform(picture.convert('L') if channels == 1 else picture)[None].numpy()
        logits, patch_logits = self.run(x)
        return Explanation(
            image=_visible(
                picture, width, height, self.data_config['crop_pct'], self.data_config.get('crop_mode')),
            probabilities=torch.from_numpy(logits[0]).softmax(0).numpy(),
            patch_probabilities=torch.from_numpy(patch_logits[0]).softmax(0).numpy(),
            class_names=self.class_names,
            template_names=self.template_names,
            method=self.method,
            activations=patch_logits[0] if self.method == 'cam' else None,
        )


def explain(source: Union[nn.Module, str, Path], image: ImageSource, method: Optional[str] = None) -> Explanation:
    """Classify an image and tell which class each of its regions matched.

    Args:
        source: What `Explainer` takes: a model of this package or your own, an ONNX file exported with patch logits, a
            weight file of training, or the name of a pretrained model.
        image: File or its bytes, PIL image or uint8 array, of any size.
        method: 'match' for the patch logits of a template matching block, 'cam' for class activation maps. If None,
            the one a file was exported with, or 'match' for a model.

    Raises:
        InputError: If either cannot be used.
    """
    return Explainer(source, method)(image)


def has_class_activation(model: nn.Module) -> bool:
    """Whether the logits are the mean of class scores of each position of the last feature map."""
    pool = getattr(model, 'global_pool', None)
    return (
        isinstance(model, TemplateMatchingNet) and getattr(pool, 'pool_type', '') in ('avg', 'fast', 'fastavg')
        and isinstance(model.fc, nn.Linear))


def forward_class_activation(model: Any, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Forward pass with the class activation maps of all classes.

    Args:
        model: Network that `has_class_activation`.
        x: Images (B, C, H, W).

    Returns:
        Logits (B, num_classes), and the class scores (B, num_classes, H/r, W/r) of each position of the last feature
        map, of which they are the mean in evaluation.
    """
    features = model.forward_features(x)
    maps = F.conv2d(features, model.fc.weight[:, :, None, None], model.fc.bias)
    return model.forward_head(features), maps


def _visible(image: Image.Image, width: int, height: int, crop_pct: float, crop_mode: Optional[str]) -> Image.Image:
    """The part of an image that is left where timm resizes it and crops the centre to `width` and `height`."""
    w, h = image.size
    scales = w / width, h / height
    if crop_mode != 'squash':  # which does not keep the ratio of the sides
        scales = (min(scales),) * 2
    crop_w, crop_h = (min(round(n * s * crop_pct), m) for n, s, m in zip((width, height), scales, (w, h)))
    left, top = (w - crop_w) // 2, (h - crop_h) // 2
    return image.crop((left, top, left + crop_w, top + crop_h))


def class_color(index: int) -> Tuple[int, int, int]:
    """Colour of a class, RGB in [0, 255]."""
    if index < len(_COLORS):
        c = _COLORS[index]
        return int(c[1:3], 16), int(c[3:5], 16), int(c[5:7], 16)
    r, g, b = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.55 + 0.4 * (index % 2), 0.9 - 0.3 * (index % 3 == 0))
    return round(255 * r), round(255 * g), round(255 * b)


def _heat_color(values: np.ndarray) -> np.ndarray:
    """Colour of values in [0, 1]: (...) -> (..., 3) uint8."""
    at = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(values, at, _HEAT[:, i]) for i in range(3)], axis=-1).astype(np.uint8)


def _shorten(text: str, font: Any, width: float) -> str:
    """The text, or as much of its beginning as fits, with dots."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f'{text}...') > width:
        text = text[:-1]
    return f'{text}...'


def _draw(explanation: Explanation, class_name: Optional[str], size: int) -> Image.Image:
    index = explanation.template_index(class_name)
    gap, line = 16, 20
    font = ImageFont.load_default(14)
    classes = explanation.patch_classes
    present, counts = np.unique(classes, return_counts=True)
    order = counts.argsort()[::-1]

    height = max(1, round(size * explanation.image.height / explanation.image.width))
    base = explanation.image.resize((size, height), Image.Resampling.BICUBIC)
    colors = np.array([class_color(i) for i in range(len(explanation.template_names))], dtype=np.uint8)
    regions = Image.fromarray(colors[classes]).resize((size, height), Image.Resampling.NEAREST)
    heat = Image.fromarray(explanation._heat_map(index)).resize(
        (size, height), Image.Resampling.BILINEAR)
    heat_image = Image.fromarray(_heat_color(np.asarray(heat)))
    grey = base.convert('L').convert('RGB')
    panels = (base, Image.blend(grey, regions, 0.55), Image.blend(grey, heat_image, 0.6))
    top3 = [f'{name} {100 * p:.1f} %' for name, p in explanation.top(3)]
    name = explanation.template_names[index]
    if explanation.method == 'match':
        titles = (f'Image: {top3[0]}', 'Class each region matched', f'Match with "{name}"')
        unit = 'probability'
    else:
        titles = (f'Image: {top3[0]}', 'Class of each region', f'Class activation of "{name}"')
        unit = 'of the highest score'

    rows = max(len(top3), (len(present) + 1) // 2, 2)
    canvas = Image.new('RGB', (3 * size + 4 * gap, height + 3 * gap + line * (rows + 1)), 'white')
    draw = ImageDraw.Draw(canvas)
    below = gap + line + height + gap // 2
    lefts = [gap + i * (size + gap) for i in range(3)]
    for left, panel, title in zip(lefts, panels, titles):
        draw.text((left, gap // 2), _shorten(title, font, size), fill='black', font=font)
        canvas.paste(panel, (left, gap + line))
    for row, text in enumerate(top3):
        draw.text((lefts[0], below + row * line), _shorten(text, font, size), fill='black', font=font)
    for entry, i in enumerate(order):  # legend, two columns, most frequent class first
        x = lefts[1] + entry % 2 * size // 2
        y = below + entry // 2 * line
        draw.rectangle((x, y + 3, x + 11, y + 14), fill=class_color(int(present[i])))
        share = f' {100 * counts[i] / classes.size:.0f} %'
        name = _shorten(explanation.template_names[present[i]], font, size // 2 - 24 - font.getlength(share))
        draw.text((x + 17, y), name + share, fill='black', font=font)
    scale = Image.fromarray(np.broadcast_to(_heat_color(np.linspace(0, 1, size)), (12, size, 3)).copy())
    canvas.paste(scale, (lefts[2], below + 3))
    for text, anchor, x in (('0', 'la', lefts[2]), (unit, 'ma', lefts[2] + size // 2),
                            ('1', 'ra', lefts[2] + size)):
        draw.text((x, below + line), text, fill='black', font=font, anchor=anchor)
    return canvas
