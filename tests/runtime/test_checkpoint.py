"""A checkpoint holds what was saved, whatever happens while the next one is written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from pbc.errors import PbcError
from pbc.runtime.output.checkpoint import Checkpoint, difference, join

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


def test_the_first_difference_is_named() -> None:
    now = {"bundle": "a", "data": "b", "options": {"lr": 0.1, "batch": 8}}
    then = {**now, "epoch": 5, "rounds": 0}
    assert difference(then, now, 5) is None
    assert "other photos to train on" in str(difference(then, {**now, "data": "c"}, 5))
    changed = {**now, "options": {"lr": 0.1, "batch": 4}}
    assert difference(then, changed, 5) == "it was started with batch 8, not 4"
    assert difference(then, now, 4) == "5 epochs are done already, not 4"
    assert difference({**then, "rounds": 5}, now, 4) is None
