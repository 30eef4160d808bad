"""How classes lie in an embedding: measured in the space itself, and drawn by t-SNE (Figure 5)."""
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import NearestNeighbors

from timm_tmblock.errors import InputError
from train.analysis.regions import Sample
from train.analysis.superclasses import find_superclasses


def find_neighbour_shares(x: np.ndarray, labels: np.ndarray, groups: np.ndarray, k: int = 10) -> np.ndarray:
    """Share of each point's k nearest neighbours that have its label, neighbours of its own group left out.

    Regions of one image lie close together whatever a layer does, so that groups are images here.

    Args:
        x: Points (N, D).
        labels: (N,).
        groups: (N,).
        k: Neighbours of a point.

    Returns:
        (N,)
    """
    largest = np.unique(groups, return_counts=True)[1].max()
    found = NearestNeighbors(n_neighbors=min(k + largest, len(x))).fit(x).kneighbors(x, return_distance=False)
    other = groups[found] != groups[:, None]
    nearest = other & (other.cumsum(axis=1) <= k)
    return ((labels[found] == labels[:, None]) & nearest).sum(axis=1) / nearest.sum(axis=1)


def average(values: np.ndarray, groups: np.ndarray) -> Tuple[float, float]:
    """Mean over points and its standard error, for groups of as many points each that are drawn one by one.

    Args:
        values: (N,).
        groups: (N,), 0 to G - 1.
    """
    means = np.bincount(groups, values) / np.bincount(groups)
    return float(means.mean()), float(means.std(ddof=1) / len(means) ** 0.5)


def label_regions(sample: Sample) -> Dict[str, Optional[np.ndarray]]:
    """Class and superclass of each region's image, None where the set has no superclasses."""
    _, groups = find_superclasses(sample.class_names)
    return {'class': sample.region_targets, 'superclass': None if groups is None else groups[sample.region_targets]}


def measure_geometry(x: np.ndarray, sample: Sample, k: int = 10) -> Dict[str, Optional[float]]:
    """How well the regions of a class lie together: silhouette in [-1, 1] and neighbour rate in [0, 1].

    Each with its standard error over images. For the superclasses too, None where the set has none.

    Raises:
        InputError: If there is one region of each class, with no other to be near to.
    """
    if len(x) <= len(sample.class_names):
        raise InputError('There is one region of each class, too few to measure how they lie; take more.')
    values: Dict[str, Optional[float]] = {}
    for name, y in label_regions(sample).items():
        for key in ('silhouette', 'neighbour_rate'):
            values[f'{name}_{key}'] = values[f'{name}_{key}_error'] = None
        if y is not None:
            images = sample.image_index
            for key, points in (
                    ('silhouette', silhouette_samples(x, y)),
                    ('neighbour_rate', find_neighbour_shares(x, y, images, k))):
                values[f'{name}_{key}'], values[f'{name}_{key}_error'] = average(points, images)
    return values


def find_chance(sample: Sample) -> Dict[str, Optional[float]]:
    """Neighbour rates of points that lie anywhere."""
    found: Dict[str, Optional[float]] = {}
    for name, y in label_regions(sample).items():
        found[name] = None
        if y is not None:
            counts = np.bincount(y[::sample.places.shape[1]])  # images of each label
            found[name] = float((counts * (counts - 1)).sum() / (counts.sum() * (counts.sum() - 1)))
    return found


def project(x: np.ndarray, seed: int, perplexity: float = 30.) -> np.ndarray:
    """t-SNE in two dimensions: (N, D) -> (N, 2), begun at the first two principal components."""
    return TSNE(init='pca', perplexity=min(perplexity, (len(x) - 1) / 3), random_state=seed).fit_transform(x)


def describe(values: Dict[str, Optional[float]]) -> str:
    """Those measures in two lines, for under a picture."""
    lines = []
    for name in ('class', 'superclass'):
        if values[f'{name}_silhouette'] is not None:
            lines.append(
                f'{name}: silhouette {values[f"{name}_silhouette"]:.3f}, '
                f'neighbours alike {100 * (values[f"{name}_neighbour_rate"] or 0):.1f} %')
    return '\n'.join(lines)


def draw_geometry(
        maps: Dict[str, np.ndarray],
        measures: Dict[str, Dict[str, Optional[float]]],
        sample: Sample,
        title: str,
) -> Any:
    """Projections (N, 2) side by side, each with its measures beneath, as a Matplotlib figure."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(maps), 5.4), layout='constrained')
    panels: List[Any] = list(figure.subplots(1, len(maps), squeeze=False)[0])
    by, names, color_of = choose_colors(sample)
    labels = color_of[sample.region_targets]
    colors = colormaps['tab10' if len(names) <= 10 else 'tab20'](np.arange(len(names)) % 20)
    for axes, (name, points) in zip(panels, maps.items()):
        for k in range(len(names)):
            part = points[labels == k]
            axes.scatter(*part.T, s=3, color=colors[k], label=names[k], linewidths=0, rasterized=True)
        axes.set(title=name, xticks=[], yticks=[])
        axes.set_xlabel(describe(measures[name]), fontsize=9)
    figure.suptitle(f'Regions by t-SNE, coloured by the {by} of their image. {title}', fontsize=11)
    if len(names) <= 20:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc='outside lower center', ncols=10 if len(names) <= 10 else 5, markerscale=4,
            frameon=False, fontsize=9)
    return figure


def choose_colors(sample: Sample) -> Tuple[str, List[str], np.ndarray]:
    """What to colour regions by, where one can tell 20 colours apart: 'class' or 'superclass', the names, and which of
    them each class is.
    """
    names = sample.class_names
    superclasses, groups = find_superclasses(names)
    if len(names) <= 20 or groups is None:
        return 'class', names, np.arange(len(names))
    return 'superclass', superclasses, groups
