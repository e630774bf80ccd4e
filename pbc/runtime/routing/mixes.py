"""Mixes: a share of the samples, drawn at random, at one cheap level, and the rest at level 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def largest_share(losses: Sequence[tuple[float, float]], most_lost: float) -> tuple[float, float]:
    """Return the largest share whose interpolated loss is within the bound, and that loss.

    losses: (share, points of accuracy lost), ascending; no share loses nothing.
    """
    last, before = 0.0, 0.0
    for share, lost in losses:
        if lost > most_lost:
            part = (most_lost - before) / (lost - before) if lost > before else 0.0
            return last + max(part, 0.0) * (share - last), max(most_lost, before)
        last, before = share, lost
    return last, before


def drawn(samples: int, levels: int, level: int, share: float, seed: int) -> np.ndarray:
    """Return bool[n, levels]: level 0 for all, and one level for a share of them.

    A smaller share is a part of a larger one, so that what was audited stays.
    """
    order = np.random.Generator(np.random.PCG64([seed, level])).permutation(samples)
    allowed = np.zeros((samples, levels), dtype=bool)
    allowed[:, 0] = True
    allowed[order[: round(share * samples)], level] = True
    return allowed
