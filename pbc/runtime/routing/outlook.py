"""The outlook of a bundle: which of its levels runs would use, and what they would gain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pbc.bundle.ladder import CLOSED, SGD, Ladder
from pbc.runtime.costs import Costs, LevelCost
from pbc.runtime.options import TrainOptions
from pbc.runtime.routing.predictions import means
from pbc.runtime.routing.routes import Routes
from pbc.runtime.schedulers import SchedulerInput
from pbc.runtime.schedulers.cost_model import CostModel
from pbc.runtime.schedulers.estimate import Workload

BOUNDS = (0.5, 1.0, 2.0)
"""Points of accuracy that a run may lose, for which a compilation says what to expect."""

_SAMPLES = 1000
# Where nothing was measured: what a body takes of the whole of level 0.
_BODY_SHARE = 0.05


@dataclass(frozen=True)
class Outlook:
    """A run that may lose so many points, as its scheduler would plan it.

    shares: of the photos, by level, none at zero. gain, cached_gain: how many times shorter the run
    is than at level 0, without and with a cache of features.
    """

    points: float
    shares: Mapping[int, float]
    gain: float
    cached_gain: float

    def told(self) -> str:
        """Return the line that says so."""
        if set(self.shares) == {0}:
            return f"within {self.points:g} points of accuracy no level but the original runs"
        used = ", ".join(f"{share:.0%} at level {level}" for level, share in self.shares.items())
        return (
            f"within {self.points:g} points of accuracy: {used}; {self.gain:.2f}× level 0's speed, "
            f"{self.cached_gain:.2f}× with a cache"
        )


def outlooks(manifest: Mapping[str, Any], ladder: Ladder) -> list[Outlook]:
    """Return what to expect of a bundle for each of BOUNDS, by the levels' mean fidelities.

    A head that alone trains is made in closed form, of one visit to each photo.
    """
    closed = set(manifest["parameters"]) == set(manifest["head"])
    costs = _costs(manifest, ladder)
    found = []
    for points in BOUNDS:
        options = TrainOptions(epochs=1 if closed else 12, max_accuracy_loss=points, skip=False)
        routes = Routes(manifest, ladder, options, CLOSED if closed else SGD)
        plan = [_plan(routes, costs, cached=cached) for cached in (False, True)]
        levels, counts = np.unique(plan[0][0], return_counts=True)
        shares = dict(zip(levels.tolist(), (counts / _SAMPLES).tolist(), strict=True))
        found.append(Outlook(points, shares, plan[0][1], plan[1][1]))
    return found


def _plan(routes: Routes, costs: Costs, *, cached: bool) -> tuple[np.ndarray, float]:
    """Return int64[n], where samples run, and how many times shorter that is than at level 0."""
    predicted = means(routes.ladder, _SAMPLES)
    routing = routes.route(predicted, ())
    held = np.full(_SAMPLES, cached)
    scheduler = CostModel(
        SchedulerInput(
            levels=routing.levels,
            allowed=routing.allowed,
            batch=8,
            seed=0,
            alpha=None,
            grouped=False,
            epochs=routes.options.epochs,
            skips_samples=False,
            cached=held,
            costs=costs,
            mixes=routes.mixes(_SAMPLES, ()),
        )
    )
    load = Workload(costs, held)
    run_ms, original_ms = (
        load.run_ms(levels, routes.options.epochs, scheduler.skipping)
        for levels in (scheduler.levels, np.zeros_like(scheduler.levels))
    )
    return scheduler.levels, original_ms / run_ms


def _costs(manifest: Mapping[str, Any], ladder: Ladder) -> Costs:
    """Return what the compiler measured; else the ladder's ratios stand for prefix and body."""
    measured = manifest.get("costs")
    if measured is not None:
        levels = tuple(LevelCost(**level) for level in measured["levels"])
    else:
        alone = not any(name.startswith("prefix/") for name in manifest["graphs"])
        body = 1.0 if alone else _BODY_SHARE
        whole = LevelCost(1 - body, 32, body / 3, body * 2 / 3, measured=False)
        levels = tuple(_scaled(whole, level.cost, alone) for level in ladder.levels)
    return Costs(levels, decode_ms=0.0, gather_ms=0.0, policy_ms=0.0)


def _scaled(cost: LevelCost, ratio: float, alone: bool) -> LevelCost:
    if not alone:
        return replace(cost, prefix_ms=cost.prefix_ms * ratio)
    return replace(cost, forward_ms=cost.forward_ms * ratio, backward_ms=cost.backward_ms * ratio)
