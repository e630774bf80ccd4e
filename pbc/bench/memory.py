"""The memory that a rival's training takes, in a process of its own, beside what it has loaded."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pbc.bench.match import made
from pbc.bench.rival import RivalSetting
from pbc.bundle import Bundle
from pbc.data.arrays import decoded
from pbc.errors import PbcError
from pbc.profile.memory import forget_peak, peak_above
from pbc.runtime.allocator import keep_freed_memory
from pbc.runtime.options import TrainOptions
from pbc.runtime.runtime import Runtime

# By then the pool of no engine grows any more.
_BATCHES = 12


@dataclass(frozen=True)
class Task:
    """What the process is told; images: uint8[N, H, W, channels] of the network's size."""

    rival: str
    bundle: Path
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    options: TrainOptions
    weights: Path | None
    torch_compile: bool


def training_bytes(rival: str, setting: RivalSetting) -> int | None:
    """Return the peak of a rival's first mini-batches above the process that has loaded it.

    Pages of files that are mapped do not count. None where the system does not say, or where the
    rival cannot run.
    """
    count = min(len(setting.samples), _BATCHES * setting.batch)
    chosen = np.linspace(0, len(setting.samples) - 1, count).astype(int)
    task = Task(
        rival,
        setting.runtime.bundle.path,
        setting.samples.batch(chosen),
        setting.samples.labels[chosen],
        setting.samples.classes,
        replace(setting.options, epochs=1),
        setting.weights,
        setting.torch_compile,
    )
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_measured, task).result()
    except (PbcError, BrokenProcessPool):
        return None


def _measured(task: Task) -> int | None:
    keep_freed_memory()  # as in a bench
    runtime = Runtime.of(Bundle.open(task.bundle))
    samples = decoded(task.images, task.labels, task.classes, runtime.spec)
    with TemporaryDirectory(prefix="pbc-") as folder:
        setting = RivalSetting(
            runtime, samples, task.options, Path(folder), task.weights, task.torch_compile
        )
        rival = made(task.rival, setting)
        before = forget_peak()
        if before is None:
            return None
        rival.prepare(None)
        rival.run_epoch()
        return max(0, peak_above(before))
