"""Rounds over a real SuperLink and real nodes on loopback, with TLS; both are killed, and go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import superlink
import tiny

from pbc.errors import PbcError
from pbc.fleet.state import FleetState, metrics
from pbc.runtime.options import TrainOptions


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[superlink.Fleet]:
    made = superlink.Fleet(tmp_path / "fleet")
    tiny.write(made.root / "m.pbc", classes=["blue", "green", "red"])
    for seed, name in enumerate(("first", "second")):
        tiny.photos(made.root / f"{name}-photos", 6, seed=seed)
    yield made
    made.close()


@pytest.mark.superlink
def test_a_fleet_goes_on_when_a_node_and_the_server_are_killed(fleet: superlink.Fleet) -> None:
    out = fleet.root / "out"
    config = {"bundle": fleet.root / "m.pbc", "out": out}

    def round_of(nodes: int, after: int = 0) -> None:
        fleet.wait(
            lambda: any(line["answered"] == nodes for line in metrics(out)[after:]),
            f"a round of {nodes} nodes after {after} rounds",
        )

    link = fleet.superlink()
    fleet.register("first", "second")
    nodes = {name: fleet.node(name, "--lr", "0.1") for name in ("first", "second")}
    fleet.run(rounds=100, nodes=1, **config)
    round_of(2)
    listening, talking = fleet.sockets()
    assert listening == talking == {superlink.LOOPBACK}

    fleet.kill(nodes["second"])
    round_of(1, after=len(metrics(out)))

    fleet.kill(link)
    kept = FleetState.load(out)
    fleet.node("second", "--lr", "0.1")  # which finds no server yet
    fleet.superlink()
    fleet.run(rounds=100, nodes=2, **config)
    round_of(2, after=kept.round)
    assert "joining the fleet" in fleet.said("second")
    lines = metrics(out)
    assert [line["round"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["loss"] < lines[0]["loss"]
    fleet.wait(lambda: FleetState.load(out).round > kept.round, "a state")
    now = FleetState.load(out).theta
    assert any(not np.array_equal(value, kept.theta[name]) for name, value in now.items())


def test_a_node_whose_supernode_ends_says_why(tmp_path: Path) -> None:
    from pbc.fleet.node import Link, resident

    tiny.write(tmp_path / "m.pbc", classes=["blue", "green", "red"])
    tiny.photos(tmp_path / "photos", 2)
    link = Link("127.0.0.1:1", private_key=tmp_path / "no.key")
    with pytest.raises(PbcError, match=r"Flower's SuperNode ended: .*\(more in .*supernode.log\)"):
        resident(
            link, tmp_path / "m.pbc", tmp_path / "photos", tmp_path / "out", TrainOptions(), print
        )
