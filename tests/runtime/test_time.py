"""A run's clock: every second is charged once, whatever drives the loop; a clock of ticks tells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from killing import Killed

from pbc.data import ImageFolder
from pbc.runtime import meter
from pbc.runtime.events import Event, StepReport
from pbc.runtime.meter import Meter
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.checkpoint import Checkpoint
from pbc.runtime.runtime import Runtime


@pytest.fixture(autouse=True)
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a second pass whenever somebody looks at the clock."""
    seen = [0]

    def look() -> float:
        seen[0] += 1
        return float(seen[0])

    monkeypatch.setattr(meter, "perf_counter", look)
    return seen


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    tiny.write(tmp_path / "m.pbc")
    tiny.photos(tmp_path / "photos", 10)
    return Runtime.open(tmp_path / "m.pbc")


def test_what_is_measured_apart_loses_no_second_before_it() -> None:
    clock = Meter()
    clock.restart()
    with clock.only("measure"):
        clock.lap("prefix")
        clock.lap("forward")
    clock.lap("decode")
    assert {name: seconds for name, seconds in clock.seconds.items() if seconds} == {
        "bookkeeping": 1,
        "measure": 3,
        "decode": 1,
    }


@pytest.mark.parametrize("scheduler", ["cost-model", "piebridge"])
def test_every_second_of_preparation_and_loop_is_charged_once(
    runtime: Runtime, tmp_path: Path, ticks: list[int], scheduler: str
) -> None:
    samples = ImageFolder.open(tmp_path / "photos", runtime.spec)
    options = TrainOptions(epochs=2, scheduler=scheduler, costs=tiny.costs(tmp_path / "costs.json"))
    (tmp_path / "out").mkdir()
    trainer = runtime.trainer(samples, options, tmp_path / "out")
    begun = ticks[0] + 2  # the restart looks at the clock once
    trainer.prepare()
    # Until here, all is charged; what passes now, between the calls, is the caller's.
    assert sum(trainer.stage_seconds.values()) == ticks[0] - begun + 1
    ticks[0] += 1000
    first = trainer.run_epoch()
    ticks[0] += 1000
    begun = ticks[0] + 1
    second = trainer.run_epoch()
    assert first.seconds < 1000
    assert second.seconds == ticks[0] - begun
    assert second.stage_seconds["forward"] == second.steps
    assert second.stage_seconds["backward"] == second.steps - second.skipped_updates


def test_a_stream_is_charged_as_an_epoch_is(
    runtime: Runtime, tmp_path: Path, ticks: list[int]
) -> None:
    options = TrainOptions(scheduler="piebridge", alpha=2.0)
    pixels = np.zeros((20, 24, 3), np.uint8)
    begun = 0

    def pairs() -> object:
        nonlocal begun
        begun = ticks[0]
        for at in range(120):
            yield pixels, at % 3

    report = runtime.fit_stream(pairs(), ["a", "b", "c"], options, tmp_path / "out")  # type: ignore[arg-type]
    assert report.seconds == ticks[0] - begun
    assert report.skipped_updates > 0
    assert report.stage_seconds["forward"] == report.steps == 30
    assert report.stage_seconds["backward"] == report.steps - report.skipped_updates


def test_a_resumed_epoch_counts_whole_for_the_time_budget(runtime: Runtime, tmp_path: Path) -> None:
    """What is left of an epoch after a kill is no measure of the next one."""
    samples = ImageFolder.open(tmp_path / "photos", runtime.spec)
    costs = tiny.costs(tmp_path / "costs.json")

    def fit(out: str, budget: float, dies_at: int | None = None) -> None:
        def watch(event: Event) -> None:
            if isinstance(event, StepReport) and (event.epoch, event.step) == (1, dies_at):
                raise Killed

        options = TrainOptions(
            epochs=3, batch=1, skip=False, checkpoint_seconds=0.0, costs=costs, time_budget=budget
        )
        runtime.fit(samples, options, tmp_path / out, resume=True, report=watch)

    def epochs(out: str) -> list[dict[str, float]]:
        lines = map(json.loads, (tmp_path / out / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if "epoch" in line]

    fit("whole", 1e9)
    first, second, _ = (line["seconds"] for line in epochs("whole"))
    budget = first + 0.9 * second
    fit("short", budget)
    assert len(epochs("short")) == 1
    with pytest.raises(Killed):
        fit("killed", budget, dies_at=30)
    checkpoint = Checkpoint.load(tmp_path / "killed" / "checkpoint.safetensors")
    assert checkpoint.facts["totals"]["iterating_seconds"] > 0.8 * second
    fit("killed", budget)
    assert len(epochs("killed")) == 1
