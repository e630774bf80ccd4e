"""What the tests of deploys share: a board, a bundle with a self-test, wheels without an index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import sshd
import tiny_onnx
import wheelhouse

from pbc import bundle
from pbc.bundle import Bundle
from pbc.deploy import deployment
from pbc.deploy.deployment import DeployOptions
from pbc.runtime import self_test
from pbc.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine

RUNTIME = ("pip", "click", "numpy", "onnxruntime", "pillow", "rich", "safetensors")
RATE = 0.5
PYTHON = os.path.realpath(sys.executable)
"""The system's own, which has nothing of this environment's installed."""


def wheels(folder: Path) -> Path:
    return wheelhouse.fill(folder, RUNTIME)


def write(path: Path, number: int = 0, **changes: Any) -> Bundle:
    """Write a bundle whose self-test has what the engine finds here; each number is another one."""
    manifest, files = tiny_onnx.contents("probe", class_count=3)
    manifest["requires"] = {"python": ">=3.10", "onnxruntime": ">=1.20"}
    manifest["provenance"] = {"number": number}
    plain = bundle.write(path, manifest, files)
    executable = OnnxRuntimeEngine().load(plain)
    levels = {}
    for level in (0, 2):
        before, after = self_test.losses(executable, plain, level, RATE)
        levels[str(level)] = {
            "learning_rate": RATE,
            "before": before.tolist(),
            "after": after.tolist(),
            "tolerance": 0.02,
        }
    fidelity = executable.policy(self_test.views(manifest["policy"]["view"]))
    manifest["self_test"] = {
        "levels": levels,
        "policy": {"fidelity": np.asarray(fidelity).tolist(), "tolerance": 1e-3},
    }
    return bundle.write(path, {**manifest, **changes}, files)


def quiet(line: str) -> None:
    """Hear what a deploy tells, and say nothing."""


class Device:
    """A board, and how it is deployed to. `write` makes another bundle of each number."""

    def __init__(
        self,
        board: sshd.Board,
        wheels: Path,
        work: Path,
        write: Callable[..., Bundle] = write,
    ) -> None:
        self.board = board
        self.options = DeployOptions(ssh_options=board.options, wheels=wheels, python=PYTHON)
        self._work = work
        self._write = write
        self._number = 0

    def bundle(self, **changes: Any) -> Bundle:
        """Another bundle each time."""
        self._number += 1
        return self._write(self._work / f"{self._number}.pbc", self._number, **changes)

    def deploy(
        self, bundle: Bundle, report: Callable[[str], None] = quiet, **options: Any
    ) -> dict[str, Any]:
        changed = replace(self.options, **options)
        return deployment.deploy(bundle.path, self.board.destination, changed, report)

    def status(self) -> dict[str, Any]:
        return deployment.status(self.board.destination, self.options)

    def rollback(self) -> None:
        deployment.rollback(self.board.destination, self.options, quiet)

    def pbc(self, *words: object) -> str:
        """Run what is active on the board, as its user would."""
        result = subprocess.run(
            [self.board.root / "bin" / "pbc", *(str(word) for word in words)],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/bin:/bin", "HOME": str(self.board.home), "COLUMNS": "200"},
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def active(self) -> str:
        """The digest of the bundle that the board's own pbc sees."""
        told = json.loads(self.pbc("inspect", self.board.root / "bundle.pbc", "--json"))
        return str(told["digest"])
