"""Continuous integration fails for a skip that nobody listed, and only there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import skips

SOURCE = """
import pytest


@pytest.mark.skipif(True, reason={reason!r})
def test_skipped():
    raise AssertionError


@pytest.mark.xfail(strict=True)
def test_known():
    raise AssertionError


def test_passing():
    assert True
"""
MODULE = 'import pytest\n\npytest.importorskip("a_package_that_nobody_has")\n'


def run(folder: Path, source: str, workers: int, ci: str | None) -> tuple[int, str]:
    (folder / "test_example.py").write_text(source)
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment["PYTHONPATH"] = str(Path(skips.__file__).parent)
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    words = ["-p", "xdist", "-n", str(workers)] if workers else []
    if ci is not None:
        environment["CI"] = ci
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "skips", "-p", "no:cacheprovider", "-c", os.devnull,
         "--rootdir", str(folder), *words, str(folder)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.returncode, result.stdout


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unlisted_skip_fails_in_ci_and_is_named(tmp_path: Path, workers: int) -> None:
    source = SOURCE.format(reason="the moon is full")
    code, shown = run(tmp_path, source, workers, "true")
    assert code == pytest.ExitCode.TESTS_FAILED, shown
    assert "test_example.py::test_skipped: the moon is full" in shown
    assert "test_known" not in shown


def test_elsewhere_it_passes(tmp_path: Path) -> None:
    source = SOURCE.format(reason="the moon is full")
    assert run(tmp_path, source, 0, None)[0] == pytest.ExitCode.OK


@pytest.mark.parametrize("workers", [0, 1])
def test_a_module_that_is_skipped_counts_too(tmp_path: Path, workers: int) -> None:
    (tmp_path / "test_other.py").write_text("def test_passing():\n    assert True\n")
    code, shown = run(tmp_path, MODULE, workers, "true")
    assert code == pytest.ExitCode.TESTS_FAILED, shown
    assert "could not import 'a_package_that_nobody_has'" in shown


def test_a_listed_skip_passes(tmp_path: Path) -> None:
    source = SOURCE.format(reason="needs glibc")
    assert run(tmp_path, source, 0, "true")[0] == pytest.ExitCode.OK


def test_every_listed_reason_is_one_that_a_test_gives() -> None:
    folder = Path(__file__).parent
    sources = [
        path.read_text() for path in folder.rglob("*.py") if path.name not in
        (Path(__file__).name, Path(skips.__file__).name)
    ]  # fmt: skip
    for reason in skips.ALLOWED:
        assert any(f'"{reason}"' in source for source in sources), reason
