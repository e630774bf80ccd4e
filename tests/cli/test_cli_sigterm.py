"""A compilation that the system ends, as Ctrl-C does."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import bench_net
import pytest
from click.testing import CliRunner

from pbc import compiler
from pbc.cli import main


def test_sigterm_ends_a_compilation_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, output = tmp_path / "sigterm_net.py", tmp_path / "net.pbc"
    net.write_text(bench_net.SOURCE)
    words = [
        "compile", f"{net}:factory", "--target", "generic-x86-64", "--engine", "pytorch",
        "--input", "3x16x16", "--weights", "random", "--levels", "0", "-o", str(output),
    ]  # fmt: skip
    package = compiler.package

    def ended(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return package(*args, **options)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "package", ended)
        result = CliRunner().invoke(main, words)
    assert result.exit_code == 130, result.output
    assert result.output.endswith("interrupted: the same command goes on from here\n")
    assert "Traceback" not in result.output
    assert signal.getsignal(signal.SIGTERM) is handler
    assert {path.suffix for path in tmp_path.iterdir()} <= {".py", ""}
    assert CliRunner().invoke(main, words).exit_code == 0
    assert output.exists()
