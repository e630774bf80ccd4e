"""Runs that end early: after a time, at an accuracy, when no more comes, or by Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from pbc.cli.display import epoch_line
from pbc.data import ImageFolder
from pbc.errors import UsageError
from pbc.runtime.events import EpochReport, Event, Note, StepReport
from pbc.runtime.growing_model import GrowingModel
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.personal import Personal
from pbc.runtime.runtime import Runtime
from pbc.runtime.stopping import Stop, points_left


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("auto", Stop()),
        ("90s", Stop(seconds=90)),
        ("1.5m", Stop(seconds=90)),
        ("2h", Stop(seconds=7200)),
        ("95%", Stop(accuracy=0.95)),
    ],
)
def test_what_stop_may_be(text: str, stop: Stop) -> None:
    assert Stop.parse(text) == stop


@pytest.mark.parametrize("text", ["", "soon", "0s", "-3m", "101%", "0%", "95", "nans"])
def test_what_stop_may_not_be(text: str) -> None:
    with pytest.raises(UsageError, match=r"cannot stop at .*: expected auto, a time such as 90s"):
        TrainOptions(stop=text)


def test_what_is_left_is_read_off_the_later_half() -> None:
    steep = [(100, 0.5), (200, 0.6), (400, 0.7), (800, 0.8)]
    assert points_left(steep, 1600, 10**9) == pytest.approx(10, abs=0.01)
    assert points_left(steep, 800, 10**9) == pytest.approx(0)
    assert points_left(steep[:3], 1600, 10**9) is None
    flat = [*steep, (1600, 0.8), (3200, 0.8)]
    assert points_left(flat, 6400, 10**9) == pytest.approx(0, abs=0.01)
    assert points_left([*steep, (1600, 0.9), *flat[4:]], 6400, 10**9) == pytest.approx(0, abs=0.01)
    assert Stop().enough(steep, 1600, 0.5, 10**6) is None
    told = Stop().enough(flat, 6400, 0.5, 10**4)
    assert told is not None
    assert "after 3200 of 6400 visits: 80.0% is reached, and what is left would bring" in told
    assert "less than 0.5), as far as 10000 photos can tell" in told
    assert Stop().enough(flat, 3200, 0.5, 10**6) is None  # nothing is left
    assert Stop(accuracy=0.8).enough(steep, 1600, 0.5, 100) is not None
    assert Stop(accuracy=0.9).enough(flat, 6400, 0.5, 100) is None


def test_a_few_photos_cannot_tell_half_a_point() -> None:
    flat = [(100 * epoch, 0.8) for epoch in range(1, 7)]
    assert Stop().enough(flat, 1200, 0.5, 10_000) is not None
    assert Stop().enough(flat, 1200, 0.5, 50) is None
    assert Stop().enough([(visits, 1.0) for visits, _ in flat], 1200, 0.5, 10) is None
    late = [(100 * epoch, 0.8) for epoch in range(1, 12)]
    assert Stop().enough(late, 1101, 0.5, 50) is not None  # whatever it is, it is little


def test_patience_counts_epochs_without_a_better_one() -> None:
    growing = GrowingModel(None, None, 2, 100, 0.5)
    ends = []
    for visited, accuracy in ((1, 0.5), (2, 0.7), (3, 0.6), (4, 0.65)):
        growing._note(visited, accuracy)
        ends.append(growing.reason_to_stop() is not None)
    assert ends == [False, False, False, True]
    assert growing.best_at == 1


class Case:
    """A bundle, and more photos of each colour than a head needs."""

    def __init__(self, root: Path, kind: str = "probe", per_class: int = 40) -> None:
        self.root = root
        tiny.photos(root / "photos", per_class)
        tiny.photos(root / "test", 6, seed=1)
        tiny.write(root / "m.pbc", kind)
        self.costs = tiny.costs(root / "costs.json")
        self.runtime = Runtime.open(root / "m.pbc")
        self.samples = ImageFolder.open(root / "photos", self.runtime.spec)
        self.test = ImageFolder.open(root / "test", self.runtime.spec)
        self.events: list[Event] = []

    def fit(self, out: str, report: Any = None, val: bool = True, **changes: Any) -> None:
        self.events.clear()
        options = TrainOptions(**{"costs": self.costs, "batch": 4, **changes})
        self.runtime.fit(
            self.samples,
            options,
            self.root / out,
            val=self.test if val else None,
            resume=(self.root / out).exists(),
            report=report or self.events.append,
        )

    @property
    def epochs(self) -> list[EpochReport]:
        return [event for event in self.events if isinstance(event, EpochReport)]

    @property
    def reasons(self) -> list[str]:
        notes = (event.text for event in self.events if isinstance(event, Note))
        return [text for text in notes if text.startswith("stopping")]


def test_a_head_in_closed_form_stops_inside_its_visit(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.fit("mine", head="closed", stop="90%")
    (epoch,) = case.epochs
    assert sum(epoch.levels) == 64  # the first head for the time being
    assert (epoch.skipped_samples, epoch.unvisited_samples) == (0, 56)
    assert epoch_line(epoch, 1).endswith("  stopped at 64/120 samples")
    (reason,) = case.reasons
    assert "is reached, at least 90.0% were wanted" in reason
    assert Personal.open(tmp_path / "mine").evaluate(case.test).accuracy >= 0.9
    case.fit("mine", head="closed", stop="90%")  # resumed: it stays stopped
    assert case.epochs == []


def test_epochs_stop_at_an_accuracy_and_by_the_curve(tmp_path: Path) -> None:
    case = Case(tmp_path, per_class=12)
    case.fit("accuracy", head="sgd", epochs=30, learning_rate=0.1, stop="50%")
    assert len(case.epochs) < 30
    case.fit("auto", head="sgd", epochs=30, learning_rate=0.1, stop="auto")
    assert 4 <= len(case.epochs) < 30
    assert "what is left would bring at most" in case.reasons[0]


def test_large_mini_batches_where_features_are_kept(tmp_path: Path) -> None:
    case = Case(tmp_path)
    automatic = TrainOptions(batch="auto").for_bundle(case.runtime.bundle)
    assert automatic.batch == 64
    assert automatic.objective.learning_rate == pytest.approx(0.08)
    adam = TrainOptions(batch="auto", optimizer="adam").for_bundle(case.runtime.bundle)
    assert adam.objective.learning_rate == pytest.approx(0.001 * 8**0.5)
    chosen = TrainOptions(batch="auto", learning_rate=0.3).for_bundle(case.runtime.bundle)
    assert chosen.objective.learning_rate == 0.3
    without = TrainOptions(batch="auto", cache="off").for_bundle(case.runtime.bundle)
    assert (without.batch, without.learning_rate) == (4, None)
    case.fit("mine", head="sgd", epochs=1, batch="auto")
    assert case.epochs[0].steps == 2
    with pytest.raises(UsageError, match="batch is many; it must be at least 1"):
        TrainOptions(batch="many")


def test_a_time_ends_the_run_between_two_steps(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.fit("mine", head="sgd", epochs=1000, stop="0.3s", val=False)
    assert 1 <= len(case.epochs) < 1000
    assert case.reasons[0].startswith("stopping: 0.")
    assert Personal.open(tmp_path / "mine")


def test_patience_keeps_the_best_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    case = Case(tmp_path, per_class=12)
    options: dict[str, Any] = {"head": "sgd", "epochs": 40, "learning_rate": 0.1, "patience": 3,
               "checkpoint_seconds": 0}  # fmt: skip
    case.fit("whole", **options)
    done = len(case.epochs)
    assert 4 <= done < 40
    final = json.loads((tmp_path / "whole" / "model.json").read_text())
    assert final["metrics"]["epochs"] == done

    def stop(event: Event) -> None:
        if isinstance(event, StepReport) and (event.epoch, event.step) == (3, 2):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        case.fit("cut", report=stop, **options)
    case.fit("cut", **options)
    whole, cut = (Personal.open(tmp_path / out) for out in ("whole", "cut"))
    for name, value in whole.executable.parameters().items():
        assert np.array_equal(value, cut.executable.parameters()[name])


def test_an_early_stop_needs_photos_to_judge_by(tmp_path: Path) -> None:
    case = Case(tmp_path, per_class=6)
    wishes: list[dict[str, Any]] = [{"patience": 2}, {"stop": "auto"}, {"stop": "90%"}]
    for changes in wishes:
        with pytest.raises(UsageError, match="need held-out photos"):
            case.fit("mine", head="sgd", val=False, **changes)
    case.fit("closed", head="closed", val=False, stop="auto")  # sums judge themselves


def test_ctrl_c_leaves_a_model_of_the_epochs_so_far(tmp_path: Path) -> None:
    case = Case(tmp_path, per_class=12)

    def interrupt(event: Event) -> None:
        if isinstance(event, StepReport) and (event.epoch, event.step) == (2, 3):
            os.kill(os.getpid(), signal.SIGINT)

    options: dict[str, Any] = {"head": "sgd", "epochs": 4, "learning_rate": 0.1}
    with pytest.raises(KeyboardInterrupt):
        case.fit("cut", report=interrupt, **options)
    model = json.loads((tmp_path / "cut" / "model.json").read_text())
    assert model["metrics"] == {"final": False, "epochs": 1, "visited": 12}
    assert Personal.open(tmp_path / "cut").evaluate(case.test).accuracy > 0.3
    case.fit("cut", **options)
    case.fit("whole", **options)
    read = [(tmp_path / out / "trainable.safetensors").read_bytes() for out in ("cut", "whole")]
    assert read[0] == read[1]
