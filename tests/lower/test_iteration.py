"""What is fed, and what is counted, when a training iteration is timed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from networks import ConvNet, pruned

from pbc.bundle.graph_name import BODY, FORWARD, PREFIX, GraphName, update
from pbc.ir.graph import graph_inputs, graph_outputs
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.lower import iteration
from pbc.lower.iteration import FASTEST, PREFIX_BATCHES, ROUNDS, IterationTimer, measure
from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.runtime.costs import LevelCost
from pbc.testing import with_request
from pbc.util.progress import telling

SGD = update("sgd")


@pytest.fixture(scope="module")
def program() -> Program:
    return DeriveTrainStep()(with_request(pruned(ConvNet), engine="onnxruntime"))


class Recorder:
    """Keeps what it is fed; time passes by the graph, and for the prefix by the image."""

    def __init__(
        self, level: LevelGraphs, clock: list[float], pace: Mapping[GraphName, float]
    ) -> None:
        self._graphs, self._clock, self._pace = level.graphs, clock, pace
        self.fed: list[tuple[GraphName, dict[str, Any]]] = []

    def inputs(self, role: GraphName) -> Sequence[str]:
        return graph_inputs(self._graphs[role])

    def run(self, role: GraphName, values: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: values[name] for name in self.inputs(role)}
        self.fed.append((role, given))
        self._clock[0] += self._pace[role] * (len(given["x"]) if role == PREFIX else 1)
        outputs = graph_outputs(self._graphs[role])
        return {name: np.full(3, len(self.fed), np.float32) for name in outputs}


def test_a_timer_feeds_each_graph_what_it_reads(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, batch = [0.0], program.request.batch
    monkeypatch.setattr(iteration.time, "perf_counter", lambda: clock[0])  # type: ignore[attr-defined]
    level = program.levels[0]
    runner = Recorder(level, clock, {PREFIX: 0.25, FORWARD: 3.0, SGD: 1.0})
    timer = IterationTimer(runner, program, level)
    measure([timer])
    # A quarter of a second per image, and four for the step.
    assert timer.latency_ms() == pytest.approx((batch * 0.25 + 4) * 1000)
    each = 1000 / batch
    assert timer.cost() == LevelCost(250.0, batch, 3 * each, each, measured=True)
    roles = [role for role, _ in runner.fed]
    assert roles == [PREFIX, *([PREFIX] * len(PREFIX_BATCHES) + [FORWARD, SGD]) * ROUNDS]
    sizes = [len(given["x"]) for _, given in runner.fed[1:4]]
    assert sizes == [batch * times for times in PREFIX_BATCHES]
    fed = next(given for role, given in runner.fed if role == SGD)
    theta = program.parameters["fc.weight"]
    np.testing.assert_array_equal(fed["momentum/fc.weight"], np.zeros(theta.shape, np.float32))
    assert fed["learning_rate"].shape == ()
    np.testing.assert_array_equal(fed["fc.weight"], theta.detach().numpy())


def test_a_step_that_is_not_derived_is_the_body(program: Program) -> None:
    level = LevelGraphs(program.levels[0].body)
    runner = Recorder(level, [0.0], {BODY: 1.0})
    timed = IterationTimer(runner, program, level)
    timed.measure(warm_up=False)
    assert [role for role, _ in runner.fed] == [BODY]
    assert timed.prefix_seconds() == 0


@pytest.mark.parametrize(("busy_rounds", "told"), [(4, False), (1000, True)])
def test_a_busy_machine_is_measured_until_the_fastest_rounds_agree(
    program: Program, monkeypatch: pytest.MonkeyPatch, busy_rounds: int, told: bool
) -> None:
    clock: list[float] = [0.0]
    heard: list[str] = []
    monkeypatch.setattr(iteration.time, "perf_counter", lambda: clock[0])  # type: ignore[attr-defined]
    level = LevelGraphs(program.levels[0].body)
    runner = Recorder(level, clock, {BODY: 1e-3})
    right, calls = runner.run, itertools.count()

    def disturbed(role: GraphName, values: Mapping[str, Any]) -> dict[str, Any]:
        turn = next(calls)
        clock[0] += 1e-3 * turn**2 if turn < busy_rounds else 0.0
        return right(role, values)

    monkeypatch.setattr(runner, "run", disturbed)
    timer = IterationTimer(runner, program, level)
    with telling(heard.append):
        measure([timer])
    assert timer.settled is not told
    assert ["this machine is busy" in line for line in heard] == ([True] if told else [])
    assert len(runner.fed) == (iteration.MOST_ROUNDS if told else busy_rounds + FASTEST)
