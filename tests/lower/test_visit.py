"""What is fed, and what is counted, when a training visit is timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from networks import ConvNet, pruned

from pbc.ir.program import Program, graph_inputs, graph_outputs
from pbc.lower import visit
from pbc.lower.lowering import Candidate
from pbc.lower.visit import (
    PREFIX_BATCHES,
    ROUNDS,
    Visit,
    at_level_0,
    latencies_ms,
    level_of_candidate,
)
from pbc.passes.derive_train_step import DeriveTrainStep

STEP = ("prefix/0", "forward/0", "update/0/sgd")


@pytest.fixture(scope="module")
def program() -> Program:
    return DeriveTrainStep()(replace(pruned(ConvNet), engine="onnxruntime"))


class Recorder:
    """Keeps what it is fed; time passes by the graph, and for the prefix by the image."""

    def __init__(self, candidate: Candidate, clock: list[float], pace: Mapping[str, float]) -> None:
        self._graphs, self._clock, self._pace = candidate.graphs, clock, pace
        self.fed: list[tuple[str, dict[str, Any]]] = []

    def reads(self, graph: str) -> Sequence[str]:
        return graph_inputs(self._graphs[graph])

    def run(self, graph: str, values: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: values[name] for name in self.reads(graph)}
        self.fed.append((graph, given))
        self._clock[0] += self._pace[graph] * (len(given["x"]) if graph == "prefix/0" else 1)
        outputs = graph_outputs(graph, self._graphs[graph])
        return {name: np.full(3, len(self.fed), np.float32) for name in outputs}


def test_a_visit_feeds_each_graph_what_it_reads(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(visit.time, "perf_counter", lambda: clock[0])  # type: ignore[attr-defined]
    candidate = Candidate({name: program.graphs[name] for name in STEP}, {})
    runner = Recorder(candidate, clock, {"prefix/0": 0.25, "forward/0": 3.0, "update/0/sgd": 1.0})
    (found,) = latencies_ms([Visit(runner, program, candidate)])
    # A quarter of a second per image, and four for the step.
    assert found == pytest.approx((program.batch * 0.25 + 4) * 1000)
    names = [name for name, _ in runner.fed]
    assert names == ["prefix/0", *(["prefix/0"] * len(PREFIX_BATCHES) + list(STEP[1:])) * ROUNDS]
    sizes = [len(given["x"]) for name, given in runner.fed[1:4]]
    assert sizes == [program.batch * times for times in PREFIX_BATCHES]
    update = next(given for name, given in runner.fed if name == "update/0/sgd")
    theta = program.parameters["fc.weight"]
    np.testing.assert_array_equal(update["momentum/fc.weight"], np.zeros(theta.shape, np.float32))
    assert update["learning_rate"].shape == ()
    np.testing.assert_array_equal(update["fc.weight"], theta.detach().numpy())


def test_a_step_that_is_not_derived_is_the_body(program: Program) -> None:
    candidate = Candidate({"body/0": program.graphs["body/0"]}, {})
    runner = Recorder(candidate, [0.0], {"body/0": 1.0})
    timed = Visit(runner, program, candidate)
    timed.measure(warm_up=False)
    assert [name for name, _ in runner.fed] == ["body/0"]
    assert timed.prefix_seconds() == 0


def test_the_candidate_of_a_level_is_found(program: Program) -> None:
    own = {at_level_0(n): program.graphs[n] for n in ("prefix/1", "body/1", "update/1/sgd")}
    assert list(own) == ["prefix/0", "body/0", "update/0/sgd"]
    assert level_of_candidate(program, Candidate(own, {})) == 1
    mixed = {**own, "prefix/0": program.graphs["prefix/2"]}
    assert level_of_candidate(program, Candidate(mixed, {})) is None
