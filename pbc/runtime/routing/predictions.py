"""Predicted fidelities: what the policy says of each sample, or each level's mean."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pbc.bundle.ladder import Ladder
from pbc.data import Samples, pooled_view
from pbc.runtime.engines import Executable
from pbc.runtime.meter import Meter


def means(ladder: Ladder, samples: int) -> np.ndarray:
    """Return f32[n, N]: what to predict for n samples where nothing tells them apart."""
    fidelities = [level.fidelity for level in ladder.levels[1:]]
    row = [0.0 if fidelity is None else fidelity for fidelity in fidelities]
    return np.tile(np.array(row), (samples, 1))


def predict(
    samples: Samples,
    executable: Executable,
    view: tuple[int, int],
    batch: int,
    meter: Meter,
    progress: Callable[[int, int], None],
) -> np.ndarray:
    """Ask the policy about every sample: f32[n, N], the fidelity of levels 1…N.

    view: height and width of what the policy looks at. batch: photos per call.
    progress: called with (done, total).
    """
    count = len(samples)
    predicted = []
    for start in range(0, count, batch):
        indices = np.arange(start, min(start + batch, count))
        images = samples.images(indices)
        meter.lap("decode")
        predicted.append(executable.policy(pooled_view(images, *view)))
        meter.lap("policy")
        progress(start + len(indices), count)
    return np.concatenate(predicted)
