"""Odd data, odd caches, full disks: training ends in a model, or says in one line why not."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from pbc import bundle
from pbc.data import ImageFolder
from pbc.errors import PbcError
from pbc.runtime.events import EpochReport, Event, Note
from pbc.runtime.features import cache as feature_cache
from pbc.runtime.features.stores import DiskStore
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.personal import Personal
from pbc.runtime.runtime import Runtime

SCHEDULERS = ("cost-model", "piebridge")
KINDS = ("probe", "maps", "bodies", "whole")


class Fit:
    """Train in one folder, as often as a test likes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: list[str] = []
        self.epochs: list[EpochReport] = []

    def __call__(self, out: str = "out", *, data: str = "photos", **options: Any) -> bytes:
        """Return the bytes of the trained parameters."""
        runtime = Runtime.open(self.root / "m.pbc")
        samples = ImageFolder.open(self.root / data, runtime.spec)
        levels = len(runtime.bundle.manifest["levels"])
        costs = tiny.costs(self.root / "costs.json", levels)
        settings = TrainOptions(**{"epochs": 3, "learning_rate": 0.1, "costs": costs, **options})
        self.notes.clear()
        self.epochs.clear()
        runtime.fit(samples, settings, self.root / out, overwrite=True, report=self._take)
        assert Personal.open(self.root / out).evaluate(samples).count == len(samples)
        return (self.root / out / "trainable.safetensors").read_bytes()

    def _take(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event.text)
        elif isinstance(event, EpochReport):
            self.epochs.append(event)


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    tiny.photos(tmp_path / "photos", 7)
    tiny.write(tmp_path / "m.pbc")
    return Fit(tmp_path)


# ---- data ----------------------------------------------------------------------------------


def test_one_class_only(fit: Fit) -> None:
    tiny.photos(fit.root / "one", 5, classes=["red"])
    with pytest.raises(PbcError, match="the data has one class, 'red'; two are the least"):
        fit(data="one")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("cache", ["off", "ram", "disk"])
def test_fewer_samples_than_a_batch(fit: Fit, scheduler: str, cache: str) -> None:
    tiny.photos(fit.root / "few", 1)
    fit(data="few", batch=8, scheduler=scheduler, cache=cache)
    assert [sum(epoch.levels) for epoch in fit.epochs] == [3, 3, 3]
    assert [epoch.steps for epoch in fit.epochs] == [1, 1, 1]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", KINDS)
def test_more_levels_than_samples(fit: Fit, kind: str, scheduler: str) -> None:
    tiny.write(fit.root / "m.pbc", kind, fidelities=np.linspace(0.99, 0.91, 4).tolist())
    tiny.photos(fit.root / "few", 1)
    fit(data="few", scheduler=scheduler, cache="off")
    assert sum(fit.epochs[0].levels) == 3
    assert len(fit.epochs[0].levels) == 5


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_all_samples_at_one_level(fit: Fit, kind: str, scheduler: str, level: int) -> None:
    fidelities: Sequence[float | None] = [(None, None), (0.95, None), (0.95, 0.95)][level]
    tiny.write(fit.root / "m.pbc", kind, fidelities=fidelities, promised=True)
    fit(scheduler=scheduler, skip=False)
    visits = [0, 0, 0]
    visits[level] = 21
    assert [list(epoch.levels) for epoch in fit.epochs] == [visits] * 3


@pytest.mark.parametrize("cache", ["off", "ram", "disk"])
def test_duplicated_images(fit: Fit, cache: str) -> None:
    for name in ("red", "blue"):  # the same photos, once with a label that contradicts
        shutil.copytree(fit.root / "photos" / "red", fit.root / "twice" / name)
    shutil.copy(fit.root / "photos/red/000.png", fit.root / "twice/red/again.png")
    shutil.copytree(fit.root / "photos" / "green", fit.root / "twice" / "green")
    first = fit(data="twice", cache=cache)
    assert sum(fit.epochs[0].levels) == 22
    assert fit(data="twice", cache=cache) == first


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_batches_and_chunks_larger_than_the_set(fit: Fit, scheduler: str) -> None:
    fit(batch=500, prefix_batch=1000, scheduler=scheduler)
    assert [epoch.steps for epoch in fit.epochs] == [1, 1, 1]


