"""What a run costs and what it may lose: measured costs, and the floor that a bound implies."""

from __future__ import annotations

import json
from pathlib import Path
from time import sleep
from typing import Any, cast

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from pbc import bundle
from pbc.bundle.ladder import Ladder
from pbc.data import ImageFolder
from pbc.errors import PbcError
from pbc.runtime.costs import Costs
from pbc.runtime.engines import Executable
from pbc.runtime.events import Event, Note
from pbc.runtime.features.source import Made
from pbc.runtime.options import TrainOptions
from pbc.runtime.routing import cost_profiler
from pbc.runtime.routing.cost_profiler import CostProfiler
from pbc.runtime.routing.fidelity_floor import DEFAULT_FLOOR, fidelity_floor, floor_for, lost_at
from pbc.runtime.runtime import Runtime
from pbc.runtime.trainer import Trainer
from pbc.util.processor import machine


def trainer(root: Path, kind: str, **options: Any) -> Trainer:
    tiny.photos(root / "photos", 10)
    tiny.write(root / "m.pbc", kind)
    runtime = Runtime.open(root / "m.pbc")
    samples = ImageFolder.open(root / "photos", runtime.spec)
    return runtime.trainer(samples, TrainOptions(learning_rate=0.1, **options), root / "out")


@pytest.mark.parametrize("kind", ["probe", "maps", "bodies", "whole"])
def test_measuring_changes_nothing_but_the_clock(tmp_path: Path, kind: str) -> None:
    measured = trainer(tmp_path, kind, epochs=2)
    measured.prepare()
    path = tmp_path / "out" / "costs.json"
    costs = json.loads(path.read_text())
    assert costs["levels"][0]["measured"]
    assert all(level["forward_ms"] > 0 for level in costs["levels"])
    assert all((level["prefix_ms"] > 0) == (kind != "whole") for level in costs["levels"])
    pinned = trainer(tmp_path, kind, epochs=2, costs=path)
    pinned.prepare()
    for name, value in measured.parameters().items():
        np.testing.assert_array_equal(value, pinned.parameters()[name])
    assert measured.run_epoch().stage_seconds["measure"] > 0
    assert pinned.run_epoch().stage_seconds["measure"] == 0
    for name, value in measured.parameters().items():
        np.testing.assert_array_equal(value, pinned.parameters()[name])


def test_pinned_costs_decide(tmp_path: Path) -> None:
    path = tiny.costs(tmp_path / "costs.json")
    data = json.loads(path.read_text())
    data["levels"][1]["prefix_ms"] = 0.01  # by their numbers, the other proxy is cheaper
    path.write_text(json.dumps(data))
    run = trainer(tmp_path, "probe", costs=path, fidelity_floor=0.3)
    run.prepare()
    levels = run.run_epoch().levels
    assert levels[1] > 0
    assert levels[2] == 0


