"""Accuracy and loss of a model on labelled samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pbc.data import Samples
from pbc.runtime.engines import Executable


@dataclass(frozen=True)
class Evaluation:
    """A share of right answers in 0…1, mean cross-entropy, number of samples."""

    accuracy: float
    loss: float
    count: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(executable: Executable, samples: Samples, level: int, batch: int) -> Evaluation:
    """Run every sample at one level, `batch` at a time."""
    right, loss = 0, 0.0
    for start in range(0, len(samples), batch):
        indices = np.arange(start, min(start + batch, len(samples)))
        labels = samples.labels[indices]
        features = executable.prefix(level, samples.images(indices))
        shares = log_softmax(executable.logits(level, features))
        right += int((shares.argmax(axis=1) == labels).sum())
        loss -= float(shares[np.arange(len(indices)), labels].sum())
    return Evaluation(right / len(samples), loss / len(samples), len(samples))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of the probabilities of f32[B, classes], in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
