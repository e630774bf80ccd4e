"""`pbc profile --on` and `pbc compile --cost`: the loop between a board and the compiler.

The board is this machine behind a real sshd; what is deployed there is laid out by hand, since
`pbc deploy` has tests of its own.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sshd
from click.testing import CliRunner, Result

from pbc import cli
from pbc.bundle import Bundle

SOURCE = """
import torch


def factory():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 160, 1), torch.nn.ReLU(), torch.nn.Conv2d(160, 16, 1),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 4))
"""
pytestmark = pytest.mark.skipif(sshd.SSHD is None or sshd.SSH is None, reason=sshd.MISSING)


def pbc(*args: object) -> Result:
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args], prog_name="pbc")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Board]:
    with sshd.board(tmp_path_factory.mktemp("board")) as running:
        yield running


@pytest.fixture(scope="module")
def compile_command(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    source = tmp_path_factory.mktemp("net") / "profiled_net.py"
    source.write_text(SOURCE)
    return [
        "compile", f"{source}:factory", "--weights", "random", "--input", "3x8x8",
        "--engine", "onnxruntime", "--levels", "2", "--axes", "width",
        "--batch", "4", "--target", "generic-x86-64",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def bundle(compile_command: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "net.pbc"
    result = pbc(*compile_command, "-o", path)
    assert result.exit_code == 0, result.output
    return path


def deployed(board: sshd.Board, bundle: Path) -> None:
    """Lay out what a deploy leaves behind: a launcher, and the active bundle beside it."""
    (board.root / "bin").mkdir(parents=True, exist_ok=True)
    launcher = board.root / "bin" / "pbc"
    run = shlex.join([sys.executable, "-c", "from pbc.cli import main; main()"])
    launcher.write_text(f'#!/bin/sh\nexec {run} "$@"\n')
    launcher.chmod(0o755)
    link = board.root / "bundle.pbc"
    link.unlink(missing_ok=True)
    link.symlink_to(bundle)


def on(board: sshd.Board) -> list[object]:
    return ["--on", board.destination, "--ssh-option", shlex.join(board.options)]


QUICK = ("--rounds", "2", "--threads", "1")


def test_a_board_without_a_deploy_is_one_line(board: sshd.Board, bundle: Path) -> None:
    nowhere = [
        "--on", f"{board.destination}/nowhere", "--ssh-option", shlex.join(board.options)
    ]  # fmt: skip
    result = pbc("profile", bundle, *nowhere)
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert f"nothing is deployed in {board.root}/nowhere; 'pbc deploy {bundle} " in line
    closed = ["--on", "127.0.0.1", "--ssh-option", "-p 1 -F none"]
    refused = pbc("profile", bundle, *closed)
    assert refused.exit_code == 1
    assert "ssh cannot reach 127.0.0.1" in refused.stderr.splitlines()[-1]


def test_the_loop_from_the_compiler_to_the_board_and_back(
    board: sshd.Board, bundle: Path, compile_command: list[object], tmp_path: Path
) -> None:
    deployed(board, bundle)
    path = tmp_path / "profile.json"
    result = pbc("profile", bundle, *on(board), *QUICK, "-o", path)
    assert result.exit_code == 0, result.output
    assert f"measuring on {board.destination}" in result.stderr
    measured: dict[str, Any] = json.loads(path.read_text())
    assert measured["on"] == board.destination
    assert measured["bundle"]["digest"] == Bundle.open(bundle).digest
    (costs,) = measured["level_costs"]
    assert [row["level"] for row in costs["levels"]] == [0, 1, 2]
    assert "level 2" in result.stdout
    # Timings differ from run to run; that the plan follows them must not depend on them.
    for row, milliseconds in zip(costs["levels"], (10.0, 9.0, 8.0), strict=True):
        row.update(prefix_ms=milliseconds, forward_ms=0.0, update_ms=0.0)
    path.write_text(json.dumps(measured))
    planned = pbc(*compile_command, "--min-cost", "0.85", "--cost", path, "-o", tmp_path / "n.pbc")
    assert planned.exit_code == 0, planned.output
    manifest = Bundle.open(tmp_path / "n.pbc").manifest
    assert manifest["cost_model"] == "profile"
    # Eight of 160 channels at a time are as near as it gets.
    assert [row["cost"] for row in manifest["levels"]] == pytest.approx([1, 0.925, 0.85], abs=0.02)
    before = Bundle.open(bundle).manifest["levels"]
    assert manifest["levels"][-1]["macs"] > before[-1]["macs"]
    other = pbc(*compile_command, "--batch", "2", "--cost", path, "--dry-run")
    assert other.exit_code == 1
    assert "is of batch 4, this compiles for 2: profile a bundle that was" in other.stderr
    stale = pbc("profile", tmp_path / "n.pbc", *on(board), *QUICK, "--levels", "0")
    assert stale.exit_code == 1
    assert "has another bundle (" in stale.stderr.splitlines()[-1]


def test_errors_of_the_board_come_back_as_one_line(board: sshd.Board, bundle: Path) -> None:
    deployed(board, bundle)
    result = pbc("profile", bundle, *on(board), "--levels", "7")
    assert result.exit_code == 1
    assert "--levels has 7" in result.stderr.splitlines()[-1]
    launcher = board.root / "bin" / "pbc"
    launcher.write_text("#!/bin/sh\necho pbc, version 0\n")
    result = pbc("profile", bundle, *on(board))
    assert result.exit_code == 1
    assert "answered with no profile" in result.stderr.splitlines()[-1]


def test_what_cannot_be_meant_is_refused(bundle: Path, tmp_path: Path) -> None:
    for args, words in (
        (["--on", "board", "--data", tmp_path], "--data is a file of this machine"),
        (["--on", "a b"], "is not USER@HOST"),
        (["--ssh-option", "-p 1"], "--ssh-option is for --on"),
    ):
        result = pbc("profile", bundle, *args)
        assert result.exit_code == 2, result.output
        assert words in result.stderr


def test_a_cost_file_is_read_before_anything_else(tmp_path: Path) -> None:
    result = pbc("compile", "no-such-model", "--cost", tmp_path / "p.json")
    assert result.exit_code == 1
    assert "the profile" in result.stderr
    assert "cannot be read" in result.stderr
