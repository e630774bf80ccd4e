"""A small head on audited samples: what a level costs in points of accuracy, on the user's photos.

A cosine says how far features moved, and not whether that matters for these classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

# Ridge regression of one-hot classes, as the bundle's map was fitted.
_RIDGE = 0.3
_FOLDS = 8
# Fewer samples of classes with another sample tell nothing.
_LEAST = 16


def vectors(features: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return f64[b, d] of features: maps [b, C, H, W] and tokens [b, T, C] at their means."""
    rows = [
        value.mean(axis=(2, 3)) if value.ndim == 4 else value.mean(axis=1)
        if value.ndim == 3 else value.reshape(len(value), -1)
        for value in features.values()
    ]  # fmt: skip
    return np.concatenate(rows, axis=1).astype(np.float64)


def points_lost(
    proxy: np.ndarray, original: np.ndarray, labels: np.ndarray
) -> tuple[float, float] | None:
    """Return how many points fewer a head that learns from `proxy` is right, and the error of that.

    proxy, original: f64[b, d], what a level and level 0 send of the same samples; both heads are
    cross-validated, and tested on level 0's. None of too few samples.
    """
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    judged = counts[inverse] > 1
    if judged.sum() < _LEAST or len(counts) < 2:
        return None
    scale = np.maximum(original.std(axis=0), 1e-2 * math.sqrt(original.var(axis=0).mean()) + 1e-8)
    mean = original.mean(axis=0)
    low, high = (proxy - mean) / scale, (original - mean) / scale
    targets = np.eye(len(counts))[inverse] - counts / len(labels)
    right = np.zeros((2, len(labels)))
    for fold in range(_FOLDS):
        tested = np.arange(len(labels)) % _FOLDS == fold
        for row, rows in enumerate((low, high)):
            known = rows[~tested]
            gram = known @ known.T + _RIDGE * len(known) * np.eye(len(known))
            scores = high[tested] @ known.T @ np.linalg.solve(gram, targets[~tested])
            right[row, tested] = scores.argmax(axis=1) == inverse[tested]
    lost = 100 * (right[1] - right[0])[judged]
    return float(lost.mean()), float(lost.std(ddof=1) / math.sqrt(len(lost)))
