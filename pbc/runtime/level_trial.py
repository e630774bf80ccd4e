"""The level to deploy: every level is tried on held-out photos, with a head of its own features.

What a head learnt at level 0 makes of another level's features says little of what that level is
worth: a model that learns and answers at the same level needs no fidelity, it needs features that
tell its classes apart.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pbc.data import Samples
from pbc.runtime.closed_head import ClosedHead
from pbc.runtime.evaluation import Evaluation, evaluate
from pbc.runtime.options import AUTO
from pbc.runtime.parameters import labelled_as
from pbc.runtime.routing.context import RunContext
from pbc.runtime.routing.prepared import Prepared

Theta = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Tried:
    """A level with the parameters that suit it, and what these make of the held-out photos."""

    level: int
    theta: Theta
    result: Evaluation

    def to_json(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "accuracy": self.result.accuracy,
            "sample_ms": self.result.sample_ms,
        }


@dataclass(frozen=True)
class LevelTrial:
    """A run that has ended, with the parameters `theta`, and photos to judge levels by."""

    context: RunContext
    run: Prepared
    held_out: Samples
    theta: Theta

    def __call__(self) -> tuple[Tried, ...]:
        """Try every level; the executable's parameters change."""
        return tuple(self._tried(level) for level in range(len(self.context.ladder)))

    def cheapest(self, tried: Sequence[Tried]) -> Tried:
        """Return the cheapest level that loses no more than the run's bound; level 0 if none."""
        within = [one for one in tried if self._lost(tried, one) <= self._bound + 1e-9]
        return min(within, key=lambda one: (self._costs()[one.level], one.level))

    def told(self, tried: Sequence[Tried], chosen: Tried) -> str:
        """Return the line that says what was found, and decided."""
        found = ", ".join(
            f"level {one.level} {one.result.accuracy:.1%} at {one.result.sample_ms:.2f} ms a photo"
            for one in tried
        )
        return (
            f"level {chosen.level} is deployed: {found} (held-out photos; at most "
            f"{self._bound:g} points may be lost)"
        )

    @property
    def _bound(self) -> float:
        return self.context.options.max_accuracy_loss

    def _lost(self, tried: Sequence[Tried], one: Tried) -> float:
        """Return points of accuracy behind level 0."""
        return 100 * (tried[0].result.accuracy - one.result.accuracy)

    def _costs(self) -> list[float]:
        """Return what inference costs at each level: the run's costs decide alike when repeated."""
        costs = self.run.decisions.costs
        if costs is None:
            return [level.cost for level in self.context.ladder.levels]
        return [level.prefix_ms + level.forward_ms for level in costs.levels]

    def _tried(self, level: int) -> Tried:
        found = [self._judged(level, self.theta)]
        own = self._own_head(level)  # of level 0 too: the run may have learnt at cheaper ones
        found += [] if own is None else [self._judged(level, own)]
        return max(found, key=lambda one: (one.result.accuracy, -one.result.loss))

    def _judged(self, level: int, theta: Theta) -> Tried:
        context = self.context
        context.executable.start(theta, context.options.objective)
        labelled = labelled_as(context.samples.classes, self.held_out)
        return Tried(level, theta, evaluate(context.executable, labelled, level, context.batch))

    def _own_head(self, level: int) -> Theta | None:
        """Return the parameters with a head of all samples at this level; None where none is."""
        context, features = self.context, self.run.features
        options = replace(context.options, head=AUTO)
        count = len(context.samples)
        closed = ClosedHead.find(context.bundle, context.executable, self.theta, options, count)
        if closed is None:
            return None
        step = features.chunk_of(level)
        tell = functools.partial(context.progress, f"trying level {level}")
        for start in range(0, count, step):
            samples = np.arange(start, min(start + step, count))
            sent = features.compute(level, features.views.rows(0, samples))
            closed.add(level, sent, context.samples.labels[samples])
            tell(start + len(samples), count)
        return closed.finished()
