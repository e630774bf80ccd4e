"""Whatever call fails on a run's folder: one line, and `resume` ends at the same bits."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from failing_disk import FailingDisk, failing

from pbc import bundle
from pbc.data import ImageFolder, Samples
from pbc.errors import PbcError
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.folder import Output
from pbc.runtime.output.personal import Personal
from pbc.runtime.runtime import Runtime
from pbc.util.atomic import replacing


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    root = tmp_path_factory.mktemp("assets")
    return Runtime.open(tiny.write(root / "m.pbc").path)


@pytest.fixture(scope="module")
def samples(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return ImageFolder.open(tiny.photos(tmp_path_factory.mktemp("photos"), 2), runtime.spec)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    costs = tiny.costs(tmp_path_factory.mktemp("costs") / "costs.json")
    return TrainOptions(epochs=2, learning_rate=0.1, cache="disk", costs=costs, threads=1)


def theta(out: Path) -> bytes:
    return (out / "trainable.safetensors").read_bytes()


def refusal(call: Callable[[], Any]) -> str | None:
    """Return the one line that a call ends with; None if it ends well."""
    try:
        call()
    except PbcError as error:
        line, *more = str(error).splitlines()
        assert not more
        return line
    return None


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE])
def test_every_call_on_the_folder_fails_once(
    runtime: Runtime,
    samples: Samples,
    options: TrainOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    runtime.fit(samples, options, tmp_path / "whole")
    # The four errors take turns at the calls.
    number, first = 0, [errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE].index(code)
    refused = 0
    for number in range(1 + first, 1000, 4):
        out = tmp_path / f"out{number}"
        disk = FailingDisk(out, number, code, lasting=number % 3 == 0)
        with failing(disk, monkeypatch):
            line = refusal(lambda: runtime.fit(samples, options, out, resume=True))  # noqa: B023
        refused += line is not None
        assert line is None or os.strerror(code) in line
        if not disk.failed:
            break
        runtime.fit(samples, options, out, resume=True)
        assert theta(out) == theta(tmp_path / "whole")
        Personal.open(out)
    assert number > 40
    assert refused > 8


def test_a_failing_removal_does_not_hide_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FailingDisk(tmp_path, 2, errno.EIO, lasting=True)  # 1 is the folder, 2 the file
    with (
        pytest.raises(PbcError, match=r"cannot write .*file: Input/output error$"),
        failing(disk, monkeypatch),
        replacing(tmp_path / "file") as file,
    ):
        file.write(b"x")
    disk = FailingDisk(tmp_path, 3, errno.EIO, lasting=True)
    with (
        pytest.raises(PbcError, match=r"cannot write .*file: Input/output error$"),
        failing(disk, monkeypatch),
        replacing(tmp_path / "file") as file,
    ):
        file.write(b"x")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(PbcError, match=rf"cannot lock .*: {os.strerror(code)}; its file system may"),
        Output(tmp_path / "out").locked(),
    ):
        raise AssertionError("it is not locked")


_OBSTACLES: dict[str, Any] = {
    "cache": Path.touch,
    "cache/features.bin": lambda path: path.mkdir(parents=True),
    "cache/index.bin": lambda path: path.symlink_to("/nonexistent/x"),
    "metrics.jsonl": Path.mkdir,
    "model.json": Path.mkdir,
    "checkpoint.safetensors": Path.mkdir,
    "trainable.safetensors": Path.mkdir,
    "costs.json": Path.mkdir,
    ".lock": Path.mkdir,
}


@pytest.mark.parametrize("name", _OBSTACLES)
@pytest.mark.parametrize("resume", [False, True])
def test_whatever_stands_in_the_way(
    runtime: Runtime,
    samples: Samples,
    options: TrainOptions,
    tmp_path: Path,
    name: str,
    resume: bool,
) -> None:
    place = tmp_path / "out" / name
    place.parent.mkdir(parents=True)
    _OBSTACLES[name](place)
    out = tmp_path / "out"
    refusal(lambda: runtime.fit(samples, options, out, resume=resume, overwrite=not resume))


def test_overwriting_keeps_nothing_of_the_photos(
    runtime: Runtime, samples: Samples, options: TrainOptions, tmp_path: Path
) -> None:
    runtime.fit(samples, options, tmp_path / "out")
    assert (tmp_path / "out" / "cache" / "features.bin").exists()
    other = TrainOptions(epochs=1, cache="off", routing=False)
    runtime.fit(samples, other, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "cache").exists()


def test_a_bundle_that_is_overwritten_in_place(
    runtime: Runtime, samples: Samples, options: TrainOptions, tmp_path: Path
) -> None:
    path = tmp_path / "m.pbc"
    shutil.copy(runtime.bundle.path, path)
    Runtime.open(path).fit(samples, options, tmp_path / "out")
    with path.open("r+b") as file:  # as cp does
        file.truncate()
        file.write(b"another")
    Personal.open(tmp_path / "out")


def test_no_model_is_made_of_a_damaged_bundle(
    samples: Samples, options: TrainOptions, tmp_path: Path
) -> None:
    made = bundle.write(tmp_path / "m", *tiny.contents(), as_folder=True)
    Runtime.open(made.path).fit(samples, options, tmp_path / "out")  # some of it is kept now
    for number, name in enumerate(made.entries):
        if name == "manifest.json":
            continue
        content = (made.path / name).read_bytes()
        (made.path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(PbcError, match="damaged"):
            Runtime.open(made.path).fit(samples, options, tmp_path / f"out-{number}")
        assert not Output(tmp_path / f"out-{number}").bundle.exists()
        (made.path / name).write_bytes(content)


def test_a_bundle_folder_that_is_changed_in_place(
    samples: Samples, options: TrainOptions, tmp_path: Path
) -> None:
    manifest, files = tiny.contents()
    made = bundle.write(tmp_path / "m", manifest, files, as_folder=True)
    Runtime.open(made.path).fit(samples, options, tmp_path / "out")
    for file in (tmp_path / "m").rglob("*.*"):
        file.write_bytes(b"another")
    Personal.open(tmp_path / "out")