def test_a_prefix_batch_smaller_than_the_batch(fit: Fit) -> None:
    fit(batch=4, prefix_batch=1, cache="off")
    assert sum(fit.epochs[0].levels) == 21


def test_one_epoch_visits_everything(fit: Fit) -> None:
    fit(epochs=1)
    assert fit.epochs[0].skipped_samples == 0


# ---- budgets -------------------------------------------------------------------------------


def test_a_time_budget_stops_in_time_and_finishes_properly(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(epochs=50, time_budget=1e-3, skip=False, routing=False, cache="off")
    assert len(fit.epochs) == 1
    assert "the time budget is enough for 1 of 50 epochs" in fit.notes
    # The estimate promises 50 epochs; the clock says otherwise.
    costs = tiny.costs(fit.root / "fast.json")
    costs.write_text(costs.read_text().replace("0.1", "0.0001").replace("0.01", "0.00001"))
    for name in ('"prefix_ms": 1.0', '"prefix_ms": 0.8', '"prefix_ms": 0.6'):
        costs.write_text(costs.read_text().replace(name, '"prefix_ms": 0.00001'))
    fit(epochs=5000, time_budget=0.15, costs=costs)
    assert 1 <= len(fit.epochs) < 5000
    done = len(fit.epochs)
    assert any(f"stopping after {done} of 5000 epochs: another would" in n for n in fit.notes)
    # And a resumed run that is out of time stays as it is.
    before = (fit.root / "out" / "trainable.safetensors").read_bytes()
    runtime = Runtime.open(fit.root / "m.pbc")
    samples = ImageFolder.open(fit.root / "photos", runtime.spec)
    options = TrainOptions(5000, 0.1, time_budget=0.15, costs=costs)
    runtime.fit(samples, options, fit.root / "out", resume=True)
    assert (fit.root / "out" / "trainable.safetensors").read_bytes() == before


def test_a_time_budget_uses_levels_below_the_floor_and_says_what_they_lose(fit: Fit) -> None:
    tiny.write(
        fit.root / "m.pbc",
        fidelities=(0.95, 0.7),
        promised=True,
        accuracy_map=((0.6, 8.0), (0.7, 4.0), (0.9, 0.5), (1.0, 0.0)),
    )
    options: dict[str, Any] = {"epochs": 12, "cache": "off", "skip": False}
    fit(**options)
    assert fit.epochs[0].levels == (0, 21, 0)
    # 21 samples, 12 epochs, 0.81 ms at level 2 and 1.01 ms at level 1.
    fit(**options, time_budget=0.22)
    assert fit.epochs[0].levels == (0, 0, 21)
    assert fit.notes[0] == (
        "the time budget needs levels of fidelity 0.7, below the floor: "
        "a loss of 4.0 points of accuracy is predicted"
    )
    # A floor that was asked for is not negotiable.
    fit(**options, time_budget=0.22, fidelity_floor=0.9)
    assert fit.epochs[0].levels == (0, 21, 0)


# ---- caches --------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["probe", "maps", "bodies"])
def test_a_cache_smaller_than_one_batch(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, kind: str, scheduler: str
) -> None:
    def two(rows: int, capacity: int, seed: int) -> np.ndarray:
        slots = np.full(rows, -1)
        slots[[3, 17]] = 0, 1
        return slots

    tiny.write(fit.root / "m.pbc", kind)
    monkeypatch.setattr(feature_cache, "assign_slots", two)
    trained = {
        cache: fit(cache, cache=cache, scheduler=scheduler, skip=False) for cache in ("ram", "disk")
    }
    assert trained["ram"] == trained["disk"]
    assert fit.epochs[1].stage_seconds["prefix"] > 0


def other_bundle(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["model"] = "another"  # the same graphs and weights


def other_preprocessing(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["input"] = {**manifest["input"], "mean": [0.4, 0.4, 0.4]}


def other_weights(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    for level in range(3):
        name = tiny.WEIGHTS.format(level)
        files[name] = files[tiny.WEIGHTS.format((level + 1) % 3)]


def other_precision(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    for level in manifest["levels"]:
        level["precision"] = "bfloat16"


def other_resolution(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    for level in manifest["levels"]:
        level["resolution"] = [8, 8]


@pytest.mark.parametrize(
    "change",
    [other_bundle, other_preprocessing, other_weights, other_precision, other_resolution],
)
def test_a_cache_of_something_else_is_not_used(
    fit: Fit, change: Callable[[dict[str, Any], dict[str, bytes]], None]
) -> None:
    """Starting again removes what was kept, whatever else may stay the same."""
    fit(cache="disk")
    assert fit.epochs[0].stage_seconds["prefix"] > 0
    manifest, files = tiny.contents()
    files = dict(files)
    change(manifest, files)
    bundle.write(fit.root / "m.pbc", manifest, files)
    second = fit(cache="disk")
    assert fit.epochs[0].stage_seconds["prefix"] > 0
    assert second == fit("fresh", cache="disk")


@pytest.mark.parametrize("file", ["features.bin", "index.bin"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_damaged_cache_is_computed_again(fit: Fit, file: str, damage: str) -> None:
    first = fit(cache="disk")
    path = fit.root / "out" / "cache" / file
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 3] ^= 64
        path.write_bytes(data)
    else:
        path.unlink()
    assert fit(cache="disk") == first
    assert fit.epochs[0].stage_seconds["prefix"] > 0


# ---- full disks ----------------------------------------------------------------------------


def no_space(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_no_room_for_the_cache(fit: Fit, monkeypatch: pytest.MonkeyPatch, scheduler: str) -> None:
    without = fit("off", cache="off", scheduler=scheduler)
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    assert fit(cache="disk", scheduler=scheduler) == without
    (note,) = fit.notes
    assert note.startswith("training goes on without the cache: cannot write ")
    assert "features.bin: No space left on device" in note


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["probe", "bodies"])
def test_no_room_while_the_cache_is_written(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, kind: str, scheduler: str
) -> None:
    tiny.write(fit.root / "m.pbc", kind)
    without = fit("off", cache="off", scheduler=scheduler)
    writes = 0
    write = DiskStore._write

    def second_fails(self: DiskStore, *args: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == 2:
            no_space()
        write(self, *args)

    monkeypatch.setattr(DiskStore, "_write", second_fails)
    assert fit(cache="disk", scheduler=scheduler) == without
    assert [note.startswith("training goes on without the cache") for note in fit.notes] == [True]
    assert writes == 2


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("opening", [True, False])
def test_a_run_that_had_no_room_for_the_cache_resumes_without_one(
    fit: Fit, scheduler: str, opening: bool
) -> None:
    whole = fit("off", cache="off", scheduler=scheduler)
    runtime = Runtime.open(fit.root / "m.pbc")
    samples = ImageFolder.open(fit.root / "photos", runtime.spec)
    options = TrainOptions(
        3, 0.1, cache="disk", scheduler=scheduler, costs=fit.root / "costs.json",
        checkpoint_seconds=0,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as full:
        if opening:
            full.setattr(os, "posix_fallocate", no_space)
        else:
            full.setattr(DiskStore, "_write", no_space)
        trainer = runtime.trainer(samples, options, fit.root / "out")
        trainer.prepare()
        trainer.run_epoch()
    notes: list[str] = []

    def take(event: Event) -> None:
        notes.extend([event.text] if isinstance(event, Note) else [])

    runtime.fit(samples, options, fit.root / "out", resume=True, report=take)
    assert notes == ["the cache stays off: the disk had no room when this run began"]
    assert (fit.root / "out" / "trainable.safetensors").read_bytes() == whole


def test_a_cache_that_may_not_be_written_is_an_error(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "posix_fallocate", forbidden)
    with pytest.raises(PbcError, match=r"features\.bin: Permission denied"):
        fit(cache="disk")


def test_no_room_for_a_checkpoint_keeps_the_last_one(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(cache="off", epochs=1)
    before = (fit.root / "out" / "checkpoint.safetensors").read_bytes()
    runtime = Runtime.open(fit.root / "m.pbc")
    samples = ImageFolder.open(fit.root / "photos", runtime.spec)
    options = TrainOptions(4, 0.1, cache="off", costs=fit.root / "costs.json", checkpoint_seconds=0)
    trainer = runtime.trainer(samples, options, fit.root / "out")
    trainer.prepare(resume=True)
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(PbcError, match=r"No space left on device; the file that was there is un"):
        trainer.run_epoch()
    monkeypatch.undo()
    assert (fit.root / "out" / "checkpoint.safetensors").read_bytes() == before
    runtime.fit(samples, options, fit.root / "out", resume=True)
