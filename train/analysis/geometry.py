"""How classes lie in an embedding: measured in the space itself, and drawn by t-SNE (Figure 5)."""
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
from scipy.stats import sem
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import NearestNeighbors

from timm_tmblock.errors import InputError
from timm_tmblock.explanation import class_color
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
    return float(means.mean()), float(sem(means))


def label_regions(sample: Sample) -> Dict[str, Tuple[np.ndarray, np.ndarray]]:
    """Class and, where the set has some, superclass of each region's image, with the groups whose members are no
    neighbours: images; for superclasses classes, or regions that find their class would seem to find its superclass.
    """
    _, superclass_of = find_superclasses(sample.class_names)
    labels = {'class': (sample.region_targets, sample.image_index)}
    if superclass_of is not None:
        labels['superclass'] = (superclass_of[sample.region_targets], sample.region_targets)
    return labels


MEASURES = tuple(f'{label}_{key}' for label in ('class', 'superclass') for key in ('silhouette', 'neighbour_rate'))
Means = Dict[str, Optional[float]]


def measure_points(x: np.ndarray, sample: Sample, k: int = 10) -> Dict[str, np.ndarray]:
    """How well each region lies with its class and superclass: silhouette in [-1, 1] and neighbour rate in [0, 1].

    Neighbours of a class are those of other images; of a superclass those of other classes.

    Returns:
        (N,) by measure, those of the superclasses only where the set has some.

    Raises:
        InputError: If there is one region of each class, with no other to be near to.
    """
    if len(x) <= len(sample.class_names):
        raise InputError('There is one region of each class, too few to measure how they lie; take more.')
    found: Dict[str, np.ndarray] = {}
    for label, (y, groups) in label_regions(sample).items():
        found[f'{label}_silhouette'] = silhouette_samples(x, y)
        found[f'{label}_neighbour_rate'] = find_neighbour_shares(x, y, groups, k)
    return found


def summarize(points: Dict[str, np.ndarray], sample: Sample) -> Means:
    """Each measure with its standard error over images, None for those there are not."""
    values: Means = {}
    for key in MEASURES:
        values[key], values[f'{key}_error'] = (
            average(points[key], sample.image_index) if key in points else (None, None))
    return values


def compare(points: Dict[str, Dict[str, np.ndarray]], sample: Sample) -> Dict[str, Dict[str, Means]]:
    """By how much each space has more of each measure than those before it, paired by image.

    Args:
        points: What `measure_points` gives, by space.
        sample: The regions.
    """
    names = list(points)
    return {
        ours: {
            other: summarize({key: points[ours][key] - points[other][key] for key in points[ours]}, sample)
            for other in names[:i]}
        for i, ours in enumerate(names) if i}


def find_chance(sample: Sample) -> Dict[str, Optional[float]]:
    """Neighbour rates of points that lie anywhere."""
    found: Dict[str, Optional[float]] = {'class': None, 'superclass': None}
    for label, (y, groups) in label_regions(sample).items():
        own = np.bincount(groups)[groups]
        found[label] = float(((np.bincount(y)[y] - own) / (len(y) - own)).mean())
    return found


def measure_spaces(spaces: Dict[str, np.ndarray], sample: Sample) -> Dict[str, Any]:
    """Measures of embeddings by name, how far apart they are, and what chance would give."""
    points = {name: measure_points(x, sample) for name, x in spaces.items()}
    return dict(
        spaces={name: summarize(measured, sample) for name, measured in points.items()},
        leads=compare(points, sample), chance=find_chance(sample))


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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(maps), 5.4), layout='constrained')
    panels: List[Any] = list(figure.subplots(1, len(maps), squeeze=False)[0])
    by, names, color_of = choose_colors(sample)
    labels = color_of[sample.region_targets]
    colors = np.array([class_color(k) for k in range(len(names))]) / 255
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
