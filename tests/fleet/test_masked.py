"""Secure aggregation: what the server reads is the sum of what devices send, and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from flwr.app import Context, Error, Message, RecordDict
from flwr.common import bytes_to_ndarray

from pbc.errors import UsageError
from pbc.fleet.apps import client_app, server_app
from pbc.fleet.client import Client
from pbc.fleet.grid import LocalGrid
from pbc.fleet.protection import Protection
from pbc.fleet.rounds import FleetOptions
from pbc.fleet.state import FleetState, metrics
from pbc.fleet.vector import flatten
from pbc.runtime.parameters import initial_parameters
from pbc.runtime.runtime import Runtime

STAGES = 4


class Nodes(LocalGrid):
    """Nodes that are apps and keep their contexts; `silent` ones fail at the masked vectors."""

    def __init__(self, root: Path, silent: int | None = None) -> None:
        super().__init__({})
        self._silent = silent
        self.sent: list[Message] = []
        self._nodes = {}
        for node in range(1, 5):
            photos = tiny.photos(root / f"photos{node}", 2 + node, seed=node)
            config: dict[str, Any] = {"bundle": str(root / "m.pbc"), "photos": str(photos)}
            config |= {"out": str(root / f"node{node}"), "lr": 0.1, "secure": True}
            context = Context(
                run_id=0, node_id=node, node_config=config, state=RecordDict(), run_config={}
            )
            self._nodes[node] = (client_app(), context)

    def get_node_ids(self) -> list[int]:
        return list(self._nodes)

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        app, context = self._nodes[node]
        if node == self._silent and len(self.sent) >= 2 * len(self._nodes):
            return Message(Error(2, "gone"), reply_to=message)
        reply = app(copy.deepcopy(message), context)  # the stages share their contents
        self.sent.append(reply)
        return reply


def rounds(root: Path, grid: Nodes, name: str, **more: Any) -> FleetState:
    given = {"bundle": str(root / "m.pbc"), "out": str(root / name), "rounds": 1, **more}
    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config=given)
    server_app()(grid, context)
    return FleetState.load(root / name)


def masked_vectors(grid: Nodes) -> list[np.ndarray]:
    configs = [config for reply in grid.sent for config in reply.content.config_records.values()]
    return [bytes_to_ndarray(c["masked_params"][1]) for c in configs if "masked_params" in c]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny.write(tmp_path / "m.pbc", classes=["blue", "green", "red"])
    return tmp_path


def test_the_sum_is_the_average_of_the_updates(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[np.ndarray, float]] = []
    real = Client.answer

    def answer(self: Client, theta: Any, terms: Any) -> Any:
        arrays, figures = real(self, theta, terms)
        sent.append((arrays["update"], figures["num-examples"]))
        return arrays, figures

    monkeypatch.setattr(Client, "answer", answer)
    nodes = Nodes(root)
    masked = rounds(root, nodes, "masked", secure=True)
    start = initial_parameters(Runtime.open(root / "m.pbc").bundle, 3, 0)
    mean = sum(update * examples for update, examples in sent) / sum(n for _, n in sent)
    assert np.abs(mean).max() > 0.01
    found = flatten(masked.theta, start) - flatten(start, start)
    np.testing.assert_allclose(found, mean, atol=1e-4)
    (line,) = metrics(root / "masked")
    assert line["answered"] == 4
    assert line["loss"] is None
    assert len(nodes.sent) == STAGES * 4
    # Whole numbers over the whole range: what each sent is no update of its.
    vectors = masked_vectors(nodes)
    assert len(vectors) == 4
    assert all(vector.std() > 2**28 for vector in vectors)
    for reply in nodes.sent:
        assert not any(len(array.data) for r in reply.content.array_records.values()
                       for array in r.values())  # fmt: skip


def test_the_sum_is_there_when_a_node_is_lost(root: Path) -> None:
    state = rounds(root, Nodes(root, silent=2), "masked", secure=True)
    (line,) = metrics(root / "masked")
    assert line["nodes"] == [1, 3, 4]
    assert all(np.isfinite(value).all() for value in state.theta.values())
    assert any(np.abs(value).max() < 4 for value in state.theta.values())


def test_too_few_nodes_leave_theta(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = Nodes(root)
    nodes._nodes = {1: nodes._nodes[1]}
    rounds(root, nodes, "masked", secure=True)
    assert "nobody answered" in capsys.readouterr().out


def test_a_node_of_masked_sums_answers_nothing_else(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(Nodes):
        def _answer(self, message: Message) -> Message:
            try:
                return super()._answer(message)
            except Exception as error:  # as Flower's own process does
                return Message(Error(2, repr(error)), reply_to=message)

    rounds(root, Failing(root), "plain")
    assert metrics(root / "plain")[0]["answered"] == 0


def test_no_sum_of_compressed_updates() -> None:
    with pytest.raises(UsageError, match="secure goes without top-k"):
        FleetOptions(secure=True, protection=Protection(top_k=0.1))
