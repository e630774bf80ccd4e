"""Entries are whole or absent, whatever happens to the folder or beside it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pbc.util import artifacts
from pbc.util.artifacts import Artifacts, default_folder

KEY = "0123456789abcdef0123"


def writing(content: bytes = b"content") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(content)
        (folder / "graph.onnx").write_bytes(b"graph")

    return make


def refusing(folder: Path) -> None:
    raise AssertionError(f"{folder} was made again")


def names(root: Path) -> list[str]:
    """The entries; not the secret of their seals."""
    return sorted(path.name for path in root.iterdir() if path.name != "seal.secret")


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    store = Artifacts(tmp_path / "a" / "b")
    entry = store.get(KEY, writing())
    assert (entry / "weights.bin").read_bytes() == b"content"
    assert Artifacts(store.root).get(KEY, refusing) == entry
    assert names(store.root) == [KEY]
    assert store.root.stat().st_mode & 0o777 == 0o700
    assert entry.stat().st_mode & 0o777 == 0o700


def flip(entry: Path) -> None:
    data = bytearray((entry / "weights.bin").read_bytes())
    data[0] ^= 1
    (entry / "weights.bin").write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda entry: os.truncate(entry / "weights.bin", 3),
        lambda entry: (entry / "graph.onnx").unlink(),
        lambda entry: (entry / "entry.json").unlink(),
        lambda entry: (entry / "entry.json").write_bytes(b"{"),
        lambda entry: (entry / "entry.json").write_bytes(b"{}"),
        lambda entry: (entry / "entry.json").write_bytes(b"[]"),
        lambda entry: (entry / "entry.json").write_bytes(b"[1]"),
    ],
)
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    store = Artifacts(tmp_path)
    entry = store.get(KEY, writing())
    damage(entry)
    assert store.get(KEY, writing()) == entry
    assert (entry / "weights.bin").read_bytes() == b"content"
    assert store.get(KEY, refusing) == entry
    assert names(tmp_path) == [KEY]


def test_whoever_fails_to_make_an_entry_leaves_nothing(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"half")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        Artifacts(tmp_path).get(KEY, broken)
    assert names(tmp_path) == []


def test_of_two_that_make_an_entry_the_first_wins(tmp_path: Path) -> None:
    store = Artifacts(tmp_path)

    def slower(folder: Path) -> None:
        store.get(KEY, writing(b"first"))
        writing(b"second")(folder)

    entry = store.get(KEY, slower)
    assert (entry / "weights.bin").read_bytes() == b"first"
    assert names(tmp_path) == [KEY]


CONTENDER = """
import sys
from pathlib import Path
from pbc.util.artifacts import Artifacts

def make(folder):
    for name in ("weights.bin", "graph.onnx"):
        with (folder / name).open("wb") as file:
            for part in range(200):
                file.write(bytes([part]) * 997)
                file.flush()

store = Artifacts(Path(sys.argv[1]))
for turn in range(60):
    key = f"entry-{turn % 3}"
    if turn % 7 == int(sys.argv[2]):
        store.discard(key)
    files = store.get(key, make)
"""


def test_many_processes_at_once(tmp_path: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, str(tmp_path), str(number)], stderr=subprocess.PIPE
        )
        for number in range(3)
    ]
    for process in running:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr.decode()
    assert set(names(tmp_path)) <= {"entry-0", "entry-1", "entry-2"}
    for name in names(tmp_path):
        assert (tmp_path / name / "weights.bin").stat().st_size == 200 * 997
        Artifacts(tmp_path).get(name, refusing)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="Not a directory"):
        Artifacts(tmp_path / "file" / "cache").get(KEY, writing())


def test_large_files_of_the_same_content_are_one(tmp_path: Path) -> None:
    store = Artifacts(tmp_path)
    large, other = bytes(100_000), bytes(99_999) + b"1"
    one, two, three = (
        store.get(k, writing(v)) for k, v in zip("abc", (large, large, other), strict=True)
    )
    assert (one / "weights.bin").samefile(two / "weights.bin")
    assert not (one / "weights.bin").samefile(three / "weights.bin")
    assert not (one / "graph.onnx").samefile(two / "graph.onnx")  # not worth it
    assert sorted(path.name for path in two.iterdir()) == [
        "entry.json",
        "graph.onnx",
        "weights.bin",
    ]
    store.discard("a")
    assert store.get("b", refusing) == two
    # A twin that was damaged since is not taken.
    flip(two)
    four = store.get("d", writing(large))
    assert not (two / "weights.bin").samefile(four / "weights.bin")
    assert store.get("d", refusing) == four


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    store = Artifacts(tmp_path, limit_bytes=3300)
    for age, key in enumerate("abc"):
        entry = store.get(key, writing(bytes(700)))
        os.utime(entry / "entry.json", ns=(age, age))
    store.get("a", refusing)  # used: now it is b's turn to go
    store.get("d", writing(bytes(700)))
    assert names(tmp_path) == ["a", "c", "d"]
    store.get("large", writing(bytes(5000)))
    assert names(tmp_path) == ["large"]


def test_what_a_kill_left_behind_goes_when_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".new.tmp").mkdir()
    (tmp_path / ".new.tmp" / "weights.bin").write_bytes(b"half")
    store = Artifacts(tmp_path)
    store.get("a", writing())
    assert names(tmp_path) == [".new.tmp", "a"]  # it may be at work
    monkeypatch.setattr(artifacts, "_ABANDONED_SECONDS", -1.0)
    store.get("b", writing())
    assert names(tmp_path) == ["a", "b"]


def test_where_entries_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PBC_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == tmp_path / ".cache" / "pbc"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == tmp_path / ".cache" / "pbc"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert default_folder() == tmp_path / "shared" / "pbc"
    monkeypatch.setenv("PBC_CACHE", str(tmp_path / "own"))
    assert default_folder() == tmp_path / "own"


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PBC_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OSError, match="no home folder; PBC_CACHE can name one"):
        default_folder()


def test_an_entry_that_somebody_else_sealed_is_made_again(tmp_path: Path) -> None:
    planted = Artifacts(tmp_path / "theirs").get(KEY, writing())
    (tmp_path / "own").mkdir(mode=0o700)
    shutil.copytree(planted, tmp_path / "own" / KEY)
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "graph.onnx").write_bytes(b"own")

    entry = Artifacts(tmp_path / "own").get(KEY, make)
    assert made
    assert (entry / "graph.onnx").read_bytes() == b"own"


def test_an_entry_under_another_key_is_made_again(tmp_path: Path) -> None:
    store = Artifacts(tmp_path)
    shutil.copytree(store.get("other", writing()), tmp_path / KEY)
    with pytest.raises(AssertionError, match="was made again"):
        store.get(KEY, refusing)


def test_a_copy_is_compared_with_what_its_source_says(tmp_path: Path) -> None:
    store = Artifacts(tmp_path)

    def copy(folder: Path) -> None:
        (folder / "lib.so").write_bytes(b"honest")

    honest = {"lib.so": hashlib.sha256(b"honest").hexdigest()}
    (store.get(KEY, copy) / "lib.so").write_bytes(b"planted")
    assert (store.get(KEY, copy, honest) / "lib.so").read_bytes() == b"honest"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path, mode: int) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(mode)
    with pytest.raises(OSError, match="can be written by others"):
        Artifacts(tmp_path / "shared").get(KEY, writing())
