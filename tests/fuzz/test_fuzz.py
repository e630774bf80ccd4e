"""A minute of the campaign that `make fuzz` runs for hours: mutated bundles and personal models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")


@pytest.mark.parametrize("engine", ["pytorch", "onnxruntime"])
def test_every_case_ends_with_a_status_and_at_most_one_line(engine: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [
            sys.executable, str(CAMPAIGN), "--engine", engine, "--bundles", "12", "--models", "2",
            "--seed", "0",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(f"{engine}: 12 bundles, 2 models, 0 faults\n")
