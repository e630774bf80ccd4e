"""Timing a training iteration: one mini-batch at a level, whatever runs its graphs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pbc.bundle.graph_name import BODY, FORWARD, PREFIX, GraphName, update
from pbc.ir.levels import IMAGES, LevelGraphs
from pbc.ir.program import Program
from pbc.ir.runner import Runner
from pbc.runtime.costs import LevelCost
from pbc.util.progress import tell

ROUNDS = 6
# A machine that does other things too is measured on, until the fastest rounds of every level agree
# to so much, or so long.
AGREEMENT = 1.1
FASTEST = 3
MOST_ROUNDS = 30
MOST_SECONDS = 60.0
# How many of the device's mini-batches may share one call of the prefix.
PREFIX_BATCHES = (1, 2, 4)
# What a measured step takes for scalars: any value does, since none changes the time.
_SCALAR = 0.1


class IterationTimer:
    """Times one training iteration: the prefix forward, then the derived step or the body.

    A level that no step is derived of has none: its runner differentiates the body by itself, or
    there is no step yet, and the forward stands for it.
    """

    def __init__(self, runner: Runner, program: Program, level: LevelGraphs) -> None:
        self._runner = runner
        self._batch = program.request.batch
        self._has_prefix = level.prefix is not None
        # Any of the updates: they differ by a few products per parameter.
        updates = [update(name) for name in sorted(level.updates, reverse=True)][:1]
        self._step: list[GraphName] = [FORWARD, *updates] if updates else [BODY]
        image = program.network.example[:1].numpy()
        sizes = [self._batch * times for times in PREFIX_BATCHES]
        self._images = {size: np.repeat(image, size, axis=0) for size in sizes}
        self._values: dict[str, Any] = {
            **{name: value.detach().numpy() for name, value in program.parameters.items()},
            "labels": np.zeros(self._batch, np.int64),
            IMAGES: self._images[self._batch],
        }
        if self._has_prefix:
            self._values.update(self._run(PREFIX, self._values))
        # Seconds per sample; the prefix by how many share a call.
        self._prefix_seconds = dict.fromkeys(sizes, math.inf)
        self._step_seconds = self._forward_seconds = math.inf
        # Of whole iterations, by round.
        self._rounds: list[float] = []

    def measure(self, warm_up: bool) -> None:
        """Run prefix and step once; a warm-up counts for nothing."""
        prefix_seconds = 0.0 if not self._has_prefix else math.inf
        if self._has_prefix:
            for size, images in self._images.items():
                start = time.perf_counter()
                self._run(PREFIX, {IMAGES: images})
                seconds = (time.perf_counter() - start) / size
                prefix_seconds = min(prefix_seconds, seconds)
                if not warm_up:
                    self._prefix_seconds[size] = min(seconds, self._prefix_seconds[size])
        values = dict(self._values)
        start = time.perf_counter()
        values.update(self._run(self._step[0], values))
        forward_seconds = (time.perf_counter() - start) / self._batch
        for role in self._step[1:]:
            values.update(self._run(role, values))
        if not warm_up:
            seconds = (time.perf_counter() - start) / self._batch
            self._step_seconds = min(seconds, self._step_seconds)
            self._forward_seconds = min(forward_seconds, self._forward_seconds)
            self._rounds.append(prefix_seconds + seconds)

    def _run(self, role: GraphName, values: dict[str, Any]) -> dict[str, Any]:
        for given in self._runner.inputs(role):
            if given not in values:
                values[given] = self._values[given] = _placeholder(given, values)
        return self._runner.run(role, values)

    @property
    def settled(self) -> bool:
        """Whether the fastest rounds agree: another one is unlikely to be much faster."""
        fastest = sorted(self._rounds)[:FASTEST]
        return len(fastest) == FASTEST and fastest[-1] <= AGREEMENT * fastest[0]

    def latency_ms(self) -> float:
        return (self.prefix_seconds() + self.step_seconds()) * 1000

    def cost(self) -> LevelCost:
        """Return it per sample; where running the body differentiates it, all is the forward's."""
        sizes = self._prefix_seconds
        chunk = min(sizes, key=lambda size: sizes[size])
        return LevelCost(
            prefix_ms=sizes[chunk] * 1000 if self._has_prefix else 0.0,
            chunk=chunk,
            forward_ms=self._forward_seconds * 1000,
            backward_ms=(self._step_seconds - self._forward_seconds) * 1000,
            measured=True,
        )

    def prefix_seconds(self) -> float:
        """Of a mini-batch, at the number of them in a call that suits the prefix best."""
        return min(self._prefix_seconds.values()) * self._batch if self._has_prefix else 0.0

    def step_seconds(self) -> float:
        """Of a mini-batch: forward and update."""
        return self._step_seconds * self._batch


def measure(timers: Sequence[IterationTimer]) -> None:
    """Measure timers in turn; the fastest of several counts: this machine does other things too.

    Says so where it does so much that the fastest rounds still differ in the end.
    """
    start = time.perf_counter()
    for turn in range(MOST_ROUNDS):
        if turn >= ROUNDS and all(timer.settled for timer in timers):
            return
        if turn >= ROUNDS and time.perf_counter() - start > MOST_SECONDS:
            break
        for timer in timers:
            timer.measure(warm_up=turn == 0)
    tell("this machine is busy: what levels were measured to cost is uncertain")


def _placeholder(name: str, values: Mapping[str, Any]) -> np.ndarray:
    """A scalar, or the optimizer's state, which is called after its parameter."""
    parameter = values.get(name.partition("/")[2])
    return np.array(_SCALAR, np.float32) if parameter is None else np.zeros_like(parameter)
