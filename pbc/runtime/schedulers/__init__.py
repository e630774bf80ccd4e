"""What a scheduler is: it decides which samples run together, at which level, and who learns.

A scheduler is an entry point of the group `pbc.schedulers`: a class that is made from a `Setting`.
It is pure bookkeeping on numpy arrays; its decisions depend on nothing but the setting, the epoch
and the losses it was told, so that a run can be repeated to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Setting:
    """What a scheduler has to work with.

    levels: int64[n], the level at which each sample starts.
    allowed: bool[n, levels], where a sample may be moved; its own level is always allowed.
    batch: samples per mini-batch.
    alpha: a batch whose loss is at most alpha times the running mean skips its backward;
        None: never.
    grouped: whether a mini-batch must run at one level.
    """

    levels: np.ndarray
    allowed: np.ndarray
    batch: int
    seed: int
    alpha: float | None
    grouped: bool


@dataclass(frozen=True)
class Batch:
    """Samples that run together at one level; int64[b]."""

    level: int
    samples: np.ndarray


class Scheduler(Protocol):
    """Plans epochs and learns from the losses."""

    levels: np.ndarray

    def plan(self, epoch: int) -> list[Batch]:
        """Return the mini-batches of an epoch, each sample once; depends on `levels` only."""

    def observe(self, batch: Batch, loss: float) -> bool:
        """Take note of a batch's mean loss; True if its backward is to run."""

    def finish_epoch(self) -> None:
        """Let the next epoch's levels take effect."""

    def state(self) -> dict[str, np.ndarray]:
        """Return all that the setting does not say, for a checkpoint."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state` returned."""
