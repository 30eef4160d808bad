"""What is said of a classifier's outputs on a whole set."""
from dataclasses import dataclass
from typing import Dict

import numpy as np


@dataclass
class Reliability:
    """Confidence against accuracy in bins of equal width (Guo et al., https://arxiv.org/abs/1706.04599)."""
    counts: np.ndarray  # (bins,) images
    confidence: np.ndarray  # (bins,) mean probability of the predicted class, 0 where a bin is empty
    accuracy: np.ndarray  # (bins,) share of right predictions

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1]: mean of |accuracy - confidence| over images."""
        return float((self.counts * np.abs(self.accuracy - self.confidence)).sum() / self.counts.sum())


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float64 of logits (N, K, ...), over axis 1."""
    e = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def measure_reliability(probabilities: np.ndarray, targets: np.ndarray, bins: int = 15) -> Reliability:
    """
    Args:
        probabilities: (N, num_classes).
        targets: Class indices (N,).
        bins: Number of bins; a confidence on an edge counts to the bin below it.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == targets
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    sums = (np.bincount(index, weights=values, minlength=bins) for values in (confidence, correct))
    mean_confidence, accuracy = (total / np.maximum(counts, 1) for total in sums)
    return Reliability(counts, mean_confidence, accuracy)


def count_confusions(predictions: np.ndarray, targets: np.ndarray, num_classes: int) -> np.ndarray:
    """Images (num_classes, num_classes) of each class (row) by what they were taken for (column)."""
    pairs = np.bincount(targets * num_classes + predictions, minlength=num_classes ** 2)
    return pairs.reshape(num_classes, num_classes)


def measure_accuracy(logits: np.ndarray, targets: np.ndarray) -> Dict[str, float]:
    """Top-1 and top-5 accuracy (%) and mean cross-entropy (nats) of logits (N, num_classes)."""
    order = np.argsort(-logits, axis=1, kind='stable')[:, :5]
    hits = order == targets[:, None]
    loss = -np.log(softmax(logits)[np.arange(len(targets)), targets].clip(1e-300)).mean()
    return dict(top1=100 * hits[:, 0].mean().item(), top5=100 * hits.any(axis=1).mean().item(), loss=loss.item())
