"""Runs whose head is made in closed form: one visit, or a start for the epochs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_stream import CLASSES, frames

from pbc.cli.display import epoch_line
from pbc.data import ImageFolder
from pbc.errors import UsageError
from pbc.runtime import closed_head
from pbc.runtime.closed_head import stratified
from pbc.runtime.evaluation import KeptFeatures
from pbc.runtime.events import EpochReport, Event, Note, Plan, SoFar, StepReport
from pbc.runtime.head_inputs import HeadInputs
from pbc.runtime.objective import Objective
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.metrics import Metrics
from pbc.runtime.output.personal import Personal
from pbc.runtime.parameters import initial_parameters
from pbc.runtime.runtime import Runtime
from pbc.runtime.schedulers import Batch


class Case:
    """A bundle of a kind, photos to train and test on."""

    def __init__(self, root: Path, kind: str = "probe", per_class: int = 10) -> None:
        self.root = root
        tiny.photos(root / "photos", per_class)
        tiny.photos(root / "test", 6, seed=1)
        tiny.write(root / "m.pbc", kind)
        self.costs = tiny.costs(root / "costs.json")
        self.runtime = Runtime.open(root / "m.pbc")
        self.samples = ImageFolder.open(root / "photos", self.runtime.spec)
        self.test = ImageFolder.open(root / "test", self.runtime.spec)

    def options(self, **changes: Any) -> TrainOptions:
        return TrainOptions(**{"costs": self.costs, "head": "closed", "batch": 4, **changes})

    def fit(self, out: str, **changes: Any) -> list[Event]:
        events: list[Event] = []
        self.runtime.fit(
            self.samples, self.options(**changes), self.root / out, report=events.append
        )
        return events

    def accuracy(self, out: str) -> float:
        return Personal.open(self.root / out).evaluate(self.test).accuracy


def theta(root: Path) -> bytes:
    return (root / "trainable.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["probe", "maps", "bodies", "whole"])
def test_what_the_head_reads_is_found_by_trying(tmp_path: Path, kind: str) -> None:
    case = Case(tmp_path, kind)
    bundle = case.runtime.bundle
    executable = case.runtime.engine.load(bundle, threads=1)
    parameters = initial_parameters(bundle, 3, 0)
    inputs = HeadInputs.find(bundle, executable, parameters)
    assert inputs is not None
    assert inputs.direct is (kind == "probe")
    assert inputs.width == tiny.CHANNELS
    features = executable.prefix(0, case.samples.images(np.arange(5)))
    rows = inputs(0, features)
    executable.start(parameters, Objective())
    weight, bias = (parameters[f"head.{name}"] for name in ("weight", "bias"))
    np.testing.assert_allclose(
        rows @ weight.T + bias, executable.logits(0, features), rtol=1e-4, atol=1e-5
    )


def test_one_visit_replaces_the_epochs_of_a_linear_probe(tmp_path: Path) -> None:
    case = Case(tmp_path)
    events = case.fit("mine")
    assert [event.epochs for event in events if isinstance(event, Plan)] == [1]
    (epoch,) = (event for event in events if isinstance(event, EpochReport))
    assert sum(epoch.levels) == len(case.samples)
    assert epoch.loss < 0.5
    assert any("head in closed form" in event.text for event in events if isinstance(event, Note))
    assert case.accuracy("mine") == 1
    final = json.loads((tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["head"]["judged"] == len(case.samples)


@pytest.mark.parametrize("per_class", [1, 3])
@pytest.mark.parametrize("kind", ["probe", "whole"])
def test_few_photos_make_a_head_that_nothing_judges(
    tmp_path: Path, kind: str, per_class: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_head, "_FIRST", 1)
    case = Case(tmp_path, kind, per_class)
    stop = "90%" if kind == "probe" else None
    options = case.options(checkpoint_seconds=0, stop=stop, epochs=2, batch=1)
    events: list[Event] = []

    def cut(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepReport) and event.step == 3 * per_class:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        case.runtime.fit(case.samples, options, tmp_path / "mine", report=cut)
    case.runtime.fit(case.samples, options, tmp_path / "mine", resume=True, report=events.append)
    final = json.loads((tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["head"]["left_out_accuracy"] is final["head"]["left_out_loss"] is None
    assert final["head"]["judged"] == 0
    if kind == "probe":
        told = [event.text for event in events if isinstance(event, Note)]
        assert not any("leave-one-out on" in text or "stopping" in text for text in told)
        assert any("not judged: leave-one-out takes 20 photos of classes" in text for text in told)
        (epoch,) = (event for event in events if isinstance(event, EpochReport))
        assert "loss" not in epoch_line(epoch, 1)
        (line,) = Metrics(tmp_path / "mine" / "metrics.jsonl").epochs()
        assert line["loss"] is None


def test_elsewhere_it_starts_the_epochs(tmp_path: Path) -> None:
    case = Case(tmp_path, "whole")
    options = {"epochs": 2, "learning_rate": 0.01}
    closed = [e for e in case.fit("closed", **options) if isinstance(e, EpochReport)]
    plain = [e for e in case.fit("sgd", head="sgd", **options) if isinstance(e, EpochReport)]
    assert len(closed) == len(plain) == 2
    assert closed[0].loss < plain[0].loss
    assert case.accuracy("closed") >= case.accuracy("sgd")


def test_a_start_is_no_steeper_than_steps_bear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, "whole")
    steep: list[float] = []
    use = closed_head.ClosedHead.use

    def watch(self: closed_head.ClosedHead, theta: Mapping[str, np.ndarray]) -> None:
        steep.append(float(np.linalg.norm(theta["head.weight"], 2)))
        use(self, theta)

    monkeypatch.setattr(closed_head.ClosedHead, "use", watch)
    case.fit("whole", epochs=1)
    assert steep == [pytest.approx(0.5)]
    case = Case(tmp_path / "probe")  # nothing trains by steps: as steep as the photos say
    case.fit("probe")
    assert steep[-1] > 2.5


def test_few_photos_a_class_are_left_to_sgd(tmp_path: Path) -> None:
    case = Case(tmp_path, per_class=3)
    plain = case.fit("sgd", head="sgd", epochs=2)
    automatic = case.fit("auto", head="auto", epochs=2)
    assert len([e for e in automatic if isinstance(e, EpochReport)]) == 2
    assert theta(tmp_path / "auto") == theta(tmp_path / "sgd")
    assert len(plain) == len(automatic)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("stopped_at", [1, 4, 6])
def test_an_interrupted_visit_ends_at_the_same_bits(
    tmp_path: Path, views: int, stopped_at: int
) -> None:
    case = Case(tmp_path)
    options = case.options(augment=views, checkpoint_seconds=0)
    whole = case.runtime.trainer(case.samples, options, tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    whole.prepare()
    while not whole.finished:
        whole.run_epoch()
    (tmp_path / "parts").mkdir()

    def stop(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == stopped_at:
            raise KeyboardInterrupt

    cut = case.runtime.trainer(case.samples, options, tmp_path / "parts", report=stop)
    cut.prepare()
    with pytest.raises(KeyboardInterrupt):
        cut.run_epoch()
    again = case.runtime.trainer(case.samples, options, tmp_path / "parts")
    again.prepare(resume=True)
    while not again.finished:
        again.run_epoch()
    assert whole.epoch == again.epoch == views
    for name, value in whole.parameters().items():
        assert np.array_equal(value, again.parameters()[name])


@pytest.mark.parametrize("kind", ["probe", "maps"])
def test_a_stream_is_summed_up(tmp_path: Path, kind: str) -> None:
    tiny.write(tmp_path / "m.pbc", kind)
    case = Case(tmp_path / "case")
    runtime = Runtime.open(tmp_path / "m.pbc")
    costs = tiny.costs(tmp_path / "costs.json")
    for head in ("closed", "auto"):
        options = TrainOptions(costs=costs, head=head)
        report = runtime.fit_stream(frames(200), CLASSES, options, tmp_path / head)
        assert sum(report.levels) == 200
    assert theta(tmp_path / "closed") == theta(tmp_path / "auto")
    assert Personal.open(tmp_path / "auto").evaluate(case.test).accuracy == 1


def test_rounds_are_refused_a_closed_form(tmp_path: Path) -> None:
    case = Case(tmp_path)
    trainer = case.runtime.trainer(case.samples, case.options(), tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    trainer.prepare()
    with pytest.raises(UsageError, match="rounds train by steps"):
        trainer.run_round(1)
    with pytest.raises(UsageError, match="rounds train by steps"):
        trainer.set_parameters(trainer.parameters(), keep_optimizer=False)


def test_a_stream_of_bodies_that_train_is_refused_a_closed_form(tmp_path: Path) -> None:
    case = Case(tmp_path, "whole")
    with pytest.raises(UsageError, match=r"no closed form: with .* more trains than the head"):
        case.runtime.fit_stream(frames(40), CLASSES, case.options(), tmp_path / "mine")


def test_a_head_that_is_unknown_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no head named 'lda'"):
        TrainOptions(head="lda")


# ---- a model at any moment -------------------------------------------------------------------


def test_ctrl_c_leaves_a_model_that_works_and_resuming_ends_at_the_same_bits(
    tmp_path: Path,
) -> None:
    case = Case(tmp_path)
    case.fit("whole")

    def interrupt(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    arguments = (case.samples, case.options(), tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        case.runtime.fit(*arguments, val=case.test, report=interrupt)
    assert case.accuracy("cut") > 0.8
    model = json.loads((tmp_path / "cut" / "model.json").read_text())
    assert model["metrics"] == {"final": False, "epochs": 0, "visited": 16}
    case.runtime.fit(*arguments, val=case.test, resume=True)
    assert theta(tmp_path / "cut") == theta(tmp_path / "whole")
    model = json.loads((tmp_path / "cut" / "model.json").read_text())
    assert model["metrics"]["final"] is True


def test_a_model_grows_while_photos_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_head, "PAUSE_SECONDS", 0.0)
    case = Case(tmp_path, per_class=40)
    seen: list[str] = []
    stored: list[bytes] = []

    def watch(event: Event) -> None:
        if isinstance(event, Note) and event.text.startswith("after"):
            seen.append(event.text)
        if isinstance(event, StepReport) and (tmp_path / "mine" / "model.json").exists():
            stored.append(theta(tmp_path / "mine"))

    case.runtime.fit(case.samples, case.options(), tmp_path / "mine", val=case.test, report=watch)
    assert [text.partition(":")[0] for text in seen] == [
        "after 64 of 120 photos",
        "after 104 of 120 photos",
    ]
    assert all("on the held-out photos" in text for text in seen)
    assert len(set(stored)) == len(seen)
    assert theta(tmp_path / "mine") not in stored  # the last one is of all photos


def test_views_of_photos_are_counted_through_all_visits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_head, "PAUSE_SECONDS", 0.0)
    case = Case(tmp_path, per_class=40)
    events: list[Event] = []
    options = case.options(augment=2, epochs=9)
    case.runtime.fit(case.samples, options, tmp_path / "mine", report=events.append)
    seen = [event.text.partition(":")[0] for event in events if isinstance(event, SoFar)]
    assert seen == [f"after {count} of 240 views" for count in (64, 104, 124, 164)]


def test_views_of_a_photo_do_not_judge_each_other(tmp_path: Path) -> None:
    case = Case(tmp_path)
    events = case.fit("whole", augment=3)
    told = [event.text for event in events if isinstance(event, Note) and "shrink" in event.text]
    assert len(told) == 3
    assert len(set(told)) == 1
    assert told[0].endswith("by leave-one-out on 30 photos")

    def cut(event: Event) -> None:
        if isinstance(event, StepReport) and (event.epoch, event.step) == (2, 3):
            raise RuntimeError

    options = case.options(augment=3, checkpoint_seconds=0)
    with pytest.raises(RuntimeError):
        case.runtime.fit(case.samples, options, tmp_path / "cut", report=cut)
    case.runtime.fit(case.samples, options, tmp_path / "cut", resume=True)
    assert theta(tmp_path / "cut") == theta(tmp_path / "whole")


def test_patience_is_of_epochs_not_of_heads_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_head, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(KeptFeatures, "accuracy", lambda *_: 0.5)
    case = Case(tmp_path, per_class=80)
    events: list[Event] = []
    case.runtime.fit(
        case.samples,
        case.options(patience=1),
        tmp_path / "mine",
        val=case.test,
        report=events.append,
    )
    (epoch,) = [event for event in events if isinstance(event, EpochReport)]
    assert sum(epoch.levels) == 240


@pytest.mark.parametrize("end", ["stopping", "head in closed form", "Ctrl-C"])
def test_a_run_that_stops_early_does_so_wherever_it_was_cut(tmp_path: Path, end: str) -> None:
    case = Case(tmp_path, per_class=40)
    options = case.options(stop="90%", checkpoint_seconds=0)
    case.runtime.fit(case.samples, options, tmp_path / "whole", val=case.test)

    def cut(event: Event) -> None:
        if end == "Ctrl-C" and isinstance(event, StepReport) and event.step == 16:
            os.kill(os.getpid(), signal.SIGINT)  # while the head that ends the run is judged
        if isinstance(event, Note) and event.text.startswith(end):
            raise RuntimeError

    with suppress(RuntimeError, KeyboardInterrupt):
        case.runtime.fit(case.samples, options, tmp_path / "cut", val=case.test, report=cut)
    case.runtime.fit(case.samples, options, tmp_path / "cut", val=case.test, resume=True)
    assert theta(tmp_path / "cut") == theta(tmp_path / "whole")
    facts = [json.loads((tmp_path / out / "model.json").read_text()) for out in ("cut", "whole")]
    assert facts[0] == facts[1]


@pytest.mark.parametrize("kind", ["probe", "bodies"])
def test_how_the_head_was_found_is_told_after_a_kill_at_the_end(tmp_path: Path, kind: str) -> None:
    case = Case(tmp_path, kind)
    case.fit("mine", epochs=2)
    told = json.loads((tmp_path / "mine" / "model.json").read_text())
    (tmp_path / "mine" / "model.json").unlink()
    case.runtime.fit(case.samples, case.options(epochs=2), tmp_path / "mine", resume=True)
    assert json.loads((tmp_path / "mine" / "model.json").read_text()) == told
    assert told["metrics"]["head"]["judged"] == 30


def test_every_class_comes_evenly() -> None:
    labels = np.repeat([0, 1, 2], [40, 40, 4])
    order = np.random.default_rng(0).permutation(84)
    batches = [Batch(0, part) for part in np.split(order, range(8, 84, 8))]
    spread = stratified(batches, labels)
    assert [len(batch.samples) for batch in spread] == [len(batch.samples) for batch in batches]
    visited = np.concatenate([batch.samples for batch in spread])
    assert sorted(visited.tolist()) == list(range(84))
    for half in (visited[:42], visited[42:]):
        assert np.bincount(labels[half]).tolist() == [20, 20, 2]
    mixed = [Batch(0, order[:4]), Batch(1, order[4:8])]
    assert stratified(mixed, labels) == mixed
