"""The two Flower apps, called as Flower calls them, within this process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import tomli
from flwr.app import Context, Error, Message, RecordDict

from pbc.errors import PbcError
from pbc.fleet.adopt import adopt
from pbc.fleet.apps import FLEET, PROTECTION, client_app, server_app
from pbc.fleet.grid import LocalGrid
from pbc.fleet.rounds import FleetOptions
from pbc.fleet.state import FleetState, metrics
from pbc.runtime.output.folder import Output


def context(node: int, node_config: dict[str, Any], run_config: dict[str, Any]) -> Context:
    return Context(
        run_id=1, node_id=node, node_config=node_config, state=RecordDict(), run_config=run_config
    )


class Apps(LocalGrid):
    """Nodes that are apps; what an app raises travels as Flower sends it."""

    def __init__(self, configs: dict[int, dict[str, Any]]) -> None:
        super().__init__({})
        self._configs = configs
        self._apps = {node: client_app() for node in configs}

    def get_node_ids(self) -> list[int]:
        return list(self._configs)

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        try:
            return self._apps[node](message, context(node, self._configs[node], {}))
        except Exception as error:  # as Flower's own process does
            return Message(
                Error(2, f"Traceback …\n{type(error).__name__}: {error}"), reply_to=message
            )


def test_nodes_and_server_train_and_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write(tmp_path / "m.pbc", classes=["blue", "green", "red"])
    tiny.write(tmp_path / "other.pbc", "maps", classes=["blue", "green", "red"])
    configs: dict[int, dict[str, Any]] = {}
    for node in (1, 2, 3):
        tiny.photos(tmp_path / f"photos{node}", 6, seed=node)
        configs[node] = {
            "bundle": str(tmp_path / ("other.pbc" if node == 3 else "m.pbc")),
            "photos": str(tmp_path / f"photos{node}"),
            "out": str(tmp_path / f"node{node}"),
            "lr": 0.1,
        }
    given = {"bundle": str(tmp_path / "m.pbc"), "out": str(tmp_path / "fleet"), "top_k": 0.5}
    for rounds in (1, 3):  # new apps each time: all that goes on is in the folders
        server_app()(Apps(configs), context(0, {}, {**given, "rounds": rounds}))
    lines = metrics(tmp_path / "fleet")
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert all(line["nodes"] == [1, 2] for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    said = capsys.readouterr().out
    assert "node 3 is left out: PbcError: the fleet trains the bundle" in said
    assert "round 3/3  2 of " in said
    assert (tmp_path / "node1" / "fleet" / "unsent.f32").exists()
    assert not (tmp_path / "node3").exists()
    assert adopt(tmp_path / "fleet", tmp_path / "mine", bundle=tmp_path / "m.pbc") == 3


def test_a_server_waits_for_the_run_that_outlived_its_superlink(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write(tmp_path / "m.pbc", classes=["blue", "green", "red"])
    given = {"bundle": str(tmp_path / "m.pbc"), "out": str(tmp_path / "fleet"), "rounds": 1}
    run = context(0, {}, given)
    nobody = Apps({1: {}})
    with ThreadPoolExecutor() as pool:
        with Output(tmp_path / "fleet").locked():
            waiting = pool.submit(server_app(), nobody, run)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.1)
        waiting.result(timeout=30)
    assert FleetState.load(tmp_path / "fleet").round == 1
    monkeypatch.setattr("pbc.fleet.apps._OUTLIVED_SECONDS", 0.0)
    with Output(tmp_path / "fleet").locked(), pytest.raises(PbcError, match="another run"):
        server_app()(nobody, run)


def test_a_run_of_the_example_can_change_every_option(root: Path) -> None:
    """Flower refuses what the app's own configuration does not name."""
    text = (root / "examples" / "fleet" / "pyproject.toml").read_text()
    config = tomli.loads(text)["tool"]["flwr"]["app"]["config"]
    assert set(config) == {"bundle", "out", "classes", *FLEET, *PROTECTION}
    options = FleetOptions()
    assert {name: config[name] or None for name in FLEET if name != "nodes"} == {
        name: getattr(options, name) or None for name in FLEET if name != "nodes"
    }
    assert not any(config[name] for name in PROTECTION)


def test_what_a_node_is_not_given(tmp_path: Path) -> None:
    tiny.write(tmp_path / "m.pbc", classes=["blue", "green", "red"])
    given = {"bundle": str(tmp_path / "m.pbc"), "out": str(tmp_path / "fleet"), "rounds": 1}
    server_app()(Apps({1: {"bundle": str(tmp_path / "m.pbc")}}), context(0, {}, given))
    assert metrics(tmp_path / "fleet")[0]["answered"] == 0
