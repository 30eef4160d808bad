"""Visual words: what combinations of classes the patches match (Figure 7)."""
from dataclasses import dataclass
from typing import Any, Dict, List

import numpy as np
from sklearn.cluster import KMeans


@dataclass
class VisualWords:
    """Centres of the patches' class scores, and the patches nearest to each."""
    centers: np.ndarray  # (K, num_classes)
    counts: np.ndarray  # (K,) patches that are nearest to this centre
    nearest: List[np.ndarray]  # indices of the nearest patches, each of another image, the nearest first

    @property
    def order(self) -> np.ndarray:
        """Words by their best class, within it the purest first."""
        return np.lexsort((-self.centers.max(axis=1), self.centers.argmax(axis=1)))


def find_words(scores: np.ndarray, image_index: np.ndarray, num_words: int, num_patches: int, seed: int) -> VisualWords:
    """k-means over the class scores of patches.

    Args:
        scores: Class probabilities (N, num_classes).
        image_index: Image of each patch (N,).
        num_words: Centres, 100 in the paper.
        num_patches: Nearest patches to keep of each, at most one of an image; 16 in the paper.
        seed: Of the first centres.
    """
    means = KMeans(num_words, n_init=1, random_state=seed).fit(scores)
    distances = means.transform(scores)  # (N, K)
    nearest = []
    for k in range(num_words):
        order = np.argsort(distances[:, k], kind='stable')
        order = order[means.labels_[order] == k]
        first = np.sort(np.unique(image_index[order], return_index=True)[1])
        nearest.append(order[first[:num_patches]])
    return VisualWords(means.cluster_centers_, np.bincount(means.labels_, minlength=num_words), nearest)


def measure_words(words: VisualWords, targets: np.ndarray) -> Dict[str, float]:
    """How pure the words are.

    Args:
        words: Words.
        targets: Class of each patch's image (N,).

    Returns:
        'mixed_words': share of the words whose best class has less than half of the score; 'mixed_patches': share of
        the patches that are of those; 'purity': share of the nearest patches whose image is of the word's best class,
        over the words that are not mixed; 'mixed_purity': over the others (NaN where there are none).
    """
    best, mixed = words.centers.argmax(axis=1), words.centers.max(axis=1) < 0.5
    used = words.counts > 0  # where many patches score alike, words can be left without any
    purity = np.array([(targets[n] == k).mean() if len(n) else 0. for n, k in zip(words.nearest, best)])

    def mean(part: np.ndarray) -> float:
        part = part & used
        return float(purity[part].mean()) if part.any() else float('nan')

    return dict(
        mixed_words=float(mixed.mean()),
        mixed_patches=float(words.counts[mixed].sum() / words.counts.sum()),
        purity=mean(~mixed),
        mixed_purity=mean(mixed),
    )


def draw_words(
        words: VisualWords,
        shown: np.ndarray,
        patches: np.ndarray,
        class_names: List[str],
        colors: np.ndarray,
        caption: str,
        columns: int,
) -> Any:
    """Words as squares of patches under bars of their class scores, as a Matplotlib figure.

    Args:
        words: Words.
        shown: Indices of the words to draw, in this order.
        patches: (N, S, S, 3) uint8.
        class_names: Of the scores.
        colors: Of the classes (num_classes, 3) uint8.
        caption: Beneath.
        columns: Words in a row.
    """
    from matplotlib.figure import Figure

    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.55 * columns, 2.15 * rows + 0.4), layout='constrained')
    grid = figure.add_gridspec(rows, columns)
    side = int(np.ceil(np.sqrt(max(len(nearest) for nearest in words.nearest))))
    for place, k in enumerate(shown):
        cell = grid[place].subgridspec(2, 1, height_ratios=(1, 3), hspace=0)
        bars, square = figure.add_subplot(cell[0]), figure.add_subplot(cell[1])
        bars.bar(range(len(class_names)), words.centers[k], color=colors / 255, width=0.9)
        first, second = np.argsort(-words.centers[k])[:2]
        top = [first, second] if words.centers[k][second] >= 0.1 else [first]
        bars.set_title(', '.join(f'{class_names[i]} {words.centers[k][i]:.1g}' for i in top), fontsize=6, pad=2)
        bars.set(ylim=(0, 1), xticks=[], yticks=[])
        size = patches.shape[1]
        canvas = np.full((side, side, size + 1, size + 1, 3), 255, dtype=np.uint8)
        for i, n in enumerate(words.nearest[k]):
            canvas[i // side, i % side, :size, :size] = patches[n]
        square.imshow(canvas.transpose(0, 2, 1, 3, 4).reshape(side * (size + 1), side * (size + 1), 3))
        square.axis('off')
    figure.supxlabel(caption, fontsize=9)
    return figure
