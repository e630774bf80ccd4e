"""Photos held out of training: by content, of every class, copies on one side."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from pbc.data import ImageFolder, Samples
from pbc.data.held_out import default_validation, hold_out, train_and_validation
from pbc.errors import UsageError


def opened(root: Path) -> Samples:
    return ImageFolder.open(root, tiny.SPEC)


def test_a_share_of_every_class_is_held_out(tmp_path: Path) -> None:
    samples = opened(tiny.photos(tmp_path / "p", 10))
    rest, held = hold_out(samples, 0.2)
    assert np.bincount(rest.labels).tolist() == [8, 8, 8]
    assert np.bincount(held.labels).tolist() == [2, 2, 2]
    assert sorted(rest.names + held.names) == sorted(samples.names)
    for part in (rest, held):
        at = np.array([samples.names.index(name) for name in part.names])
        everything = np.arange(len(part))
        assert np.array_equal(part.batch(everything), samples.batch(at))
        assert np.array_equal(part.decode(1), samples.decode(int(at[1])))


def test_names_and_order_do_not_matter(tmp_path: Path) -> None:
    first = opened(tiny.photos(tmp_path / "p", 10))
    for index, path in enumerate(sorted((tmp_path / "p" / "red").iterdir(), reverse=True)):
        path.rename(path.with_name(f"x{index:03}.png"))
    renamed = opened(tmp_path / "p")
    assert renamed.names != first.names
    assert set(hold_out(renamed, 0.3)[1].hashes) == set(hold_out(first, 0.3)[1].hashes)
    assert set(hold_out(first, 0.3, seed=1)[1].hashes) != set(hold_out(first, 0.3)[1].hashes)


def test_copies_are_on_one_side(tmp_path: Path) -> None:
    root = tiny.photos(tmp_path / "p", 5)
    for path in list((root / "red").iterdir()):
        for copy in range(3):
            shutil.copy(path, path.with_name(f"{path.stem}-{copy}.png"))
    shutil.copy(root / "green" / "000.png", root / "blue" / "green.png")  # two labels
    for share in (0.2, 0.5, 0.9):
        rest, held = hold_out(opened(root), share)
        assert not set(rest.hashes) & set(held.hashes)
        assert set(rest.labels.tolist()) == {0, 1, 2}
        assert "green/000.png" in rest.names
    assert (hold_out(opened(root), 0.2)[1].labels == 2).sum() == 4


@pytest.mark.parametrize(("photos", "held"), [(1, 0), (2, 0), (3, 1), (4, 1)])
def test_a_small_class_keeps_photos_to_learn_from(tmp_path: Path, photos: int, held: int) -> None:
    rest, apart = hold_out(opened(tiny.photos(tmp_path / "p", photos)), 0.2)
    assert np.bincount(apart.labels, minlength=3).tolist() == [held] * 3
    assert np.bincount(rest.labels).tolist() == [photos - held] * 3


def test_what_is_in_no_memory_is_read_again(tmp_path: Path) -> None:
    root = tiny.photos(tmp_path / "p", 10)
    samples = opened(root)
    few = ImageFolder.open(root, tiny.SPEC, ram_bytes=4 * samples.decode(0).nbytes)
    for whole, part in zip(hold_out(samples, 0.2), hold_out(few, 0.2), strict=True):
        everything = np.arange(len(whole))
        assert np.array_equal(whole.batch(everything), part.batch(everything))
    assert not hold_out(few, 0.2)[1].in_memory


def test_what_a_result_is_measured_on(tmp_path: Path) -> None:
    root = tiny.photos(tmp_path / "p", 10)
    assert default_validation(root) == 0.2
    train, held = train_and_validation(root, tiny.SPEC)
    assert held is not None
    assert (len(train), len(held)) == (24, 6)
    train, held = train_and_validation(root, tiny.SPEC, None)
    assert (len(train), held) == (30, None)
    train, held = train_and_validation(root, tiny.SPEC, tiny.photos(tmp_path / "v", 2))
    assert held is not None
    assert (len(train), len(held)) == (30, 6)
    with pytest.raises(UsageError, match=r"a share of 1\.5 photos"):
        train_and_validation(root, tiny.SPEC, 1.5)
    few = tiny.photos(tmp_path / "few", 2)
    train, held = train_and_validation(few, tiny.SPEC)
    assert (len(train), held) == (6, None)
    split = tmp_path / "split"
    tiny.photos(split / "train", 3)
    tiny.photos(split / "val", 1)
    assert default_validation(split) == split
