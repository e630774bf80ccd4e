"""Routing: how cheap a level each sample tolerates, and where it must never go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pbc.bundle.ladder import Ladder
from pbc.data import Samples, pooled_view
from pbc.runtime.engines import Executable
from pbc.runtime.meter import Meter

# The policy is so small that what surrounds a call would cost more than the call.
_BATCH = 64


@dataclass(frozen=True)
class Routing:
    """The outcome for n samples.

    levels: int64[n], each sample's difficulty: the cheapest level it tolerates.
    allowed: bool[n, levels], every level at which it may run.
    """

    levels: np.ndarray
    allowed: np.ndarray


def routable(ladder: Ladder, floor: float, max_level: int | None = None) -> np.ndarray:
    """bool[levels]: level 0, and what is aligned and faithful enough on held-out images."""
    fidelities = [level.fidelity for level in ladder.levels]
    faithful = [fidelity is not None and fidelity >= floor for fidelity in fidelities]
    within = np.arange(len(ladder)) <= (len(ladder) if max_level is None else max_level)
    return np.array([True, *faithful[1:]]) & within


def means(ladder: Ladder, samples: int) -> np.ndarray:
    """f32[n, N]: what to predict for n samples where nothing tells them apart."""
    fidelities = [level.fidelity for level in ladder.levels[1:]]
    row = [0.0 if fidelity is None else fidelity for fidelity in fidelities]
    return np.tile(np.array(row), (samples, 1))


def route(predicted: np.ndarray, usable: np.ndarray, floor: float) -> Routing:
    """Send each sample to the largest level that it and the ladder allow.

    predicted: f[n, N], the fidelity of levels 1…N that each sample can be trusted to have.
    usable: bool[levels], see `routable`.
    """
    allowed = np.ones((len(predicted), len(usable)), dtype=bool)
    allowed[:, 1:] = predicted >= floor
    allowed &= usable
    cheapest = len(usable) - 1 - allowed[:, ::-1].argmax(axis=1)
    return Routing(cheapest.astype(np.int64), allowed)


def predict(
    samples: Samples,
    executable: Executable,
    view: tuple[int, int],
    batch: int,
    meter: Meter,
    progress: Callable[[int, int], None],
) -> np.ndarray:
    """Ask the policy about every sample: f32[n, N], the fidelity of levels 1…N.

    view: height and width of what the policy looks at. progress: called with (done, total).
    """
    count = len(samples)
    predicted = []
    batch = max(batch, _BATCH)
    for start in range(0, count, batch):
        indices = np.arange(start, min(start + batch, count))
        images = samples.images(indices)
        meter.lap("decode")
        predicted.append(executable.policy(pooled_view(images, *view)))
        meter.lap("policy")
        progress(start + len(indices), count)
    return np.concatenate(predicted)
