"""Commands leave nothing outside OUT, PBC_CACHE and TMPDIR, and open no socket."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import bench_net
import pytest
import tiny
import tiny_onnx

# What makes a file, a folder or a link, or reaches another machine.
CALLS = "socket,connect,open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat"

MADE = re.compile(r"(?:mkdir(?:at)?|creat|rename(?:at2?)?|link(?:at)?)\(|O_CREAT")
PATH = re.compile(r'"([^"]*)"')


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
        log = folder / "calls"
        program = f"import sys; from pbc.cli import main; main.main({list(command)!r}, 'pbc')"
        result = subprocess.run(
            ["strace", "-f", "--seccomp-bpf", "-qq", "-s", "300", "-e", f"trace={CALLS}",
             "-o", str(log), sys.executable, "-c", program],
            cwd=folder / "work", env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        calls = [line for line in log.read_text().splitlines() if "ENOENT" not in line]
        # A name service of this machine may be asked who the user is.
        reached = [line for line in calls if re.search(r"\b(socket|connect)\(", line)]
        assert not [line for line in reached if "AF_UNIX" not in line]
        made = {PATH.search(line) for line in calls if MADE.search(line) and "EEXIST" not in line}
        places = {match[1] for match in made if match}
        allowed = (str(folder / "tmp"), str(folder / "cache"), str(folder / "work"), "/dev/")
        assert not [p for p in places if p.startswith("/") and not p.startswith(allowed)]
        assert not list((folder / "home").iterdir())
        assert not list((folder / "tmp").iterdir())
        log.unlink()
