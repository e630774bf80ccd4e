"""Schedulers: they decide which samples run together, at which level, and which are learnt from.

A scheduler is an entry point of the group `pbc.schedulers`: a class that is made from a
`SchedulerInput`. It is pure bookkeeping on numpy arrays; its decisions depend on nothing but its
input, the epoch and the losses it was told, so that a run can be repeated to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from pbc.runtime.costs import Costs


@dataclass(frozen=True)
class Fallback:
    """Cheaper levels than the accuracy bound allows, for a run that its time budget forces there.

    allowed: bool[n, levels] under a lower fidelity floor. points_lost: the accuracy that training
    at this floor is predicted to cost; None where the bundle does not say.
    """

    allowed: np.ndarray
    floor: float
    points_lost: float | None


@dataclass(frozen=True)
class Mix:
    """A share of the samples, drawn at random, that may run at one cheap level, the rest at 0.

    allowed: bool[n, levels]. points_lost: the accuracy that this is predicted to cost.
    """

    allowed: np.ndarray
    level: int
    share: float
    points_lost: float

    def told(self) -> str:
        """Return the line that says so."""
        return (
            f"level {self.level} serves {self.share:.0%} of the photos, drawn at random: a loss of "
            f"{self.points_lost:.1f} points of accuracy is predicted"
        )


@dataclass(frozen=True)
class SchedulerInput:
    """All that a scheduler decides by.

    levels: int64[n], the cheapest level by number at which each sample may start.
    allowed: bool[n, levels], where a sample may be moved; its own level is always allowed.
    batch: samples per mini-batch.
    alpha: a batch whose loss is at most alpha times the running mean skips its backward;
        None: never.
    grouped: whether a mini-batch must run at one level.
    epochs: of the whole run.
    skips_samples: whether samples may be left out of an epoch.
    cached: bool[n], of which samples the cache holds the features, at the level of the first
        epoch: a move would compute them again. None: of none.
    views: how many views of each sample there are.
    costs: measured on this device, for cost-aware schedulers only.
    time_budget_ms: the time that the whole run may take; what was spent before the first epoch is
        not taken off. mixes: what else keeps the bound on accuracy. fallbacks: what else it may
        use to keep the time budget, the most faithful first.
    """

    levels: np.ndarray
    allowed: np.ndarray
    batch: int
    seed: int
    alpha: float | None
    grouped: bool
    epochs: int = 1
    skips_samples: bool = True
    cached: np.ndarray | None = None
    views: int = 1
    costs: Costs | None = None
    time_budget_ms: float | None = None
    mixes: tuple[Mix, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()

    def is_cached(self) -> np.ndarray:
        """Return bool[n], all False without a cache."""
        if self.cached is None:
            return np.zeros(len(self.levels), dtype=bool)
        return self.cached


@dataclass(frozen=True)
class Batch:
    """Samples that run together; int64[b]. level: of its body, and of its prefix if grouped."""

    level: int
    samples: np.ndarray


class Scheduler(Protocol):
    """Plans epochs and learns from the losses.

    cost_aware: whether it decides by measured costs. The runtime then measures them, looks ahead
        with the prefix, and audits the levels that were chosen.
    levels: int64[n], where every sample runs. epochs: how many there will be, at most the
        input's. mix: that of the input which is used, if any.
    notes: what the user should know about the decisions.
    """

    cost_aware: ClassVar[bool]
    levels: np.ndarray
    epochs: int
    mix: Mix | None
    notes: Sequence[str]

    def plan(self, epoch: int) -> list[Batch]:
        """Return the mini-batches of an epoch, each sample at most once.

        Depends on what was known when the epoch began, not on what `observe` was told since.
        """

    def observe(self, batch: Batch, losses: np.ndarray) -> bool:
        """Take note of f32[b] losses; return whether the batch's backward is to run."""

    def finish_epoch(self) -> None:
        """Let what was learnt take effect."""

    def state(self) -> dict[str, np.ndarray]:
        """Return all that the input does not say, for a checkpoint."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state` returned."""

    def carry(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up what the state of a stream's block before knows beyond that block's samples."""


class SchedulerClass(Protocol):
    """Makes schedulers; the object of an entry point in the group `pbc.schedulers`."""

    cost_aware: bool

    def __call__(self, given: SchedulerInput) -> Scheduler:
        """Decide what is decided once, before the first epoch."""
