"""Federated learning drives a trainer by rounds: parameters in, epochs, parameters out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from killing import Killed

from pbc.data import ImageFolder, Samples
from pbc.errors import PbcError, UsageError
from pbc.runtime.engines.sharing import SharedExecutable
from pbc.runtime.events import Event, StepReport
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.personal import Personal
from pbc.runtime.runtime import Runtime
from pbc.runtime.trainer import Trainer

Theta = dict[str, np.ndarray]


class Fleet:
    """A bundle, photos, and trainers in folders of their own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        tiny.photos(root / "photos", 10)
        tiny.write(root / "m.pbc")
        self.costs = tiny.costs(root / "costs.json")
        self.runtime = Runtime.open(root / "m.pbc")
        self.samples = ImageFolder.open(root / "photos", self.runtime.spec)

    def options(self, **changes: Any) -> TrainOptions:
        return TrainOptions(**{"epochs": 3, "learning_rate": 0.1, "costs": self.costs, **changes})

    def trainer(
        self, name: str, samples: Samples | None = None, *, resume: bool = False, **changes: Any
    ) -> Trainer:
        kwargs = {key: changes.pop(key) for key in ("classes", "executable") if key in changes}
        (self.root / name).mkdir(exist_ok=True)
        trainer = self.runtime.trainer(
            samples or self.samples, self.options(**changes), self.root / name, **kwargs
        )
        trainer.prepare(resume=resume)
        return trainer


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def equal(a: Theta, b: Theta) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("options", [{}, {"optimizer": "adam"}, {"scheduler": "piebridge"}])
def test_rounds_of_epochs_are_the_epochs(fleet: Fleet, options: dict[str, Any]) -> None:
    epochs, rounds = fleet.trainer("epochs", **options), fleet.trainer("rounds", **options)
    while not epochs.finished:
        epochs.run_epoch()
    reports = [*rounds.run_round(1), *rounds.run_round(2)]
    assert [report.epoch for report in reports] == [1, 2, 3]
    assert equal(epochs.parameters(), rounds.parameters())


@pytest.mark.parametrize("options", [{}, {"cache": "disk", "augment": 6}, {"time_budget": 1e-9}])
def test_no_total_bounds_the_rounds(fleet: Fleet, options: dict[str, Any]) -> None:
    trainer = fleet.trainer("a", epochs=1, **options)
    losses = [report.loss for _ in range(3) for report in trainer.run_round(2)]
    assert trainer.epoch == len(losses) == 6
    assert losses[-1] < losses[0]
    # Every epoch past the total visits everybody.
    lines = (fleet.root / "a" / "metrics.jsonl").read_text().splitlines()
    assert [sum(json.loads(line)["levels"]) for line in lines] == [30] * 6
    again = fleet.trainer("a", resume=True, epochs=1, **options)
    assert again.epoch == 6
    assert equal(again.parameters(), trainer.parameters())
    again.run_round(1)
    trainer.run_round(1)
    assert equal(again.parameters(), trainer.parameters())


def test_views_past_the_cached_ones_are_computed(fleet: Fleet) -> None:
    """Rows that were never filled must not be read."""
    cached = fleet.trainer("cached", epochs=1, augment=4, cache="ram", routing=False)
    plain = fleet.trainer("plain", epochs=1, augment=4, cache="off", routing=False)
    cached.run_round(3)
    plain.run_round(3)
    for name, value in plain.parameters().items():
        np.testing.assert_allclose(value, cached.parameters()[name], atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_parameters_may_be_set_with_or_without_momentum(fleet: Fleet, optimizer: str) -> None:
    def two_rounds(name: str, *, keep_optimizer: bool | None) -> Theta:
        trainer = fleet.trainer(name, optimizer=optimizer)
        trainer.run_round(1)
        if keep_optimizer is not None:
            trainer.set_parameters(trainer.parameters(), keep_optimizer=keep_optimizer)
        trainer.run_round(1)
        return trainer.parameters()

    untouched = two_rounds("a", keep_optimizer=None)
    assert equal(untouched, two_rounds("b", keep_optimizer=True))
    assert not equal(untouched, two_rounds("c", keep_optimizer=False))


def test_an_epoch_under_way_begins_again_with_new_parameters(fleet: Fleet) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, StepReport) and (event.epoch, event.step) == (2, 4):
            raise Killed

    out = fleet.root / "a"
    out.mkdir()
    options = fleet.options()
    trainer = fleet.runtime.trainer(fleet.samples, options, out, report=interrupt)
    trainer.prepare()
    trainer.run_epoch()
    theta = trainer.parameters()
    with pytest.raises(Killed):
        trainer.run_epoch()
    trainer.set_parameters(theta, keep_optimizer=True)
    assert (trainer.epoch, trainer.step) == (1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda theta: theta.pop("head.bias"), "not the bundle's: only the bundle has 'head.bias'"),
        (lambda theta: theta.update(more=np.zeros(1)), "only the parameters given has 'more'"),
        (
            lambda theta: theta.update({"head.bias": np.zeros((3, 1))}),
            r"'head.bias' has shape \[3, 1\]; expected \[3\]",
        ),
        (
            lambda theta: theta.update({"head.bias": np.full(3, np.nan)}),
            "'head.bias' is not finite",
        ),
    ],
)
def test_parameters_that_are_not_the_bundles(fleet: Fleet, change: Any, message: str) -> None:
    trainer = fleet.trainer("a")
    before = trainer.parameters()
    theta = dict(before)
    change(theta)
    with pytest.raises(PbcError, match=message):
        trainer.set_parameters(theta, keep_optimizer=True)
    assert equal(trainer.parameters(), before)
    with pytest.raises(PbcError, match=message):
        fleet.runtime.personalize(theta, trainer.classes, fleet.root / "personal")


