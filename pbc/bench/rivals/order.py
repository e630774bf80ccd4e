"""Order of the samples for rivals that choose none themselves."""

from __future__ import annotations

import numpy as np


def batches(count: int, batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the mini-batches of an epoch, int64[b] each; only the last may be short.

    The same draws as pbc's own scheduler makes where no sample is skipped, so that PET and pbc
    pinned to level 0 learn from the same mini-batches in the same order.
    """
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)
    return [order[start : start + batch] for start in range(0, count, batch)]
