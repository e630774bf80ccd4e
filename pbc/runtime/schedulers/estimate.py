"""Estimates of how long a run is going to take, from measured costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pbc.runtime.costs import Costs

# Of the losses of a trained model more lie below their mean than above it.
_BELOW_MEAN = 0.65
# The share of the epochs, at the end, in which everything is visited: final accuracy needs it.
_FULL_SHARE = 0.15
# A proxy that saves less than this is not worth its difference from level 0.
_LEAST_SAVED = 0.03


@dataclass(frozen=True)
class Skipping:
    """The probability that an epoch skips an easy sample, and how many in a row may at most."""

    rate: float
    in_a_row: int

    def visited_share(self) -> float:
        """Return the expected share of an epoch's samples that is visited."""
        if self.rate == 0:
            return 1.0
        # Between two visits of an easy sample lie as many epochs as skipped it in a row.
        cycle = sum(self.rate**count for count in range(self.in_a_row + 1))
        return 1 - _BELOW_MEAN * (1 - 1 / cycle)


NEVER = Skipping(0.0, 0)


def full_epochs(epochs: int) -> int:
    """Return how many of the last epochs visit every sample."""
    return math.ceil(_FULL_SHARE * epochs)


@dataclass(frozen=True)
class Workload:
    """A run's samples: what each costs, and of which the cache holds the features.

    cached: bool[n]. views: how many views of a sample the cache holds.
    """

    costs: Costs
    cached: np.ndarray
    views: int = 1

    def run_ms(self, levels: np.ndarray, epochs: int, skipping: Skipping) -> float:
        """Return what `epochs` at int64[n] levels take in expectation, from an empty cache on."""
        per_sample = self.sample_ms(epochs, skipping)[np.arange(len(levels)), levels]
        return float(self.costs.policy_ms * len(levels) + per_sample.sum())

    def sample_ms(self, epochs: int, skipping: Skipping) -> np.ndarray:
        """Return f64[n, levels]: what a sample takes in `epochs` at each level, in expectation.

        Its features are computed at every visit, or once per view where they are cached.
        """
        costs, visited = self.costs, visits(epochs, skipping)
        computed = np.where(self.cached, min(self.views, epochs), visited)[:, None]
        gathered = np.where(self.cached, visited * costs.gather_ms, 0)[:, None]
        return np.asarray(computed * costs.compute_ms() + gathered + visited * costs.body_ms())


def visits(epochs: int, skipping: Skipping) -> float:
    """Return how often a sample is visited in expectation: the first and last epochs visit all."""
    skipping_epochs = max(epochs - 1 - full_epochs(epochs), 0)
    return epochs - skipping_epochs * (1 - skipping.visited_share())


def cheapest(allowed: np.ndarray, sample_ms: np.ndarray) -> np.ndarray:
    """Return int64[n]: of bool[n, levels] allowed ones, the level of lowest f64[n, levels] cost.

    Level 0 where no other saves enough.
    """
    least = np.full(sample_ms.shape[1], 1.0)
    least[0] -= _LEAST_SAVED
    levels: np.ndarray = np.where(allowed, sample_ms * least, np.inf).argmin(axis=1)
    return levels