def test_the_chunk_is_what_the_costs_or_the_user_say(tmp_path: Path) -> None:
    calls: list[int] = []
    costs = tiny.costs(tmp_path / "c.json")
    huge = tmp_path / "huge.json"
    huge.write_text(costs.read_text().replace('"chunk": 16', f'"chunk": {1 << 20}'))
    # More than the photos that there are is work for nothing.
    for chunk, prefix_batch, path in ((16, None, costs), (8, 8, costs), (30, None, huge)):
        run = trainer(
            tmp_path, "probe", costs=path, routing=False, cache="off", prefix_batch=prefix_batch
        )
        run.prepare()
        prefix = run._executable.prefix

        def count(level: int, images: np.ndarray, prefix: Any = prefix) -> dict[str, np.ndarray]:
            calls.append(len(images))
            result: dict[str, np.ndarray] = prefix(level, images)
            return result

        run._executable.prefix = count  # type: ignore[method-assign]
        calls.clear()
        run.run_epoch()
        # The last one is filled up rather than run in a shape of its own.
        assert calls == [chunk] * -(-30 // chunk)


class Sleeps:
    """Calls of known lengths: level 0 gains from calls of 32, level 1 is the same in all."""

    def prefix(self, level: int, images: np.ndarray) -> dict[str, np.ndarray]:
        each_ms = 0.8 if level == 1 else 0.5 if len(images) >= 32 else 1.2
        sleep(each_ms * 1e-3 * len(images))
        return {"flat": images[:, :, 0, 0]}

    def forward(self, level: int, features: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(1), np.zeros(1)

    def update(self) -> None:
        pass


def test_level_0_is_timed_in_the_larger_calls_too() -> None:
    ladder = Ladder.from_json(tiny.contents(fidelities=(0.9,))[0]["levels"], "macs")
    sizes: list[int] = []

    def images(count: int) -> np.ndarray:
        sizes.append(count)
        return np.zeros((count, 3, 2, 2), np.float32)

    measured = CostProfiler(
        executable=cast(Executable, Sleeps()), images=images, labels=np.zeros(64, np.int64),
        ladder=ladder, levels=[0, 1], batch=4, chunk=None, most=1000, computed=10000, epochs=10000,
        prefix=True, bodies=False, width=3,
    ).measure()  # fmt: skip
    first, proxy = measured.levels
    assert sizes == [16, 32]  # the smaller calls are a part of the usual ones
    assert first.chunk == 32
    assert first.prefix_ms < proxy.prefix_ms


class Counts:
    """Calls that take what images take: 2 ms each to make features, less to learn from them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.images: list[tuple[int, int]] = []

    def prefix(self, level: int, images: np.ndarray) -> dict[str, np.ndarray]:
        self.images.append((level, len(images)))
        self._take(2e-3 * len(images))
        return {"flat": images[:, :, 0, 0]}

    def forward(self, level: int, features: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
        self._take(1e-4)
        return np.zeros(1), np.zeros(1)

    def update(self) -> None:
        self._take(1e-4)

    def _take(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.mark.parametrize("count", [10, 40, 240, 5784])
def test_measuring_takes_a_twentieth_of_the_run_and_keeps_its_first_chunk(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder = Ladder.from_json(tiny.contents(fidelities=(0.9, 0.8, 0.7))[0]["levels"], "macs")
    device = Counts()
    kept: Made = {}
    monkeypatch.setattr(cost_profiler, "perf_counter", lambda: device.seconds)
    batch, epochs = 8, 12
    costs = CostProfiler(
        executable=cast(Executable, device), labels=np.zeros(count, np.int64),
        images=lambda number: np.zeros((number, 3, 2, 2), np.float32),
        ladder=ladder, levels=[0, 1, 2, 3], batch=batch, chunk=None, most=1000,
        computed=1, epochs=epochs, prefix=True, bodies=False, width=3, kept=kept,
    ).measure()  # fmt: skip
    ((level, rows),) = kept
    chunk = len(np.frombuffer(rows, np.int64))
    assert (level, chunk) == (0, {10: 10, 40: 20, 240: 30, 5784: 32}[count])
    run = 2e-3 * count + epochs * count / batch * 2e-4
    assert device.seconds - 2e-3 * chunk <= max(0.05 * run, 2e-3 + 4e-4) + 1e-9
    assert costs.levels[0].measured
    assert costs.levels[0].prefix_ms == pytest.approx(2)
    assert costs.levels[3].measured == (count == 5784)


def test_what_the_compiler_measured_here_is_not_measured_again(tmp_path: Path) -> None:
    rows = json.loads(tiny.costs(tmp_path / "c.json").read_text())["levels"]
    for machine_name, known in ((machine(), True), ("another", False)):
        root = tmp_path / str(known)
        tiny.photos(root / "photos", 10)
        manifest, files = tiny.contents("probe")
        manifest["costs"] = {"machine": machine_name, "levels": rows}
        bundle.write(root / "m.pbc", manifest, files)
        runtime = Runtime.open(root / "m.pbc")
        samples = ImageFolder.open(root / "photos", runtime.spec)
        for options, expected in ((TrainOptions(), known), (TrainOptions(batch=2), False)):
            run = runtime.trainer(samples, options, root / "out")
            run.prepare()
            told = json.loads((root / "out" / "costs.json").read_text())["levels"]
            same = [level["prefix_ms"] for level in told] == [row["prefix_ms"] for row in rows]
            assert same == expected
            if expected:
                assert {level["chunk"] for level in told} == {15}  # 30 photos in calls of 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "costs.json is no JSON"),
        ("{}", "no costs as pbc train writes them"),
        ('{"levels": [], "decode_ms": 0, "gather_ms": 0, "policy_ms": 0}', "of 0 levels"),
        ('{"levels": [], "decode_ms": -1, "gather_ms": 0, "policy_ms": 0}', "a negative time"),
    ],
)
def test_costs_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(PbcError, match=message):
        Costs.load(path, 3)


def test_costs_that_are_not_there_or_of_another_ladder(tmp_path: Path) -> None:
    with pytest.raises(PbcError, match=r"cannot read .*: No such file"):
        Costs.load(tmp_path / "gone.json", 3)
    with pytest.raises(PbcError, match="the costs are of 3 levels, the bundle has 2"):
        Costs.load(tiny.costs(tmp_path / "costs.json"), 2)
    costs = Costs.load(tmp_path / "costs.json", 3)
    costs.save(tmp_path / "again.json")
    assert Costs.load(tmp_path / "again.json", 3) == costs


# ---- bounds --------------------------------------------------------------------------------

MAP = [[0.5, 17.0], [0.8, 3.0], [0.9, 1.0], [1.0, 0.0]]


def test_the_floor_is_where_the_map_crosses_the_bound() -> None:
    assert floor_for(MAP, 0.5) == pytest.approx(0.95)
    assert floor_for(MAP, 1.0) == pytest.approx(0.9)
    assert floor_for(MAP, 2.0) == pytest.approx(0.85)
    assert floor_for(MAP, 0.0) == 1.0
    assert floor_for(MAP, 100) == 0.0  # the mean of the last level is 0.5


@given(st.floats(0, 20))
def test_what_the_floor_loses_is_within_the_bound(most: float) -> None:
    assert lost_at(MAP, floor_for(MAP, most)) <= most + 1e-6


def test_a_flat_map_lets_everything_through() -> None:
    assert floor_for([[0.9, 0.0], [1.0, 0.0]], 0.5) == pytest.approx(0.8)
    assert floor_for([[1.0, 0.0]], 0.5) == 1.0
    assert lost_at(MAP, 0.1) == 17.0


def test_where_the_policy_tells_samples_apart_the_mean_keeps_the_bound() -> None:
    policy = {"report": {"mixes": [[0.5, 0.93], [0.8, 0.96], [0.9, 0.97]]}}
    manifest = {"accuracy_map": MAP, "policy": policy}
    for most, floor in ((0.5, 0.8), (1.0, 0.5), (0.0, 1.0)):
        assert fidelity_floor(manifest, TrainOptions(max_accuracy_loss=most)) == (floor, None)


def test_an_explicit_floor_wins_and_a_missing_map_is_told() -> None:
    assert fidelity_floor({"accuracy_map": MAP}, TrainOptions(fidelity_floor=0.7)) == (0.7, None)
    floor, note = fidelity_floor({"accuracy_map": MAP}, TrainOptions(max_accuracy_loss=1))
    assert floor == pytest.approx(0.9)
    assert note is None
    for manifest in ({}, {"accuracy_map": None}):
        floor, note = fidelity_floor(manifest, TrainOptions())
        assert floor == DEFAULT_FLOOR
        assert note is not None
        assert "no map from fidelity to accuracy: the fidelity floor is 0.95" in note


def test_a_run_says_that_its_bundle_has_no_map(tmp_path: Path) -> None:
    tiny.photos(tmp_path / "photos", 4)
    events: list[Event] = []
    for accuracy_map, told in ((None, 1), (((0.9, 0.5), (1.0, 0.0)), 0)):
        tiny.write(tmp_path / "m.pbc", accuracy_map=accuracy_map)
        runtime = Runtime.open(tmp_path / "m.pbc")
        samples = ImageFolder.open(tmp_path / "photos", runtime.spec)
        events.clear()
        options = TrainOptions(epochs=1)
        runtime.fit(samples, options, tmp_path / "out", overwrite=True, report=events.append)
        notes = [event.text for event in events if isinstance(event, Note)]
        assert sum("no map" in note for note in notes) == told
