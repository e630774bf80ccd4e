"""Fleets within this process, run by Flower's strategies."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.numpy
import tiny
from click.testing import CliRunner
from flwr.app import Array, ArrayRecord, Error, Message
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx
from killing import Killed

from pbc.cli import main
from pbc.data import ImageFolder
from pbc.errors import PbcError, UsageError
from pbc.fleet.grid import Attendance, LocalGrid
from pbc.fleet.protection import Protection
from pbc.fleet.rounds import FleetOptions
from pbc.fleet.simulate import Simulation, SimulationOptions
from pbc.fleet.state import FleetState, metrics
from pbc.runtime.output.personal import Personal
from pbc.runtime.runtime import Runtime


class Fleet:
    def __init__(self, root: Path) -> None:
        self.root = root
        tiny.photos(root / "photos", 20)
        tiny.write(root / "m.pbc")

    def simulation(self, tell: Any = lambda line: None, **changes: Any) -> Simulation:
        from pbc.runtime.objective import Objective

        fleet = FleetOptions(**{"rounds": 4, **changes})
        options = SimulationOptions(fleet, clients=3, objective=Objective(learning_rate=0.1))
        return Simulation(self.root / "m.pbc", self.root / "photos", options, tell=tell)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedprox", "fedadam"])
def test_a_fleet_learns(fleet: Fleet, strategy: str) -> None:
    simulation = fleet.simulation(strategy=strategy, rounds=12, eta=0.1)
    state = simulation.run(fleet.root / "out")
    lines = metrics(fleet.root / "out")
    assert [line["round"] for line in lines] == list(range(1, 13))
    assert lines[-1]["accuracy"] == simulation.evaluate(state.theta)["accuracy"] > 0.8
    assert len(lines[-1]["client_accuracy"]) == 3
    assert lines[0]["examples"] == 48


def test_one_round_is_the_mean_by_photos(fleet: Fleet) -> None:
    """Compared with what the clients themselves send, averaged here."""
    simulation = fleet.simulation(rounds=1, strategy="fedavg")
    state = simulation.run(fleet.root / "out")
    from pbc.runtime.parameters import initial_parameters

    start = initial_parameters(Runtime.open(fleet.root / "m.pbc").bundle, 3, 0)
    total = {name: np.zeros_like(value) for name, value in start.items()}
    for node, rows in enumerate(simulation._dealt, 1):
        theta, _ = simulation._learner(rows, node).train(start, 1)
        for name, value in theta.items():
            total[name] += value * (len(rows) / 48)
    for name, value in total.items():
        np.testing.assert_allclose(state.theta[name], value, atol=1e-6)


KEPT = {"fedavg": set[str](), "fedavgm": {"momentum_vector"}, "fedadam": {"m_t", "v_t"}}


@pytest.mark.parametrize("strategy", KEPT)
def test_a_killed_server_goes_on(fleet: Fleet, strategy: str) -> None:
    """Its clients go with it here, and their momentum, so θ is not that of an unbroken run."""
    whole = fleet.simulation(strategy=strategy)
    straight = whole.run(fleet.root / "straight")

    def kill(line: str) -> None:
        if line.startswith("round 2/"):
            raise Killed

    with pytest.raises(Killed):
        fleet.simulation(kill, strategy=strategy).run(fleet.root / "killed")
    assert FleetState.load(fleet.root / "killed").round == 2
    with (fleet.root / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3}\n{"rou')
    state = fleet.simulation(strategy=strategy).run(fleet.root / "killed")
    assert [line["round"] for line in metrics(fleet.root / "killed")] == [1, 2, 3, 4]
    assert state.round == straight.round == 4
    assert set(state.moments) == KEPT[strategy]
    # Nothing is left to do.
    assert equal(fleet.simulation(strategy=strategy).run(fleet.root / "killed").theta, state.theta)


def test_another_fleet_is_not_gone_on_with(fleet: Fleet) -> None:
    fleet.simulation(rounds=1).run(fleet.root / "out")
    with pytest.raises(PbcError, match="its epochs is 1, now it is 2"):
        fleet.simulation(rounds=2, epochs=2).run(fleet.root / "out")


def test_half_precision_and_top_k_send_less(fleet: Fleet) -> None:
    sizes = {}
    for name, protection in (
        ("plain", Protection()),
        ("float16", Protection(float16=True)),
        ("top-k", Protection(top_k=0.2, float16=True)),
    ):
        simulation = fleet.simulation(protection=protection, rounds=8)
        simulation.run(fleet.root / name)
        line = metrics(fleet.root / name)[-1]
        sizes[name] = line["down_bytes"], line["up_bytes"]
        assert line["accuracy"] > 0.6
    assert sizes["float16"][0] < sizes["plain"][0]
    assert sizes["float16"][1] < sizes["plain"][1]


# ---- nodes that do not answer ----------------------------------------------------------------


class Flaky(LocalGrid):
    """Node 1 is silent, node 2 sends an error, node 3 answers."""

    def push_messages(self, messages: Any) -> Any:
        messages = list(messages)
        names = list(super().push_messages(messages))
        for name, message in zip(names, messages, strict=True):
            if message.metadata.dst_node_id == 1:
                del self._replies[name]
        return names

    def _answer(self, message: Message) -> Message:
        if message.metadata.dst_node_id == 2:
            error = Error(0, "Traceback …\nPbcError: the photos are gone\n")
            return Message(error, reply_to=message)
        return super()._answer(message)


def test_dead_and_refusing_nodes_are_said_and_the_fleet_goes_on(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pbc.fleet.simulate.LocalGrid", Flaky)
    told: list[str] = []
    # All three have to be there, not to be asked: that would be waited for without end.
    simulation = fleet.simulation(told.append, rounds=6, nodes=3, timeout_seconds=0.05)
    state = simulation.run(fleet.root / "out")
    lines = metrics(fleet.root / "out")
    assert state.round == 6
    assert all(line["nodes"] in ([3], []) for line in lines)
    assert [3] in [line["nodes"] for line in lines]
    assert any("node 1 is left out: no answer within 0.05 s" in line for line in told)
    assert any("node 2 is left out: PbcError: the photos are gone" in line for line in told)


class Hostile(LocalGrid):
    """Node 1 would have the mean alone, or end the fleet; node 2 writes to the terminal."""

    lie: ClassVar[dict[str, float]] = {}
    moved = 0.0

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        if message.metadata.dst_node_id == 2:
            return Message(Error(0, "\x1b[2J\u202egone " + "x" * 9999), reply_to=message)
        if message.metadata.dst_node_id == 1:
            for name, value in self.lie.items():
                reply.content["metrics"][name] = value
            if self.moved:
                update = reply.content["arrays"]["update"].numpy()
                moved = {"update": Array(np.full_like(update, self.moved))}
                reply.content["arrays"] = ArrayRecord(moved)
        return reply


@pytest.mark.parametrize(
    ("lie", "moved", "said"),
    [
        ({"num-examples": 1e308}, 0.0, "it trained on 1e+308 photos; 1 to 1e+09 count"),
        ({"num-examples": -1.0}, 0.0, "it trained on -1 photos"),
        ({"loss": float("nan")}, 0.0, "its loss is nan"),
        ({"loss": 1e300}, 0.0, "its loss is 1e+300"),
        ({}, 3e38, "an update moves a value by more than 1e+09"),
    ],
)
def test_what_a_node_says_ends_no_fleet(
    fleet: Fleet,
    monkeypatch: pytest.MonkeyPatch,
    lie: dict[str, float],
    moved: float,
    said: str,
) -> None:
    monkeypatch.setattr("pbc.fleet.simulate.LocalGrid", Hostile)
    monkeypatch.setattr(Hostile, "lie", lie)
    monkeypatch.setattr(Hostile, "moved", moved)
    told: list[str] = []
    state = fleet.simulation(told.append, rounds=3).run(fleet.root / "out")
    assert state.round == 3
    assert [3] in [line["nodes"] for line in metrics(fleet.root / "out")]
    assert any(line.startswith(f"node 1 is left out: {said}") for line in told)
    (first, *_) = (line for line in told if line.startswith("node 2"))
    assert first.isprintable()
    assert len(first) <= 500


def test_who_does_not_answer_is_asked_less(fleet: Fleet) -> None:
    random.seed(0)
    grid = LocalGrid(dict.fromkeys((1, 2, 3)))  # type: ignore[arg-type]
    attendance = Attendance(grid)
    attendance.missed.update({1: 3})
    listed = []
    for _ in range(400):
        attendance.begin_round()
        listed.append(attendance.get_node_ids())
        assert attendance.get_node_ids() == listed[-1]
    assert all({2, 3} <= set(nodes) for nodes in listed)
    assert 20 < sum(1 in nodes for nodes in listed) < 90
    attendance.missed.update({2: 60, 3: 60, 1: 60})
    attendance.begin_round()
    assert attendance.get_node_ids() == [1, 2, 3]


def test_who_comes_back_begins_anew(fleet: Fleet) -> None:
    here = dict.fromkeys((1, 2, 3))
    attendance = Attendance(LocalGrid(here))  # type: ignore[arg-type]
    attendance.missed.update({1: 60})
    del here[1]
    attendance.begin_round()
    here[1] = None
    attendance.begin_round()
    assert attendance.get_node_ids() == [2, 3, 1]


class Late(LocalGrid):
    """Another node is there each time that anybody looks."""

    looked = 0

    def get_node_ids(self) -> list[int]:
        self.looked += 1
        return [1, 2, 3][: self.looked]


def test_the_first_round_waits_for_as_many_nodes_as_it_is_to_have(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pbc.fleet.simulate.LocalGrid", Late)
    monkeypatch.setattr("pbc.fleet.grid._POLL_SECONDS", 0.01)
    told: list[str] = []
    fleet.simulation(told.append, rounds=1, nodes=3).run(fleet.root / "out")
    assert metrics(fleet.root / "out")[0]["nodes"] == [1, 2, 3]
    assert [line for line in told if "waiting" in line] == [
        "waiting for 3 nodes, 1 here",
        "waiting for 3 nodes, 2 here",
    ]


class Other(LocalGrid):
    """Node 2 chose its levels by another floor."""

    def __init__(self, clients: Any) -> None:
        super().__init__(clients)
        clients[2].floor = 0.5


def test_a_node_that_refuses_the_terms_is_left_out(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pbc.fleet.simulate.LocalGrid", Other)
    told: list[str] = []
    fleet.simulation(told.append, rounds=1, floor=0.9).run(fleet.root / "out")
    assert metrics(fleet.root / "out")[0]["nodes"] == [1, 3]
    assert any("node 2 is left out: the fleet's fidelity floor is 0.9, here it is 0.5" in line
               for line in told)  # fmt: skip


def test_strategies_are_flowers() -> None:
    kinds = {"fedavg": FedAvg, "fedavgm": FedAvgM, "fedprox": FedProx, "fedadam": FedAdam}
    for name, kind in kinds.items():
        assert type(FleetOptions(strategy=name)._strategy()) is kind
    with pytest.raises(
        UsageError, match="no fleet strategy named 'fedavgg'; did you mean 'fedavg'"
    ):
        FleetOptions(strategy="fedavgg")


# ---- the commands ----------------------------------------------------------------------------


def test_the_commands(fleet: Fleet) -> None:
    out, mine = fleet.root / "out", fleet.root / "mine"
    args = ["fleet", "simulate", str(fleet.root / "m.pbc"), str(fleet.root / "photos")]
    args += ["-o", str(out), "--clients", "3", "--lr", "0.1", "--rounds"]
    shown = CliRunner().invoke(
        main, [*args, "2", "--compare", "--html", str(fleet.root / "f.html")]
    )
    assert shown.exit_code == 0, shown.output
    assert "round 2/2  3 of 3 nodes  loss" in shown.output
    assert "a round takes " in shown.output
    assert "central training for as many epochs:" in shown.output
    assert "By client" in (fleet.root / "f.html").read_text()
    again = CliRunner().invoke(main, [*args, "3"], standalone_mode=False)
    assert isinstance(again.exception, UsageError)
    assert "--resume goes on" in str(again.exception)
    resumed = CliRunner().invoke(main, [*args, "3", "--resume", "--json"])
    shown_json = json.loads(resumed.stdout)
    assert len(shown_json["rounds"]) == 3
    assert shown_json["pace"]["rounds_per_minute"] > 0
    adopted = CliRunner().invoke(main, ["fleet", "adopt", str(out), "-o", str(mine)])
    assert adopted.exit_code == 0, adopted.output
    assert "of 3 rounds" in adopted.output
    personal = Personal.open(mine)
    samples = ImageFolder.open(fleet.root / "photos", personal.spec)
    assert personal.evaluate(samples).accuracy > 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 0},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"mu": -1.0},
        {"timeout_seconds": 0.0},
        {"server_momentum": 1.0},
    ],
)
def test_values_that_cannot_be_meant(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        FleetOptions(**options)


def test_a_folder_without_a_fleet(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["fleet", "adopt", str(tmp_path), "-o", str(tmp_path / "x")], standalone_mode=False
    )
    assert isinstance(result.exception, PbcError)
    assert "holds no fleet" in str(result.exception)
    (tmp_path / "fleet.safetensors").write_bytes(b"no")
    with pytest.raises(PbcError, match="is damaged"):
        FleetState.load(tmp_path)


@pytest.mark.parametrize(
    "facts",
    ["{", "[]", '{"bundle": 1, "classes": ["a", "b"]}', '{"bundle": "d", "classes": "ab"}',
     '{"bundle": "d", "classes": ["a", NaN]}', "[" * 100_000],
)  # fmt: skip
def test_a_fleet_that_none_wrote(tmp_path: Path, facts: str) -> None:
    tensors = {"theta/w": np.zeros(1, np.float32)}
    data = safetensors.numpy.save(tensors, {"facts": facts, "round": "1"})
    (tmp_path / "fleet.safetensors").write_bytes(data)
    with pytest.raises(PbcError, match="is damaged"):
        FleetState.load(tmp_path)


def test_a_fleet_of_other_parameters_is_not_gone_on_with(fleet: Fleet) -> None:
    out = fleet.root / "out"
    state = fleet.simulation().run(out)
    replace(state, theta={"x": np.zeros(1, np.float32)}).save(out)
    with pytest.raises(PbcError, match="the parameters are not the bundle's"):
        fleet.simulation(rounds=9).run(out)
    replace(state, moments={"momentum_vector": {"x": np.zeros(1, np.float32)}}).save(out)
    with pytest.raises(PbcError, match="the parameters are not the bundle's"):
        fleet.simulation(rounds=9).run(out)


def test_lines_of_metrics_that_no_server_writes(tmp_path: Path) -> None:
    whole = {
        "round": 1, "asked": 2, "answered": 2, "nodes": [1, 2**64 - 1], "examples": 4.0,
        "loss": 0.5, "down_bytes": 3, "up_bytes": 3, "seconds": 0.1, "cpu_seconds": 0.1,
    }  # fmt: skip
    for broken in ("[]", '{"round": 2}', json.dumps({**whole, "loss": "x"}), '{"round": NaN}'):
        (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(whole)}\n{broken}\n")
        assert metrics(tmp_path) == [whole]
