"""Some of what `make fuzz` runs for hours: mutated bundles, personal models and photos."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")


@pytest.mark.parametrize("engine", ["pytorch", "onnxruntime"])
def test_every_case_ends_with_a_status_and_at_most_one_line(engine: str, tmp_path: Path) -> None:
    words = ["--bundles", "60", "--models", "15", "--photos", "15", "--seed", "0"]
    result = subprocess.run(
        [sys.executable, str(CAMPAIGN), "--engine", engine, *words],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith(f"{engine}, seed 0: 90 commands (")
    assert result.stdout.endswith("; 0 faults\n")
