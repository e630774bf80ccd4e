"""Stages of a bundle's levels, in the engine that executes it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from pbc import plugins
from pbc.bundle import Bundle
from pbc.bundle.trust import open_trusted
from pbc.data import InputSpec
from pbc.errors import PbcError
from pbc.profile.inputs import labels, noise
from pbc.profile.memory import memory, until_settled
from pbc.profile.task import Task, level_name
from pbc.profile.turns import Call, Side, milliseconds
from pbc.runtime.allocator import keep_freed_memory
from pbc.runtime.engines import Engine, Executable, guarded
from pbc.runtime.engines.bounds import check_mini_batch
from pbc.runtime.parameters import body_inputs, initial_parameters


def opened(task: Task) -> tuple[Bundle, InputSpec]:
    """Open the task's bundle; raises PbcError where it is not the one that the task began with."""
    bundle = open_trusted(task.bundle)
    if bundle.digest != task.digest:
        raise PbcError(f"{task.bundle} changed while it was measured; start again")
    return bundle, InputSpec.from_json(bundle.manifest["input"])


def engine_of(bundle: Bundle) -> Engine:
    """Return the engine that executes the bundle."""
    engine: Engine = plugins.load("pbc.engines", bundle.manifest["engine"])()
    return engine


def started(task: Task, bundle: Bundle, engine: Engine) -> Executable:
    """Load the bundle, ready for the first step."""
    executable = guarded.load(engine, bundle, threads=task.threads)
    check_mini_batch(bundle.manifest, task.batch)
    executable.foresee(body_inputs(bundle, task.classes))
    executable.start(initial_parameters(bundle, task.classes, 0), task.objective)
    return executable


def sides(
    task: Task, executable: Executable, pixels: np.ndarray, sizes: Sequence[int]
) -> list[Side]:
    """Return a side for each level of the task, its prefix in calls of each of the sizes."""
    return [_side(executable, level, task, pixels, sizes) for level in task.levels]


def _side(
    executable: Executable, level: int, task: Task, pixels: np.ndarray, sizes: Sequence[int]
) -> Side:
    features = executable.prefix(level, pixels[: task.batch])
    targets = labels(task.batch, task.classes)

    def prefix(size: int) -> Call:
        return lambda: executable.prefix(level, pixels[:size])

    return Side(
        level_name(level),
        {size: prefix(size) for size in sizes},
        lambda: executable.forward(level, features, targets),
        executable.update,
        lambda: executable.logits(level, features),
    )


def loading(task: Task) -> dict[str, Any]:
    """Time what comes before the first step: importing, opening, and loading all levels.

    Engines load a graph when it is first run: a level is loaded once it took a step and answered.
    What it takes the second time is computing, and taken off the level's own figure.
    """
    bundle, spec = opened(task)
    opened_at = time.monotonic()
    engine = engine_of(bundle)
    imported = time.monotonic()
    executable = started(task, bundle, engine)
    pixels, targets = noise(spec, task.batch), labels(task.batch, task.classes)

    def iteration(level: int) -> None:
        features = executable.prefix(level, pixels)
        executable.forward(level, features, targets)
        executable.update()
        executable.logits(level, features)

    first = {level: milliseconds(partial(iteration, level)) for level in task.levels}
    ready = time.monotonic()
    again = {level: milliseconds(partial(iteration, level)) for level in task.levels}
    return {
        "total_seconds": ready - task.began,
        "open_seconds": opened_at - task.began,
        "engine_seconds": imported - opened_at,
        "load_seconds": ready - imported,
        "level_ms": {str(level): max(0.0, first[level] - again[level]) for level in task.levels},
        **memory(),
    }


def train(task: Task, bundle: Bundle, spec: InputSpec) -> dict[str, Any]:
    """Train at level 0 until the memory has settled; return the memory."""
    keep_freed_memory()
    executable = started(task, bundle, engine_of(bundle))
    pixels, targets = noise(spec, task.batch), labels(task.batch, task.classes)

    def step() -> None:
        executable.forward(0, executable.prefix(0, pixels), targets)
        executable.update()

    return {"steps": until_settled(step), **memory()}
