"""Accuracy and loss of a model on labelled samples, and what it answered for each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from pbc.data import Samples
from pbc.runtime.engines import Executable

_Z_95 = 1.959964


@dataclass(frozen=True)
class Evaluation:
    """A share of right answers in 0…1, mean cross-entropy, number of samples.

    answers: int64[count], the label that is the likeliest for each sample. probabilities:
    f64[count], of that label. sample_ms: least milliseconds a sample that a mini-batch took,
    without decoding.
    """

    accuracy: float
    loss: float
    count: int
    answers: np.ndarray = field(repr=False, compare=False)
    probabilities: np.ndarray = field(repr=False, compare=False)
    sample_ms: float = field(default=0.0, compare=False)

    @property
    def interval(self) -> tuple[float, float]:
        """Return the bounds of the accuracy at 95 % confidence."""
        return wilson(round(self.accuracy * self.count), self.count)

    def to_json(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "loss": self.loss,
            "count": self.count,
        }


def evaluate(executable: Executable, samples: Samples, level: int, batch: int) -> Evaluation:
    """Run every sample at one level, `batch` at a time."""
    loss, sample_ms = 0.0, math.inf
    answers = np.empty(len(samples), np.int64)
    probabilities = np.empty(len(samples))
    for start in range(0, len(samples), batch):
        indices = np.arange(start, min(start + batch, len(samples)))
        labels = samples.labels[indices]
        images = samples.images(indices)
        begin = perf_counter()
        logits = executable.logits(level, executable.prefix(level, images))
        sample_ms = min(sample_ms, (perf_counter() - begin) * 1e3 / len(indices))
        shares = log_softmax(logits)
        answers[indices] = shares.argmax(axis=1)
        probabilities[indices] = np.exp(shares.max(axis=1))
        loss -= float(shares[np.arange(len(indices)), labels].sum())
    accuracy = float((answers == samples.labels).mean())
    return Evaluation(
        accuracy, loss / len(samples), len(samples), answers, probabilities, sample_ms
    )


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return bounds of a share at 95 % confidence (Wilson's score interval, 1927)."""
    share, z = right / count, _Z_95 * _Z_95 / count
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(share * (1 - share) * z + z * z / 4) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)


class KeptFeatures:
    """Held-out samples that are evaluated again and again: a level's features of them are kept.

    Up to `most_bytes`; beyond that they are computed each time.
    """

    def __init__(self, samples: Samples, level: int, most_bytes: int = 1 << 28) -> None:
        self._samples = samples
        self._level = level
        self._left = most_bytes
        self._kept: dict[int, dict[str, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def accuracy(self, executable: Executable, batch: int) -> float:
        """Return the share of right answers, 0…1, at the executable's parameters."""
        right = 0
        for start in range(0, len(self._samples), batch):
            indices = np.arange(start, min(start + batch, len(self._samples)))
            logits = executable.logits(self._level, self._features(executable, start, indices))
            right += int((logits.argmax(axis=1) == self._samples.labels[indices]).sum())
        return right / len(self._samples)

    def _features(
        self, executable: Executable, start: int, indices: np.ndarray
    ) -> dict[str, np.ndarray]:
        if start in self._kept:
            return self._kept[start]
        features = executable.prefix(self._level, self._samples.images(indices))
        size = sum(value.nbytes for value in features.values())
        if size <= self._left:
            self._left -= size
            self._kept[start] = features
        return features


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of the probabilities of f32[B, classes], in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
