"""The notebooks run from the first cell to the last."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra dev is not installed")
NOTEBOOKS = ("first_model", "levels")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, root: Path, tmp_path: Path) -> None:
    from nbclient import NotebookClient

    examples = tmp_path / "examples"
    examples.mkdir()
    for part in ("photos", "weights", "digits"):
        (examples / part).symlink_to(root / "examples" / part)
    shutil.copytree(root / "examples" / "notebooks", examples / "notebooks")
    notebook = nbformat.read(examples / "notebooks" / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # what is stored grows stale
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": examples / "notebooks"}}
    ).execute()
    told = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    found = re.search(r"([\d.]+)% on the test photos", told)
    assert found is None or float(found.group(1)) > 60
