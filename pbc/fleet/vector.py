"""θ as one vector: what is clipped, compressed and attacked is all of it at once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Theta = Mapping[str, np.ndarray]


def flatten(theta: Theta, like: Theta) -> np.ndarray:
    """Join parameters in the order of `like` into f32[d]; those that are missing are zero."""
    parts = [
        np.asarray(theta[name], np.float32).ravel()
        if name in theta
        else np.zeros(value.size, np.float32)
        for name, value in like.items()
    ]
    return np.concatenate(parts)


def unflatten(vector: np.ndarray, like: Theta) -> dict[str, np.ndarray]:
    """Cut a vector into parameters of the names and shapes of `like`, in f32."""
    ends = np.cumsum([value.size for value in like.values()])
    assert len(vector) == ends[-1], "as many values as parameters have"
    parts = np.split(vector.astype(np.float32, copy=False), ends[:-1])
    return {
        name: part.reshape(value.shape)
        for part, (name, value) in zip(parts, like.items(), strict=True)
    }
