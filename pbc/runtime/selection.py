"""Selection in a run: every few epochs, the tensors that are worth their time train alone.

What a tensor is worth is measured on a few mini-batches (Huang, Yang and Gao, ElasticTrainer,
MobiSys 2023, equations 4 to 6), what it takes by the engine's profiler; a selector chooses, and the
choice is measured. Parameters and the optimizer's state are then what they were before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from pbc.errors import PbcError
from pbc.runtime.engines import Arrays, Executable
from pbc.runtime.objective import Objective
from pbc.runtime.selectors import Candidates, Selector
from pbc.util.shapes import check, dict_of, integer, list_of, maybe, number, record, text

PROBES = 4
"""Mini-batches that a selection looks at."""
_RUNS = 5
_TRIES = 4
_TIMES = record(
    {
        "forward_ms": number(0),
        "full_ms": number(0),
        "head_ms": number(0),
        "own_ms": dict_of(number(0)),
        "passing_ms": dict_of(number(0)),
    }
)
_STATE = record(
    {
        "epoch": maybe(integer()),
        "names": maybe(list_of(text())),
        "share": maybe(number(0)),
        "times": maybe(_TIMES),
    }
)


@dataclass(frozen=True)
class Probe:
    """A mini-batch with its features and labels int64[b]."""

    level: int
    features: Arrays
    labels: np.ndarray


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of a training iteration, and of its parts by parameter.

    forward_ms, full_ms: without an update, and with all of it. head_ms: what the head's update
    takes. own_ms, passing_ms: see Candidates.
    """

    forward_ms: float
    full_ms: float
    head_ms: float
    own_ms: Mapping[str, float]
    passing_ms: Mapping[str, float]

    def candidates(self, importance: Mapping[str, float]) -> Candidates:
        """Return the tensors in the order in which a backward comes to them."""
        names = tuple(sorted(self.passing_ms, key=lambda name: self.passing_ms[name]))
        return Candidates(
            names,
            np.array([importance.get(name, 0.0) for name in names]),
            np.array([self.own_ms[name] for name in names]),
            np.array([self.passing_ms[name] for name in names]),
        )


class Selection:
    """Chooses what trains: `names`, None for all, since `epoch`.

    share: of a full training iteration's time, what one takes.
    rho: what share of a full training iteration's time one may take.
    """

    def __init__(
        self,
        executable: Executable,
        selector: Selector,
        objective: Objective,
        head: Sequence[str],
        rho: float,
    ) -> None:
        self._executable = executable
        self._selector = selector
        self._objective = objective
        self._head = head
        self._rho = rho
        self._times: StepTimes | None = None
        self.epoch: int | None = None
        self.names: tuple[str, ...] | None = None
        self.share: float | None = None

    def choose(self, epoch: int, probes: Sequence[Probe]) -> None:
        """Choose anew, from an epoch on; raises PbcError where not even the head fits."""
        executable = self._executable
        executable.select(None)
        theta, state = executable.parameters(), executable.optimizer_state()
        try:
            importance = dict.fromkeys(theta, 0.0)
            for probe in probes:
                self._restore(theta, state)
                for name, value in self._importance(probe, theta).items():
                    importance[name] += value / len(probes)
            if self._times is None:
                self._times = self._measured(probes[0])
            self._fit(self._times, importance, probes[0])
            self.epoch = epoch
        finally:
            self._restore(theta, state)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, JSON-able."""
        times = None if self._times is None else {**vars(self._times)}
        return {"epoch": self.epoch, "names": self.names, "share": self.share, "times": times}

    def load_state(self, state: Any) -> None:
        """Go on from what `state` returned."""
        check(state, _STATE, "selection")
        self._times = None if state["times"] is None else StepTimes(**state["times"])
        self.names = None if state["names"] is None else tuple(state["names"])
        self.epoch, self.share = state["epoch"], state["share"]
        self._executable.select(self.names)

    def _restore(self, theta: Arrays, state: Arrays) -> None:
        self._executable.start(theta, self._objective)
        self._executable.load_optimizer_state(state)

    def _importance(self, probe: Probe, theta: Arrays) -> dict[str, float]:
        """Return -g(w + Δw)·Δw by tensor, Δw of one step: what the loss falls, to first order."""
        self._step(probe)
        moved = self._executable.parameters()
        self._executable.forward(probe.level, probe.features, probe.labels)
        gradients = self._executable.gradients()
        return {
            name: -float(np.vdot(gradient, moved[name] - theta[name]))
            for name, gradient in gradients.items()
        }

    def _measured(self, probe: Probe) -> StepTimes:
        """Time a full iteration, and the parts of its update by the tensors that need them."""
        full_ms = self._step_ms(probe)
        start = perf_counter()
        self._executable.forward(probe.level, probe.features, probe.labels)
        forward_ms = (perf_counter() - start) * 1000
        nodes = self._executable.node_times()
        readers: dict[str, int] = {}
        for needed in nodes.needed.values():
            for node in needed:
                readers[node] = readers.get(node, 0) + 1
        own_ms, shared_ms = {}, {}
        for name, needed in nodes.needed.items():
            own_ms[name] = nodes.ms(node for node in needed if readers[node] == 1)
            shared_ms[name] = nodes.ms(needed) - own_ms[name]
        passing_ms, most = {}, 0.0
        for name in sorted(shared_ms, key=lambda name: shared_ms[name]):
            most = passing_ms[name] = max(most, shared_ms[name])
        head = frozenset[str]().union(*(nodes.needed.get(name, ()) for name in self._head))
        return StepTimes(min(forward_ms, full_ms), full_ms, nodes.ms(head), own_ms, passing_ms)

    def _fit(self, times: StepTimes, importance: Mapping[str, float], probe: Probe) -> None:
        """Choose, and measure the choice: with less time, until it takes what it may."""
        most_ms = self._rho * times.full_ms
        # Parts of an iteration are timed one by one: of a small network they may add up to more.
        lowest_ms = min(times.forward_ms + times.head_ms, times.full_ms)
        if most_ms < lowest_ms:
            raise PbcError(
                f"rho is {self._rho:g}, but the forward and the head's update take "
                f"{lowest_ms / times.full_ms:.2f} of a full training iteration: "
                "that is the lowest possible here"
            )
        candidates = times.candidates(importance)
        budget_ms = most_ms - times.forward_ms
        for _ in range(_TRIES):
            self.names = self._selector.choose(candidates, budget_ms) or tuple(self._head)
            self._executable.select(self.names)
            taken_ms = self._step_ms(probe)
            self.share = taken_ms / times.full_ms
            if taken_ms <= most_ms:
                return
            spared = (most_ms - times.forward_ms) / max(taken_ms - times.forward_ms, 1e-9)
            budget_ms *= min(0.95, max(0.5, spared))

    def _step(self, probe: Probe) -> None:
        self._executable.forward(probe.level, probe.features, probe.labels)
        self._executable.update()

    def _step_ms(self, probe: Probe) -> float:
        """Return the least milliseconds of some iterations; the first one loads the graphs."""
        best = math.inf
        for run in range(_RUNS + 1):
            start = perf_counter()
            self._step(probe)
            if run:
                best = min(best, (perf_counter() - start) * 1000)
        return best
