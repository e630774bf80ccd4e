"""Commands leave nothing outside OUT, PBC_CACHE and TMPDIR, and open no socket."""

from __future__ import annotations

import sys
from pathlib import Path

import bench_net
import pytest
import tiny
import tiny_onnx
import traced


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced")
    for name in ("home", "tmp", "cache", "work"):
        (folder / name).mkdir()
    (folder / "work" / "net.py").write_text(bench_net.SOURCE)
    tiny_onnx.write(folder / "work" / "b.pbc")
    tiny.photos(folder / "work" / "photos")
    return folder


COMMANDS = (
    ("train", "b.pbc", "photos", "-o", "out", "--epochs", "1", "--threads", "1"),
    ("eval", "out", "photos", "--threads", "1"),
    ("predict", "out", "photos/red/000.png", "--threads", "1"),
    ("compile", "net.py:factory", "--weights", "random", "--input", "3x8x8", "--levels", "0",
     "--engine", "onnxruntime", "-o", "made.pbc"),
)  # fmt: skip


def test_nothing_is_left_elsewhere_and_no_socket_is_opened(folder: Path) -> None:
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"),
        "PBC_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    for command in COMMANDS:
        program = f"import sys; from pbc.cli import main; main.main({list(command)!r}, 'pbc')"
        result, trace = traced.run(
            [sys.executable, "-c", program],
            folder / "calls",
            cwd=folder / "work",
            environment=environment,
        )
        assert result.returncode == 0, result.stderr
        assert trace.made or command[0] in ("eval", "predict")  # which only read
        assert not trace.reached()
        own = (folder / name for name in ("tmp", "cache", "work"))
        assert not trace.made_outside(*own, "/dev/")
        assert not list((folder / "home").iterdir())
        assert not list((folder / "tmp").iterdir())
