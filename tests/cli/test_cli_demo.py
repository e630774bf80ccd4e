from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

from pbc.cli import main
from pbc.demo import digits


def test_the_demo_teaches_what_it_says(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = CliRunner().invoke(main, ["demo", "-o", str(out)], prog_name="pbc")
    assert result.exit_code == 0, result.output
    *_, seen, accuracy, time, report = result.stdout.splitlines()
    assert " 6 " in seen
    found = re.match(r"accuracy: ([\d.]+)% of 314 scans that it has not seen \(", accuracy)
    assert found is not None
    assert float(found.group(1)) > 95
    assert re.fullmatch(r"time: [\d.]+ s to learn from 400 scans, with onnxruntime", time)
    assert report == f"report: {out / 'report.html'}"
    assert 'class="matrix"' in (out / "report.html").read_text()
    again = CliRunner().invoke(main, ["demo", "-o", str(out)], prog_name="pbc")
    assert again.exit_code == 1
    assert "exists already; give a folder that does not" in again.stderr


def test_the_demo_is_small_and_its_picture_whole() -> None:
    assert digits.SHEET.stat().st_size + digits.BUNDLE.stat().st_size < 300_000
    found = [len(digits.of(digit)) for digit in range(10)]
    assert tuple(found) == digits.COUNTS
    assert all(tile.getextrema() != (0, 0) for digit in range(10) for tile in digits.of(digit))
