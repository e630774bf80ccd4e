"""A model that grows while photos come: which of its states is the best, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pbc.data import Samples
from pbc.runtime.closed_form import Head
from pbc.runtime.engines import Executable
from pbc.runtime.evaluation import KeptFeatures
from pbc.runtime.options import TrainOptions
from pbc.runtime.stopping import Stop
from pbc.util.shapes import check, integer, list_of, maybe, number

_CURVE = list_of(list_of(number(0), 2, 2))


@dataclass
class GrowingModel:
    """What one run's model was worth on the way, by held-out photos if there are any.

    total: samples that the run visits in all its epochs. curve: (samples visited, accuracy), of
    every head for the time being, or of epochs where they are judged. best_at: the best of its
    points. best: that epoch's parameters.
    """

    held_out: KeptFeatures | None
    stop: Stop | None
    patience: int | None
    total: int
    least_points: float
    curve: list[tuple[int, float]] = field(default_factory=list)
    best_at: int | None = None
    best: dict[str, np.ndarray] = field(default_factory=dict)
    shown: Head | None = None

    @classmethod
    def of(cls, held_out: Samples | None, options: TrainOptions, samples: int) -> GrowingModel:
        """Return that of a run which has yet to begin."""
        level = options.fixed_level or 0
        return cls(
            None if held_out is None else KeptFeatures(held_out, level),
            None if options.stop is None else Stop.parse(options.stop),
            options.patience,
            options.epochs * samples,
            options.max_accuracy_loss,
        )

    @property
    def watched(self) -> bool:
        """Whether epochs are to be judged, for which there have to be held-out photos."""
        by_curve = self.stop is not None and self.stop.seconds is None
        return self.patience is not None or by_curve

    def of_head(self, head: Head, visited: int, executable: Executable, batch: int) -> str | None:
        """Return what the user should know of a new head; None where an earlier one is better.

        executable: started with the head.
        """
        self.shown = head
        by = "by leave-one-out" if self.held_out is None else "on the held-out photos"
        accuracy = head.accuracy
        if self.held_out is not None:
            accuracy = self.held_out.accuracy(executable, batch)
        if accuracy is None:
            return "nothing judges it yet"
        # Of heads that are as good, that of more samples; without held-out ones always that.
        behind = self.held_out is not None and accuracy < self._best_accuracy
        self._note(visited, accuracy)
        return None if behind else f"{accuracy:.1%} {by}"

    def of_epoch(self, visited: int, executable: Executable, batch: int) -> None:
        """Judge what an epoch ended with, and keep its parameters if they are the best."""
        assert self.held_out is not None, "a run whose epochs are judged holds photos out"
        if self._note(visited, self.held_out.accuracy(executable, batch)):
            self.best = executable.parameters()

    @property
    def _photos(self) -> int:
        """How many photos the curve is of: those held out, or that its head was left without."""
        if self.held_out is not None:
            return len(self.held_out)
        return 1 if self.shown is None else self.shown.judged

    @property
    def _best_accuracy(self) -> float:
        return -1.0 if self.best_at is None else self.curve[self.best_at][1]

    def reason_to_stop(self) -> str | None:
        """Return the line that says why the run has learnt enough; None where it has not."""
        if self.stop is not None:
            reason = self.stop.enough(self.curve, self.total, self.least_points, self._photos)
            if reason is not None:
                return reason
        if self.patience is None or self.best_at is None:
            return None
        waited = len(self.curve) - 1 - self.best_at
        if waited < self.patience:
            return None
        return (
            f"stopping: {waited} epochs brought no more than the {self.curve[self.best_at][1]:.1%} "
            "of the best, which is kept"
        )

    def facts(self) -> dict[str, Any]:
        """Return the JSON-able part of its state, for a checkpoint."""
        return {"curve": self.curve, "best_at": self.best_at}

    def load(self, facts: Mapping[str, Any], best: Mapping[str, np.ndarray]) -> None:
        """Continue from `facts` and `best`; checkpoints of earlier versions have none.

        Raises ShapeError for facts that are not of this form.
        """
        curve, best_at = facts.get("curve", []), facts.get("best_at")
        check(curve, _CURVE, "curve")
        check(best_at, maybe(integer(0, len(curve) - 1)), "best_at")
        self.curve = [(visited, float(accuracy)) for visited, accuracy in curve]
        self.best_at, self.best = best_at, dict(best)

    def _note(self, visited: int, accuracy: float) -> bool:
        """Add a point; return whether it is better than all before."""
        better = accuracy > self._best_accuracy
        self.curve.append((visited, accuracy))
        if better:
            self.best_at = len(self.curve) - 1
        return better