def test_a_round_has_epochs(fleet: Fleet) -> None:
    with pytest.raises(UsageError, match="a round of 0 epochs; it must have at least 1"):
        fleet.trainer("a").run_round(0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_trainers_that_share_an_executable_train_as_if_alone(fleet: Fleet, optimizer: str) -> None:
    seeds = range(3)
    alone = []
    for seed in seeds:
        trainer = fleet.trainer(f"alone-{seed}", seed=seed, optimizer=optimizer)
        for _ in range(3):
            trainer.run_round(1)
        alone.append(trainer.parameters())
    shared = SharedExecutable(fleet.runtime.engine.load(fleet.runtime.bundle))
    trainers = [
        fleet.trainer(
            f"shared-{seed}", seed=seed, optimizer=optimizer, executable=shared.for_trainer()
        )
        for seed in seeds
    ]
    for _ in range(3):
        for trainer in trainers:
            trainer.run_round(1)
    for trainer, theta in zip(trainers, alone, strict=True):
        assert equal(trainer.parameters(), theta)


def test_a_shard_needs_not_every_class(fleet: Fleet) -> None:
    tiny.photos(fleet.root / "shard", 5, classes=["red", "green"])
    shard = ImageFolder.open(fleet.root / "shard", fleet.runtime.spec)
    trainer = fleet.trainer("a", shard, classes=["blue", "green", "red"])
    assert trainer.classes == ("blue", "green", "red")
    trainer.run_round(1)
    assert trainer.parameters()["head.bias"].shape == (3,)
    with pytest.raises(PbcError, match="the model knows no class 'red'"):
        fleet.trainer("b", shard, classes=["blue", "green"])
    with pytest.raises(PbcError, match="a class is named twice among 'green', 'green'"):
        fleet.trainer("c", shard, classes=["green", "green"])


def test_a_bundles_classes_number_the_labels_of_a_shard(fleet: Fleet) -> None:
    tiny.write(fleet.root / "named.pbc", classes=["red", "blue", "green"])
    runtime = Runtime.open(fleet.root / "named.pbc")
    tiny.photos(fleet.root / "one", 5, classes=["green"])
    shard = ImageFolder.open(fleet.root / "one", runtime.spec)
    names = ["blue", "green", "red"]
    trainer = runtime.trainer(shard, fleet.options(), fleet.root / "a", classes=names)
    assert trainer.classes == ("red", "blue", "green")
    wider = runtime.trainer(shard, fleet.options(), fleet.root / "b", classes=[*names, "white"])
    assert wider.classes == (*names, "white")


def test_parameters_become_a_personal_model_in_one_call(fleet: Fleet) -> None:
    trainer = fleet.trainer("a")
    trainer.run_round(3)
    trainer.finish()
    out = fleet.root / "personal"
    fleet.runtime.personalize(trainer.parameters(), trainer.classes, out)
    own, given = (Personal.open(fleet.root / name) for name in ("a", "personal"))
    assert given.classes == own.classes
    assert given.evaluate(fleet.samples) == own.evaluate(fleet.samples)
    with pytest.raises(PbcError, match="holds a run already"):
        fleet.runtime.personalize(trainer.parameters(), trainer.classes, out)


def test_a_client_that_comes_back_decodes_no_photo_whose_features_are_cached(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = fleet.trainer("a", cache="disk", skip=False)
    trainer.run_round(1)
    decoded: list[int] = []
    images = Samples.images

    def counted(self: Samples, indices: np.ndarray) -> np.ndarray:
        decoded.extend(indices.tolist())
        return images(self, indices)

    monkeypatch.setattr(Samples, "images", counted)
    again = fleet.trainer("a", resume=True, cache="disk", skip=False)
    again.run_round(1)
    assert not decoded
    trainer.run_round(1)
    assert equal(again.parameters(), trainer.parameters())
