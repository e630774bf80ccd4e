"""The documentation builds as a site, without a link that leads nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pbc import plugins
from pbc.cli import COMMANDS

pytest.importorskip("mkdocs", reason="the extra docs is not installed")


def test_the_site_builds_strictly(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = (tmp_path / "reference" / "plugins" / "index.html").read_text()
    assert all(f"<code>{name}</code>" in listed for name in plugins.entries("pbc.passes"))
    described = (tmp_path / "reference" / "commands" / "index.html").read_text()
    assert all(f'id="pbc-{name}"' in described for name in COMMANDS)
    assert "held out" in (tmp_path / "index.html").read_text()
    # No page of a reader's asks another host for anything.
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert 'src="http' not in text, page
        assert 'rel="stylesheet" href="http' not in text, page


@pytest.mark.parametrize(("script", "name"), [("chart", "demo"), ("frontier", "compression")])
def test_the_chart_shows_what_is_in_its_file(
    root: Path, tmp_path: Path, script: str, name: str
) -> None:
    assets = root / "docs" / "assets"
    drawn = tmp_path / f"{name}.svg"
    command = [sys.executable, str(root / "docs" / f"{script}.py"), str(assets / f"{name}.json")]
    subprocess.run([*command, str(drawn)], check=True)
    assert drawn.read_text() == (assets / f"{name}.svg").read_text()
