"""How classes lie in an embedding: measured in the space itself, and drawn by t-SNE (Figure 5)."""
from typing import Any, Dict, List, Optional

import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from train.analysis.regions import Sample
from train.analysis.superclasses import find_superclasses


def neighbour_rate(x: np.ndarray, labels: np.ndarray, groups: np.ndarray, k: int = 10) -> float:
    """Share of each point's k nearest neighbours that have its label, neighbours of its own group left out.

    Regions of one image lie close together whatever a layer does, so that groups are images here.

    Args:
        x: Points (N, D).
        labels: (N,).
        groups: (N,).
        k: Neighbours of a point.
    """
    largest = np.unique(groups, return_counts=True)[1].max()
    found = NearestNeighbors(n_neighbors=min(k + largest, len(x))).fit(x).kneighbors(x, return_distance=False)
    other = groups[found] != groups[:, None]
    nearest = other & (other.cumsum(axis=1) <= k)
    return float((labels[found] == labels[:, None])[nearest].mean())


def measure_geometry(x: np.ndarray, sample: Sample, k: int = 10) -> Dict[str, Optional[float]]:
    """How well the regions of a class lie together: silhouette in [-1, 1] and neighbour rate in [0, 1].

    For the superclasses too, None where the set has none.
    """
    classes = sample.region_targets
    groups = find_superclasses(sample.class_names)
    labels = {'class': classes, 'superclass': None if groups is None else groups[classes]}
    values: Dict[str, Optional[float]] = {}
    for name, y in labels.items():
        values[f'{name}_silhouette'] = None if y is None else float(silhouette_score(x, y))
        values[f'{name}_neighbour_rate'] = None if y is None else neighbour_rate(x, y, sample.image_index, k)
    return values


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
    names, classes = sample.class_names, sample.region_targets
    legend = len(names) <= 20
    groups = find_superclasses(names)
    color_of = np.arange(len(names)) if legend or groups is None else groups
    colors = colormaps['tab10' if color_of.max() < 10 else 'tab20'](color_of % 20)
    for axes, (name, points) in zip(panels, maps.items()):
        for k in range(len(names)):
            part = points[classes == k]
            axes.scatter(*part.T, s=3, color=colors[k], label=names[k], linewidths=0, rasterized=True)
        axes.set(title=name, xticks=[], yticks=[])
        axes.set_xlabel(describe(measures[name]), fontsize=9)
    figure.suptitle(title, fontsize=11)
    if legend:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=10, markerscale=4, frameon=False, fontsize=9)
    return figure
