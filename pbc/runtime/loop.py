"""The training loop that epochs, rounds and blocks of a stream share.

A training iteration takes a mini-batch: its features are fetched, and a learner learns from them,
by a step (`Steps`) or by sums (pbc.runtime.closed_head). Each part is charged to its stage of the
meter (pbc.runtime.meter), and whatever is left to `bookkeeping`: from the meter's restart to the
end of the loop no second is lost or counted twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pbc.errors import PbcError
from pbc.runtime.engines import Arrays, Executable
from pbc.runtime.events import EpochReport
from pbc.runtime.meter import Meter, peak_memory_bytes
from pbc.runtime.routing.prepared import Prepared
from pbc.runtime.schedulers import Batch, Scheduler


class DivergedError(PbcError):
    """A loss or a parameter is not finite; whoever trains says where, and what to do."""


@dataclass
class Totals:
    """Sums over an epoch, or a stream; those of the epoch under way survive in the checkpoint.

    loss: sum over the samples. visits: samples by level. skipped_updates: training iterations
    without a backward. seconds: by stage, as of the checkpoint. iterating_seconds: those of them
    that are not of the preparation.
    """

    visits: list[int]
    iterations: int = 0
    samples: int = 0
    loss: float = 0.0
    skipped_updates: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    iterating_seconds: float = 0.0

    @classmethod
    def zero(cls, levels: int) -> Totals:
        """Return the sums over nothing, for a ladder of `levels`."""
        return cls([0] * levels)

    def count(self, loss: float, levels: np.ndarray, *, updated: bool) -> None:
        """Add a training iteration of mean loss `loss` on samples at int64[b] levels."""
        self.iterations += 1
        self.samples += len(levels)
        self.loss += loss * len(levels)
        self.skipped_updates += not updated
        for level in levels.tolist():
            self.visits[level] += 1

    def report(self, epoch: int, seconds: dict[str, float], planned: int, of: int) -> EpochReport:
        """Return what is told of an epoch, counted from 1, that took `seconds` by stage.

        planned: samples that it was to visit, of those that there are.
        """
        total_seconds = sum(seconds.values())
        return EpochReport(
            epoch=epoch,
            loss=self.loss / self.samples,
            levels=tuple(self.visits),
            steps=self.iterations,
            skipped_updates=self.skipped_updates,
            samples_per_second=self.samples / total_seconds,
            seconds=total_seconds,
            stage_seconds=dict(seconds),
            peak_memory_bytes=peak_memory_bytes(),
            skipped_samples=of - planned,
            unvisited_samples=planned - self.samples,
        )


class Learner(Protocol):
    """Learns from mini-batches, one after the other."""

    def learn(
        self, batch: Batch, features: Arrays, labels: np.ndarray, meter: Meter
    ) -> tuple[float | None, bool]:
        """Learn from features with int64[b] labels; charge the meter's stages.

        Returns the mean loss, None where none is known yet, and whether anything was updated.
        """


@dataclass(frozen=True)
class Steps:
    """Learns by steps: the body's forward, and, unless the scheduler skips it, an update."""

    executable: Executable
    scheduler: Scheduler

    def learn(
        self, batch: Batch, features: Arrays, labels: np.ndarray, meter: Meter
    ) -> tuple[float, bool]:
        """Raises DivergedError before an update by a loss that is not finite."""
        losses, _ = self.executable.forward(batch.level, features, labels)
        loss = float(losses.mean())
        meter.lap("forward")
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss}")
        updated = self.scheduler.observe(batch, losses)
        if updated:
            self.executable.update()
            meter.lap("backward")
        return loss, updated


def train(
    learner: Learner,
    run: Prepared,
    labels: np.ndarray,
    batches: Sequence[Batch],
    meter: Meter,
    totals: Totals,
    *,
    epoch: int = 0,
    first: int = 0,
) -> Iterator[float]:
    """Learn from an epoch's mini-batches from number `first` on; yield each one's mean loss.

    labels: int64[n]. totals: grows by each iteration before its loss is yielded, NaN where none is
    known; what the caller does until it asks for the next is bookkeeping. The scheduler's epoch is
    finished at the end.
    """
    meter.lap("bookkeeping")
    fetched = run.fetch(batches, first, epoch)
    for batch, features in zip(batches[first:], fetched, strict=True):
        meter.lap("bookkeeping")
        loss, updated = learner.learn(batch, features, labels[batch.samples], meter)
        totals.count(loss or 0.0, run.levels(batch), updated=updated)
        yield math.nan if loss is None else loss
        # Before the next features are fetched, whose laps are not to be charged with this.
        meter.lap("bookkeeping")
    run.scheduler.finish_epoch()
    meter.lap("bookkeeping")


def finite_parameters(executable: Executable) -> dict[str, np.ndarray]:
    """Return a copy of the trainable parameters; raises DivergedError if one is not finite."""
    theta = executable.parameters()
    if not all(np.isfinite(value).all() for value in theta.values()):
        raise DivergedError("a parameter is not finite")
    return theta
