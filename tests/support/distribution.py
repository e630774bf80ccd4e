"""The sources as a distribution: what the tests of packaging and of installations build."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

_BUILD = "import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"


def copy_sources(root: Path, copy: Path) -> Path:
    """Copy what a distribution is built from: building leaves its litter there."""
    for folder in ("pbc", "passes", "targets"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / folder, copy / folder, symlinks=True, ignore=ignore)
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(root / file, copy / file)
    return copy


def build(hook: str, sources: Path, out: Path) -> Path:
    """Build an sdist or a wheel of the sources with the build backend itself, offline."""
    subprocess.run(
        [sys.executable, "-c", _BUILD.format(hook=hook), str(out)],
        cwd=sources,
        check=True,
        capture_output=True,
    )
    (built,) = out.iterdir()
    return built


def modules(root: Path) -> set[str]:
    """Every Python file of the package, by its path in an installation."""
    return {
        f"pbc/{file.relative_to(root).as_posix()}".replace("pbc/pbc/", "pbc/")
        for folder in ("pbc", "passes", "targets")
        for file in (root / folder).rglob("*.py")
        if not (folder == "pbc" and file.relative_to(root).parts[1] in ("passes", "targets"))
    }
