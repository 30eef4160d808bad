"""Whether the class map shows the evidence: parts of images are masked by it, and by other maps of the same network.

Deletion and insertion curves are those of RISE (Petsiuk et al., https://arxiv.org/abs/1806.07421): the most evident
cells are replaced by the mean colour (or a blurred image, as networks trained with random erasing know the mean
colour for what is not there) one after the other, or uncovered in a blurred image, and the probability of the
class is followed. Grad-CAM and occlusion are captum's. Of networks that end in average pooling and a linear layer, as
these do, Grad-CAM is CAM (Zhou et al., https://arxiv.org/abs/1512.04150), which needs no backward pass. Occlusion hides
windows as large as the patches that the class map scores, by what masks later, and is of log-odds, as the class map is.
"""
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam, Occlusion
from scipy.stats import sem
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from timm_tmblock.explanation import forward_class_activation, has_class_activation
from train.analysis import FILLS

# (images, classes) -> evidence (B, h, w) of each cell for the class
Explainer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def create_explainers(model: Any, grid: Tuple[int, int], seed: int, fill: str = 'mean') -> Dict[str, Explainer]:
    """The maps to compare, each on the cells of the network's own class map.

    Args:
        model: Network with template matching, in evaluation mode.
        grid: Height and width of its class map.
        seed: Of the random map.
        fill: What occlusion puts in place of what it hides, of FILLS.
    """
    generator = torch.Generator().manual_seed(seed)
    grad_cam = LayerGradCam(model, model.norm)
    occlusion = Occlusion(lambda images, classes: log_odds(model(images)[:, :, None, None], classes)[:, 0, 0])

    def class_map(images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            scores = model.forward_patch_logits(images)[1]
        return log_odds(scores.clone(), classes)

    def by_gradient(images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        # without its ReLU, which leaves cells of no order
        return F.adaptive_avg_pool2d(grad_cam.attribute(images, classes).detach(), grid)[:, 0]

    def by_class_activation(images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            scores = forward_class_activation(model, images)[1]
        return F.adaptive_avg_pool2d(log_odds(scores.clone(), classes)[:, None], grid)[:, 0]

    def by_occlusion(images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        channels, cell = images.shape[1], [model.patch_reduction] * 2
        window = [model.patch_size * side for side in cell]
        with torch.inference_mode():
            effect = occlusion.attribute(
                images, (channels, *window), (channels, *cell), baselines=fill_images(images, fill),
                additional_forward_args=classes)
        return F.adaptive_avg_pool2d(effect.clone().mean(1, keepdim=True), grid)[:, 0]

    def of_another_image(images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return class_map(images, classes).roll(1, 0)  # as smooth and as central, but of another picture

    def at_random(images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return torch.rand(len(images), *grid, generator=generator).to(images.device)

    by_position = {'CAM probabilities': by_class_activation} if has_class_activation(model) else {}
    return {
        'class map': class_map, 'Grad-CAM': by_gradient, **by_position, 'occlusion': by_occlusion,
        "another image's class map": of_another_image, 'random': at_random}


def log_odds(scores: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Log-odds of the probabilities of `classes`, in their order: (B, K, h, w), (B,) -> (B, h, w).

    The probabilities of many cells are 1 in float32, and would be ranked by where the cells lie.
    """
    own = classes[:, None, None, None].expand(-1, 1, *scores.shape[2:])
    return scores.gather(1, own)[:, 0] - scores.scatter(1, own, -torch.inf).logsumexp(1)


def rank_cells(evidence: torch.Tensor) -> torch.Tensor:
    """Rank of each cell, 0 for the highest: (B, h, w) -> (B, h, w) int64."""
    order = evidence.flatten(1).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1).view_as(evidence)


def fill_images(images: torch.Tensor, fill: str) -> torch.Tensor:
    """What is put in place of masked parts of images (B, C, H, W), normalised so that the mean colour is 0."""
    return torch.zeros_like(images) if fill == 'mean' else gaussian_blur(images, [11, 11], [5., 5.])


def cover(images: torch.Tensor, fill: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Replace cells (B, h, w) of images (B, C, H, W) by what `fill` has there."""
    mask = F.interpolate(cells[:, None].float(), images.shape[2:], mode='nearest')
    return torch.lerp(images, fill, mask)


@dataclass
class Curves:
    """One map over all images."""
    deletion: np.ndarray  # (I, steps + 1) probability of the class
    insertion: np.ndarray  # (I, steps + 1)
    without_most: np.ndarray  # (I,) whether the image is right without its higher-ranked half
    without_least: np.ndarray  # (I,)

    def areas(self) -> Dict[str, np.ndarray]:
        """Area under each curve, of each image."""
        return {name: np.trapezoid(getattr(self, name), dx=1 / (self.deletion.shape[1] - 1), axis=1)
                for name in ('deletion', 'insertion')}


@torch.no_grad()
def follow(
        model: Any,
        images: torch.Tensor,
        targets: torch.Tensor,
        explainers: Dict[str, Explainer],
        steps: int = 16,
        fill: str = 'mean',
        batch_size: int = 100,
        progress: bool = True,
) -> Dict[str, Curves]:
    """Mask images step by step as each map says, and follow the network.

    Args:
        model: Network in evaluation mode.
        images: Normalised (I, C, H, W), so that the mean colour is 0; two or more.
        targets: (I,).
        explainers: Maps by name.
        steps: Between the whole image and none of it.
        fill: What is put in place of masked cells, of FILLS.
        batch_size: Images at once.
        progress: Whether to show a bar.
    """
    parts: Dict[str, List[List[np.ndarray]]] = {name: [] for name in explainers}
    bar = tqdm(total=len(images) * len(explainers), desc='Masking', unit='map', disable=not progress, leave=False)
    batches = -(-len(images) // batch_size)  # of like size, so that none is of one image
    for x, y in zip(images.tensor_split(batches), targets.tensor_split(batches)):
        blurred, masked = (fill_images(x, name) for name in ('blur', fill))
        whole = model(x)
        classes = whole.argmax(1)
        # at both ends all maps have the same
        starts, ends = ([_find_probability(logits, classes) for logits in pair] for pair in (
            (whole, model(blurred)), (model(masked), whole)))
        for name, explainer in explainers.items():
            with torch.enable_grad():
                ranks = rank_cells(explainer(x, classes))
            cells = ranks[0].numel()
            probabilities = [[start] for start in starts]
            for step in range(1, steps):
                first = ranks < round(cells * step / steps)
                for curve, seen in zip(probabilities, (cover(x, masked, first), cover(x, blurred, ~first))):
                    curve.append(_find_probability(model(seen), classes))
            for curve, end in zip(probabilities, ends):
                curve.append(end)
            halves = [
                (model(cover(x, masked, half)).argmax(1) == y).cpu().numpy()
                for half in (ranks < cells // 2, ranks >= cells // 2)]
            parts[name].append([torch.stack(curve, 1).cpu().numpy() for curve in probabilities] + halves)
            bar.update(len(x))
    bar.close()
    return {name: Curves(*(np.concatenate(column) for column in zip(*batches))) for name, batches in parts.items()}


def _find_probability(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    return logits.float().softmax(1).gather(1, classes[:, None])[:, 0]


def summarize(curves: Dict[str, Curves]) -> Dict[str, Dict[str, float]]:
    """Mean and standard error of what each map scores; for all but the class map, also how far it is from that.

    'deletion' is better the lower, 'insertion' the higher; 'without_most' and 'without_least' are accuracies in %.
    """
    values = {
        name: {**c.areas(), 'without_most': 100. * c.without_most, 'without_least': 100. * c.without_least}
        for name, c in curves.items()}
    first = next(iter(values))
    summary: Dict[str, Dict[str, float]] = {}
    for name, columns in values.items():
        row = summary[name] = {}
        for key, column in columns.items():
            row[key], row[f'{key}_error'] = float(column.mean()), float(sem(column))
            if name != first:  # image by image, so that what is hard for all drops out
                lead = values[first][key] - column
                row[f'{key}_lead'], row[f'{key}_lead_error'] = float(lead.mean()), float(sem(lead))
    return summary


def draw_trust(
        curves: Dict[str, Curves],
        summary: Dict[str, Dict[str, float]],
        title: str,
        fill: str = 'mean',
) -> Any:
    """Deletion and insertion curves of all maps, as a Matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout='constrained')
    panels: List[Any] = list(figure.subplots(1, 2, sharey=True))
    for axes, key, what in zip(panels, ('deletion', 'insertion'), (f'replaced by {FILLS[fill]}', 'uncovered')):
        for name, c in curves.items():
            curve = getattr(c, key).mean(axis=0)
            axes.plot(
                np.linspace(0, 100, len(curve)), curve, label=f'{name}: area {summary[name][key]:.3f}',
                linestyle='--' if name in ('random', "another image's class map") else '-')
        axes.set(title=key, xlabel=f'share of the image {what}, the highest-ranked first (%)', ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8)
    panels[0].set_ylabel('probability of the predicted class')
    figure.suptitle(title, fontsize=11)
    return figure
