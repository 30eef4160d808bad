"""Patches laid out in a plane so that neighbours are alike (Figure 6)."""
import math
from typing import Any, List, Tuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist


def snap_to_grid(points: np.ndarray) -> Tuple[np.ndarray, int]:
    """Give each point a cell of the smallest square grid that has enough, with the least squared way in all.

    Args:
        points: (N, 2).

    Returns:
        Row and column of each point (N, 2), and the side of the grid.
    """
    side = math.ceil(math.sqrt(len(points)))
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - low) / np.maximum(high - low, 1e-12) * (side - 1)
    cells = np.stack(np.divmod(np.arange(side * side), side), axis=1)
    rows, chosen = linear_sum_assignment(cdist(scaled[:, ::-1], cells, 'sqeuclidean'))
    places = np.empty((len(points), 2), dtype=int)
    places[rows] = cells[chosen]
    return places, side


def paint_mosaic(
        points: np.ndarray,
        patches: np.ndarray,
        colors: np.ndarray,
        border: int = 2,
) -> np.ndarray:
    """One picture of all patches, each framed in a colour, where their points say.

    Args:
        points: (N, 2).
        patches: (N, S, S, 3) uint8.
        colors: Of each patch's frame, (N, 3) uint8.
        border: Width of the frame, in pixels of the patch.

    Returns:
        (H, W, 3) uint8; cells without a patch are white.
    """
    places, side = snap_to_grid(points)
    size = patches.shape[1] + 2 * border
    canvas = np.full((side, side, size, size, 3), 255, dtype=np.uint8)
    cells = np.broadcast_to(colors[:, None, None], (len(patches), size, size, 3)).copy()
    cells[:, border:-border, border:-border] = patches
    canvas[places[:, 0], places[:, 1]] = cells
    return canvas.transpose(0, 2, 1, 3, 4).reshape(side * size, side * size, 3)


def draw_mosaics(
        mosaics: List[np.ndarray],
        titles: List[str],
        captions: List[str],
        names: List[str],
        colors: np.ndarray,
) -> Any:
    """Mosaics side by side, with what the colours (K, 3) of frames are of below, as a Matplotlib figure."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(8 * len(mosaics), 8.9), layout='constrained')
    panels: List[Any] = list(figure.subplots(1, len(mosaics), squeeze=False)[0])
    for axes, mosaic, title, caption in zip(panels, mosaics, titles, captions):
        axes.imshow(mosaic, interpolation='nearest')
        axes.set(title=title, xticks=[], yticks=[])
        axes.set_xlabel(caption, fontsize=10)
    if len(names) <= 20:
        handles = [Patch(color=color / 255, label=name) for name, color in zip(names, colors)]
        figure.legend(handles=handles, loc='outside lower center', ncols=10, frameon=False)
    return figure
