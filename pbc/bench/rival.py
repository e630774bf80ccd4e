"""The protocol between a match and a rival: one way to train that `pbc bench` compares.

A rival is an entry point of the group `pbc.rivals`: a class that is made from a `RivalSetting`. All
rivals of a seed take turns, epoch by epoch, in one process; the match evaluates them.

Its class may declare a `strategy`, and `pbc@lora:4` is the rival `pbc` with the strategy `lora:4`:
its bundle is then another one, which the bench compiles of the same network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pbc import plugins
from pbc.bench.marks import Marks
from pbc.data import Samples
from pbc.runtime.objective import Objective
from pbc.runtime.options import TrainOptions
from pbc.runtime.runtime import Runtime

GROUP = "pbc.rivals"

Arrays = Mapping[str, np.ndarray]


def way(name: str) -> str:
    """Return the entry point of a rival."""
    return name.partition("@")[0]


def strategy_of(name: str) -> str | None:
    """Return the strategy by which a rival trains; None where it is that of the bundle."""
    given = name.partition("@")[2] or getattr(plugins.load(GROUP, way(name)), "strategy", None)
    return None if given is None else str(given)


@dataclass(frozen=True)
class RivalSetting:
    """Everything that a rival works with, for one seed.

    runtime: of the bundle, or of another one where the rival has a strategy of its own.
    samples: the training photos, labelled as the bundle numbers its classes.
    options: epochs, batch, objective, seed and threads count for every rival; batch and
        learning_rate are never None here. All others are for pbc's own schedulers.
    folder: a scratch folder of this rival and seed.
    weights: the file of pretrained weights, where the bundle's provenance alone does not find it.
    torch_compile: whether PyTorch rivals may try torch.compile.
    marks: asked by a rival after each mini-batch, to be evaluated inside an epoch.
    """

    runtime: Runtime
    samples: Samples
    options: TrainOptions
    folder: Path
    weights: Path | None = None
    torch_compile: bool = True
    marks: Marks = field(default_factory=Marks)

    @property
    def batch(self) -> int:
        """Samples per mini-batch."""
        return self.options.samples_per_batch

    @property
    def objective(self) -> Objective:
        """The loss and the optimizer of every rival."""
        assert self.options.learning_rate is not None
        return self.options.objective


@dataclass(frozen=True)
class EpochTimes:
    """Times of an epoch, and how it went.

    seconds: all that training needed: decoding, routing, filling a cache, checkpoints. The first
        epoch's include the preparation that training needs; loading and compiling code is none.
    stage_seconds: the same by stage (pbc.runtime.meter.STAGES).
    levels: samples per level. loss: mean over the samples, before the update of each one's batch;
        None where nothing judges a head in closed form.
    last: whether the rival is done, however many epochs were planned.
    """

    seconds: float
    stage_seconds: dict[str, float]
    levels: tuple[int, ...]
    loss: float | None
    last: bool = False


class Rival(Protocol):
    """One way to train; its constructor raises PbcError where it cannot run."""

    def __init__(self, setting: RivalSetting) -> None: ...

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
