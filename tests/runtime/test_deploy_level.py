"""The level that a personal model runs at: trained there, chosen there, and used by everyone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import tiny
from test_stream import CLASSES, frames

from pbc.cli import main
from pbc.data import ImageFolder
from pbc.errors import PbcError, UsageError
from pbc.runtime.evaluation import Evaluation
from pbc.runtime.events import EpochReport, Event, Note
from pbc.runtime.level_trial import LevelTrial, Tried
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.personal import Personal
from pbc.runtime.runtime import Runtime


class Case:
    """A bundle whose cheapest level was never aligned, photos to train and test on."""

    def __init__(self, root: Path, kind: str = "probe") -> None:
        self.root = root
        tiny.photos(root / "photos", 12)
        tiny.photos(root / "test", 6, seed=1)
        tiny.write(root / "m.pbc", kind, fidelities=(0.97, None))
        self.costs = tiny.costs(root / "costs.json")
        self.runtime = Runtime.open(root / "m.pbc")
        self.samples = ImageFolder.open(root / "photos", self.runtime.spec)
        self.test = ImageFolder.open(root / "test", self.runtime.spec)

    def fit(self, out: str, level: int | str, **changes: Any) -> list[Event]:
        events: list[Event] = []
        options = TrainOptions(**{"costs": self.costs, "deploy_level": level, **changes})
        arguments = (self.samples, options, self.root / out)
        self.runtime.fit(*arguments, val=self.test, report=events.append)
        return events

    def command(self, *words: str, fails: int = 0) -> click.testing.Result:
        result = click.testing.CliRunner().invoke(main, list(words))
        assert result.exit_code == fails, result.output
        return result


@pytest.mark.parametrize(
    ("kind", "head", "scheduler"),
    [
        ("probe", "auto", "cost-model"),
        ("bodies", "sgd", "cost-model"),
        ("whole", "auto", "cost-model"),
        ("bodies", "sgd", "piebridge"),
    ],
)
def test_all_photos_are_learnt_from_at_the_level_that_is_deployed(
    tmp_path: Path, kind: str, head: str, scheduler: str
) -> None:
    case = Case(tmp_path, kind)
    events = case.fit("mine", 2, head=head, epochs=2, scheduler=scheduler)
    reports = [event for event in events if isinstance(event, EpochReport)]
    assert all(sum(report.levels) == report.levels[2] > 0 for report in reports)
    assert not [event for event in events if isinstance(event, Note) and "level 0" in event.text]
    personal = Personal.open(tmp_path / "mine")
    assert personal.level == 2
    assert personal.evaluate(case.test) == personal.evaluate(case.test, level=2)
    validation = json.loads((tmp_path / "mine" / "validation.json").read_text())
    assert validation["accuracy"] == personal.evaluate(case.test).accuracy


def test_commands_follow_the_model(tmp_path: Path) -> None:
    case = Case(tmp_path)
    words = ["train", *(str(tmp_path / name) for name in ("m.pbc", "photos"))]
    mine = str(tmp_path / "mine")
    case.command(*words, "-o", mine, "--deploy-level", "1", "--costs", str(case.costs))
    test = str(tmp_path / "test")
    shown = case.command("eval", mine, test).stdout
    assert "at level 1" in shown
    assert shown == case.command("eval", mine, test, "--level", "1").stdout
    assert json.loads(case.command("eval", mine, test, "--json").stdout)["level"] == 1
    by_default = case.command("predict", mine, test, "--json").stdout
    assert by_default == case.command("predict", mine, test, "--json", "--level", "1").stdout
    assert by_default != case.command("predict", mine, test, "--json", "--level", "0").stdout


def test_a_stream_is_learnt_from_at_the_level_too(tmp_path: Path) -> None:
    case = Case(tmp_path)
    options = TrainOptions(costs=case.costs, head="auto", deploy_level=1)
    report = case.runtime.fit_stream(frames(100), CLASSES, options, tmp_path / "mine")
    assert report.levels == (0, 100, 0)
    assert Personal.open(tmp_path / "mine").level == 1


@pytest.mark.parametrize(("kind", "head"), [("probe", "auto"), ("whole", "sgd")])
def test_auto_tries_every_level_with_a_head_of_its_own(
    tmp_path: Path, kind: str, head: str
) -> None:
    case = Case(tmp_path, kind)
    events = case.fit("auto", "auto", head=head, epochs=2)
    (told,) = (e.text for e in events if isinstance(e, Note) and "is deployed" in e.text)
    model = json.loads((tmp_path / "auto" / "model.json").read_text())
    assert [row["level"] for row in model["levels"]] == [0, 1, 2]
    assert told.startswith(f"level {model['level']} is deployed: level 0 ")
    accuracies = [row["accuracy"] for row in model["levels"]]
    assert model["level"] == max(k for k in range(3) if accuracies[0] - accuracies[k] <= 0.005)
    found = Personal.open(tmp_path / "auto").evaluate(case.test)
    assert found.accuracy == accuracies[model["level"]]
    if kind == "probe":  # what a run at the level itself makes
        case.fit("fixed", 2, head=head)
        wanted, got = (Personal.open(tmp_path / out) for out in ("fixed", "auto"))
        assert got.level == 2
        assert wanted.evaluate(case.test).accuracy == found.accuracy


def test_level_0_is_tried_with_a_head_of_its_own_too(tmp_path: Path) -> None:
    case = Case(tmp_path)
    options = TrainOptions(costs=case.costs, deploy_level="auto")
    trainer = case.runtime.trainer(case.samples, options, tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    trainer.prepare()
    stray = {name: -np.abs(value) for name, value in trainer.parameters().items()}
    trial = LevelTrial(trainer._context(), trainer._run, case.test, stray)
    tried = trial()
    assert [one.result.accuracy for one in tried] == [1, 1, 1]
    assert not np.array_equal(tried[0].theta["head.weight"], stray["head.weight"])


def test_the_cheapest_level_within_the_bound_is_chosen(tmp_path: Path) -> None:
    case = Case(tmp_path)
    options = TrainOptions(costs=case.costs, deploy_level="auto", max_accuracy_loss=1.0)
    trainer = case.runtime.trainer(case.samples, options, tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    trainer.prepare()
    trial = LevelTrial(trainer._context(), trainer._run, case.test, {})
    nothing = np.empty(0)

    def tried(*accuracies: float) -> list[Tried]:
        return [
            Tried(level, {}, Evaluation(accuracy, 0.0, 100, nothing, nothing, 1.0))
            for level, accuracy in enumerate(accuracies)
        ]

    assert trial.cheapest(tried(0.9, 0.9, 0.89)).level == 2
    assert trial.cheapest(tried(0.9, 0.9, 0.88)).level == 1
    assert trial.cheapest(tried(0.9, 0.88, 0.95)).level == 2
    assert trial.cheapest(tried(0.9, 0.5, 0.5)).level == 0


def test_auto_without_held_out_photos_stays_at_level_0(tmp_path: Path) -> None:
    case = Case(tmp_path)
    events: list[Event] = []
    options = TrainOptions(costs=case.costs, deploy_level="auto")
    case.runtime.fit(case.samples, options, tmp_path / "mine", report=events.append)
    assert any("no photos are held out" in e.text for e in events if isinstance(e, Note))
    assert Personal.open(tmp_path / "mine").level == 0


def test_levels_that_cannot_be(tmp_path: Path) -> None:
    case = Case(tmp_path)
    with pytest.raises(UsageError, match="no level 3; this model has levels 0 to 2"):
        case.fit("mine", 3)
    with pytest.raises(UsageError, match="the level to deploy is -1; it must be a number"):
        TrainOptions(deploy_level=-1)
    words = ["train", "m.pbc", "photos", "-o", "mine", "--deploy-level", "cheap"]
    assert "'cheap' is no level" in case.command(*words, fails=2).stderr
    case.fit("fine", 1)
    path = tmp_path / "fine" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "level": 9}))
    with pytest.raises(PbcError, match="is damaged: no level 9"):
        Personal.open(tmp_path / "fine")
