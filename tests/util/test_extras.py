"""Extras are installed from where pbc itself came."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from pbc.util.extras import install


def noted(monkeypatch: pytest.MonkeyPatch, url: str | None) -> None:
    """Let pip have noted that pbc came from there."""
    text = None if url is None else json.dumps({"url": url})
    monkeypatch.setattr(metadata.PathDistribution, "read_text", lambda self, name: text)
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.PathDistribution(Path()))


def test_from_an_index_it_is_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    noted(monkeypatch, None)
    assert install("compile", "onnx") == "pip install 'pbc[compile,onnx]'"


def test_from_a_folder_or_a_wheel_it_is_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = tmp_path / "a folder" / "pbc-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    noted(monkeypatch, wheel.as_uri())
    assert install("heic") == f"pip install '{wheel}[heic]'"
    noted(monkeypatch, wheel.parent.as_uri())
    monkeypatch.chdir(wheel.parent)
    assert install("heic") == "pip install '.[heic]'"


@pytest.mark.parametrize("url", ["file:///gone/pbc.whl", "https://example.org/pbc.whl"])
def test_what_is_not_here_is_not_named(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    noted(monkeypatch, url)
    assert install("heic") == "pip install 'pbc[heic]'"
