"""A checkpoint holds what was saved, whatever happens while the next one is written."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from pbc.data import ImageFolder
from pbc.errors import PbcError
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.checkpoint import Checkpoint, difference, join
from pbc.runtime.output.metrics import Metrics
from pbc.runtime.runtime import Runtime

FACTS = {"epoch": 3, "totals": {"loss": 0.1 + 0.2, "visits": [1, 2]}}
ARRAYS = join(
    {
        "theta": {"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T},
        "scheduler": {"moving": np.array([True, False]), "ema": np.array([np.nan])},
        "optimizer": {"step": np.array(7, np.int64), "nothing": np.empty((0, 3), np.float32)},
    }
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "c"
    Checkpoint(FACTS, ARRAYS).save(path)
    loaded = Checkpoint.load(path)
    assert loaded.facts == FACTS
    assert loaded.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert loaded.arrays[name].dtype == array.dtype
        assert loaded.arrays[name].shape == array.shape
        np.testing.assert_array_equal(loaded.arrays[name], array)
    assert set(loaded.part("optimizer")) == {"step", "nothing"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_failed_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    Checkpoint(FACTS, ARRAYS).save(path)

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(PbcError, match=r"cannot write .*: No space left on device; the file that"):
        Checkpoint({"epoch": 4}, {}).save(path)
    assert Checkpoint.load(path).facts == FACTS
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("data", [b"", b"junk", b"\xff" * 100])
def test_a_damaged_one_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "c").write_bytes(data)
    with pytest.raises(
        PbcError, match=r"checkpoint .* is damaged .*; start again with --overwrite"
    ):
        Checkpoint.load(tmp_path / "c")


def test_a_truncated_one_is_refused(tmp_path: Path) -> None:
    Checkpoint(FACTS, ARRAYS).save(tmp_path / "c")
    whole = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(whole[:-3])
    with pytest.raises(PbcError, match="is damaged"):
        Checkpoint.load(tmp_path / "c")


def test_one_that_no_memory_holds_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "c").open("wb") as file:
        file.truncate(1 << 43)
    with pytest.raises(PbcError, match=r"is damaged \(it has 8192.0 GiB, and .* are free\)"):
        Checkpoint.load(tmp_path / "c")


@pytest.mark.parametrize("place", [".lock", "cache/features.bin", "metrics.jsonl", "tensorboard"])
def test_nothing_is_written_through_a_link(tmp_path: Path, place: str) -> None:
    """A folder that came from elsewhere may hold links to files of whoever trains in it."""
    runtime = Runtime.open(tiny.write(tmp_path / "m.pbc").path)
    samples = ImageFolder.open(tiny.photos(tmp_path / "photos", 1), runtime.spec)
    (tmp_path / "precious").write_text("mine")
    link = tmp_path / "out" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "precious")
    with pytest.raises(PbcError, match=rf"{place} is a link; nothing is written through one"):
        runtime.fit(samples, TrainOptions(epochs=1, cache="disk"), tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "mine"


def test_the_first_difference_is_named() -> None:
    now = {"bundle": "a", "data": "b", "options": {"lr": 0.1, "batch": 8}}
    then = {**now, "epoch": 5, "rounds": 0}
    assert difference(then, now, 5) is None
    assert "other photos to train on" in str(difference(then, {**now, "data": "c"}, 5))
    changed = {**now, "options": {"lr": 0.1, "batch": 4}}
    assert difference(then, changed, 5) == "it was started with batch 8, not 4"
    assert difference(then, now, 4) == "5 epochs are done already, not 4"
    assert difference({**then, "rounds": 5}, now, 4) is None


def mutations(facts: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value."""
    if at:
        yield at
    if isinstance(facts, dict | list):
        for key in facts if isinstance(facts, dict) else range(len(facts)):
            yield from mutations(facts[key], (*at, key))


def test_facts_that_no_run_writes_are_refused_or_harmless(tmp_path: Path) -> None:
    values: Iterator[Any] = itertools.cycle([None, "x", -1, [], KeyError, 10**30, {}])
    runtime = Runtime.open(tiny.write(tmp_path / "m.pbc").path)
    samples = ImageFolder.open(tiny.photos(tmp_path / "photos", 2), runtime.spec)
    options = TrainOptions(epochs=1, routing=False, cache="off", threads=1)
    path = tmp_path / "out" / "checkpoint.safetensors"
    runtime.fit(samples, options, tmp_path / "out")
    good = Checkpoint.load(path)
    refused = 0
    for *parents, key in mutations(good.facts):
        facts = json.loads(json.dumps(good.facts))
        inner = facts
        for parent in parents:
            inner = inner[parent]
        value = next(values)
        if value is KeyError:
            del inner[key]
        else:
            inner[key] = value
        Checkpoint(facts, good.arrays).save(path)
        with contextlib.suppress(PbcError):
            refused += 1
            runtime.fit(samples, options, tmp_path / "out", resume=True)
            refused -= 1
    assert refused > 20


def test_arrays_of_another_run_are_refused(tmp_path: Path) -> None:
    runtime = Runtime.open(tiny.write(tmp_path / "m.pbc").path)
    samples = ImageFolder.open(tiny.photos(tmp_path / "photos", 2), runtime.spec)
    options = TrainOptions(
        epochs=1, scheduler="piebridge", optimizer="adam", cache="off", threads=1,
        costs=tiny.costs(tmp_path / "costs.json"),
    )  # fmt: skip
    path = tmp_path / "out" / "checkpoint.safetensors"
    runtime.fit(samples, options, tmp_path / "out")
    good = Checkpoint.load(path)
    assert len(good.arrays) > 6
    for name, array in good.arrays.items():
        others: list[np.ndarray | None] = [np.zeros((7, 7), array.dtype)]
        if array.dtype.kind == "f" and not name.startswith(("scheduler/", "decisions/")):
            others.append(np.full_like(array, np.nan))
        if not name.startswith("decisions/"):  # without, it is as if nothing was predicted
            others.append(None)
        for other in others:
            arrays = {key: value for key, value in good.arrays.items() if key != name}
            if other is not None:
                arrays[name] = other
            Checkpoint(good.facts, arrays).save(path)
            with pytest.raises(PbcError, match=r"."):
                runtime.fit(samples, options, tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    "line", [b"null", b"5", b"[]", b'{"epoch": "x"}', b"[" * 100_000, b"\xff\xfe", b'"epoch"']
)
def test_metrics_that_no_run_writes_are_dropped(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b'\n{"epoch": 1}\n{"epoch": 2}\n')
    Metrics(path).rewind(1)
    assert path.read_bytes() == b'{"epoch": 1}\n'
