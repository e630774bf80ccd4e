"""θ as one vector: what is clipped, compressed and attacked is all of it at once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Theta = Mapping[str, np.ndarray]


def flatten(theta: Theta, like: Theta) -> np.ndarray:
    """Join parameters in the order of their names into f32[d]; those that are missing are zero.

    like: every parameter, in any order: who sends and who receives need not agree on one.
    """
    parts = [
        np.asarray(theta[name], np.float32).ravel()
        if name in theta
        else np.zeros(like[name].size, np.float32)
        for name in sorted(like)
    ]
    return np.concatenate(parts)


def places(like: Theta) -> dict[str, slice]:
    """Return where each parameter lies in the vector."""
    names = sorted(like)
    ends = np.cumsum([like[name].size for name in names]).tolist()
    return {
        name: slice(start, end) for name, start, end in zip(names, [0, *ends], ends, strict=False)
    }


def unflatten(vector: np.ndarray, like: Theta) -> dict[str, np.ndarray]:
    """Cut a vector into parameters of the names and shapes of `like`, in its order and in f32."""
    where = places(like)
    assert len(vector) == sum(value.size for value in like.values()), "one value for each"
    return {
        name: vector[where[name]].astype(np.float32, copy=False).reshape(value.shape)
        for name, value in like.items()
    }
