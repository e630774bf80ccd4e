"""Visit: what one training visit of a mini-batch takes, whatever runs its graphs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pbc.ir.program import Program, body, prefix, step_forward
from pbc.lower.lowering import Candidate
from pbc.lower.weights import level_of

ROUNDS = 6
# How many of the device's mini-batches may share one call of the prefix.
PREFIX_BATCHES = (1, 2, 4)
# What a measured step takes for scalars: any value does, since none changes the time.
_SCALAR = 0.1

Values = dict[str, Any]
"""Arrays, or an engine's own tensors, by the names that graphs have for them."""


class Runner(Protocol):
    """Runs the graphs of a candidate by their names."""

    def reads(self, graph: str) -> Sequence[str]:
        """The names of the graph's inputs."""

    def run(self, graph: str, values: Mapping[str, Any]) -> Values:
        """Feed a graph what it reads of these values."""


class Visit:
    """Measures one training visit: the prefix forward, then the derived step or the body forward.

    A candidate of a program that no step is derived of yet has none.
    """

    def __init__(self, runner: Runner, program: Program, candidate: Candidate) -> None:
        self._runner = runner
        self._batch = program.batch
        self._has_prefix = prefix(0) in candidate.graphs
        update = _update(candidate)
        self._step = [body(0)] if update is None else [step_forward(0), update]
        image = program.example[:1].numpy()
        sizes = [self._batch * times for times in PREFIX_BATCHES]
        self._images = {size: np.repeat(image, size, axis=0) for size in sizes}
        self._values: Values = {
            **{name: value.detach().numpy() for name, value in program.parameters.items()},
            "labels": np.zeros(self._batch, np.int64),
            "x": self._images[self._batch],
        }
        if self._has_prefix:
            self._values.update(self._run(prefix(0), self._values))
        # Seconds per sample; the prefix by how many share a call.
        self._prefix_seconds = dict.fromkeys(sizes, math.inf)
        self._step_seconds = math.inf

    def measure(self, warm_up: bool) -> None:
        if self._has_prefix:
            for size, images in self._images.items():
                start = time.perf_counter()
                self._run(prefix(0), {"x": images})
                seconds = (time.perf_counter() - start) / size
                if not warm_up:
                    self._prefix_seconds[size] = min(seconds, self._prefix_seconds[size])
        values = dict(self._values)
        start = time.perf_counter()
        for name in self._step:
            values.update(self._run(name, values))
        if not warm_up:
            seconds = (time.perf_counter() - start) / self._batch
            self._step_seconds = min(seconds, self._step_seconds)

    def _run(self, name: str, values: Values) -> Values:
        for given in self._runner.reads(name):
            if given not in values:
                values[given] = self._values[given] = _stand_in(given, values)
        return self._runner.run(name, values)

    def latency_ms(self) -> float:
        return (self.prefix_seconds() + self.step_seconds()) * 1000

    def prefix_seconds(self) -> float:
        """Of a mini-batch, at the number of them in a call that suits the prefix best."""
        return min(self._prefix_seconds.values()) * self._batch if self._has_prefix else 0.0

    def step_seconds(self) -> float:
        """Of a mini-batch: forward and update."""
        return self._step_seconds * self._batch


def latencies_ms(visits: Sequence[Visit]) -> list[float]:
    """Measure visits in turn; the fastest of several counts: this machine does other things too."""
    for turn in range(ROUNDS):
        for visit in visits:
            visit.measure(warm_up=turn == 0)
    return [visit.latency_ms() for visit in visits]


def level_of_candidate(program: Program, candidate: Candidate) -> int | None:
    """The level of the program that the candidate is; None for a trial."""
    for level in program.levels:
        named = {at_level_0(n): g for n, g in program.graphs.items() if level_of(n) == level}
        if all(named.get(name) is graph for name, graph in candidate.graphs.items()):
            return level
    return None


def at_level_0(graph: str) -> str:
    """What a candidate calls this graph of a level."""
    kind, _, rest = graph.partition("/")
    return "/".join([kind, "0", *rest.split("/")[1:]])


def _stand_in(name: str, values: Mapping[str, Any]) -> np.ndarray:
    """A scalar, or the optimizer's state, which is called after its parameter."""
    parameter = values.get(name.partition("/")[2])
    return np.array(_SCALAR, np.float32) if parameter is None else np.zeros_like(parameter)


def _update(candidate: Candidate) -> str | None:
    """Any of the candidate's updates: they differ by a few products per parameter."""
    return next((name for name in sorted(candidate.graphs) if name.startswith("update/0/")), None)
