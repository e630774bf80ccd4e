"""What a contestant of `pbc bench` is: the protocol between the match and whoever trains in it.

A rival is an entry point of the group `pbc.rivals`: a class that is made from a `Setting`. All
rivals of a seed take turns, epoch by epoch, in one process; the match evaluates them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pbc.data import Samples
from pbc.runtime.objective import Objective
from pbc.runtime.options import TrainOptions
from pbc.runtime.runtime import Runtime

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Setting:
    """What a rival has to work with, for one seed.

    samples: the training photos, labelled as the bundle numbers its classes.
    options: epochs, batch, objective, seed and threads count for every rival; batch and
        learning_rate are never None here. The rest is for pbc's own schedulers.
    folder: a scratch folder of this rival and seed.
    weights: the file of pretrained weights, where the bundle's provenance alone does not find it.
    torch_compile: whether PyTorch rivals may try torch.compile.
    """

    runtime: Runtime
    samples: Samples
    options: TrainOptions
    folder: Path
    weights: Path | None = None
    torch_compile: bool = True

    @property
    def batch(self) -> int:
        """Samples per mini-batch."""
        assert self.options.batch is not None
        return self.options.batch

    @property
    def objective(self) -> Objective:
        """The loss and the optimizer of every rival."""
        assert self.options.learning_rate is not None
        return self.options.objective


@dataclass(frozen=True)
class EpochTimes:
    """What an epoch took and how it went.

    seconds: all that training needed: decoding, routing, filling a cache, checkpoints. The first
        epoch's include the preparation that training needs; loading and compiling code is none.
    stage_seconds: the same by stage (pbc.runtime.meter.STAGES).
    levels: visits per level. loss: mean over the visits, before each one's update.
    """

    seconds: float
    stage_seconds: dict[str, float]
    levels: tuple[int, ...]
    loss: float


class Rival(Protocol):
    """One way to train; its constructor takes a Setting and raises PbcError if it cannot play."""

    def __init__(self, setting: Setting) -> None: ...

    def prepare(self, state: Arrays | None) -> None:
        """Get ready for the first epoch, or go on after the epoch that `state` was taken at.

        The joules of the first belong to training; loading, compiling and choosing code does not,
        and is for the constructor. What is done a second time after an interruption does not count
        in any epoch's times.
        """

    def run_epoch(self) -> EpochTimes:
        """Train for one epoch."""

    def parameters(self) -> dict[str, np.ndarray] | None:
        """θ by the manifest's names, for the common evaluator; None where everything trains."""

    def evaluate(self, samples: Samples) -> float:
        """Return the accuracy, 0…1; called only where `parameters` returns None."""

    def state(self) -> dict[str, np.ndarray]:
        """Return all that `prepare` needs to go on after this epoch to the same result."""

    def facts(self) -> dict[str, Any]:
        """Return what a reader should know: `variant` and `notes` are shown, `cache_bytes` too."""
