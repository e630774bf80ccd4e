"""Events that a run reports to whoever watches it; the runtime itself prints nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from pbc.runtime.output.validation import Validation


@dataclass(frozen=True)
class Note:
    """A line that the user should read."""

    text: str


@dataclass(frozen=True)
class SoFar(Note):
    """A note on the model that the run has left on its way; the next one makes it old."""


@dataclass(frozen=True)
class Plan:
    """How many epochs the run is going to have, decided before the first of them."""

    epochs: int


@dataclass(frozen=True)
class Progress:
    """Preparation under way: `done` of `total` samples."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class StepReport:
    """A training iteration that is over; epoch and step count from 1.

    samples: those of this epoch so far, of the `total` that it visits. loss: the mini-batch's mean;
    where a head is made in closed form, the last one's, NaN before the first.
    levels: visits per level in this epoch so far.
    """

    epoch: int
    step: int
    steps: int
    samples: int
    total: int
    loss: float
    levels: tuple[int, ...]


@dataclass(frozen=True)
class EpochReport:
    """An epoch that is over; also a line of metrics.jsonl.

    loss: mean over the samples visited, before each one's update; of a head in closed form, NaN
    where nothing judges it. levels: visits per level.
    steps: training iterations. skipped_updates: those without a backward. skipped_samples: those
    that the epoch was planned without; unvisited_samples: those that an early stop left. selected:
    the tensors that trained, None for all.
    seconds: all that training needed, by stage in `stage_seconds`; the first epoch's include
    measuring, routing and the filling of the cache.
    """

    epoch: int
    loss: float
    levels: tuple[int, ...]
    steps: int
    skipped_updates: int
    samples_per_second: float
    seconds: float
    stage_seconds: dict[str, float]
    peak_memory_bytes: int
    skipped_samples: int = 0
    unvisited_samples: int = 0
    selected: tuple[str, ...] | None = None

    def longer_by(self, stage_seconds: Mapping[str, float]) -> EpochReport:
        """Return the same epoch with more seconds, by stage."""
        stages = {
            name: taken + stage_seconds.get(name, 0.0) for name, taken in self.stage_seconds.items()
        }
        seconds = sum(stages.values())
        return replace(
            self,
            seconds=seconds,
            stage_seconds=stages,
            samples_per_second=self.samples_per_second * self.seconds / seconds,
        )

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self)
        if self.selected is None:
            del facts["selected"]
        if math.isnan(self.loss):
            facts["loss"] = None  # JSON has no NaN
        return facts


@dataclass(frozen=True)
class Finished:
    """A run that is over: its model is written, and was evaluated if there were photos for it."""

    result: Validation | None

    def scalars(self) -> Iterator[tuple[str, float]]:
        """Yield accuracy and loss by name; nothing where the model was not evaluated."""
        if self.result is not None:
            yield "accuracy", self.result.evaluation.accuracy
            yield "loss", self.result.evaluation.loss


Event: TypeAlias = Note | Plan | Progress | StepReport | EpochReport | Finished
Report: TypeAlias = Callable[[Event], None]


def silent(event: Event) -> None:
    """Tell nobody."""
