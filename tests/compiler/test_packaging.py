from __future__ import annotations

import subprocess
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from distribution import build, copy_sources, modules


@pytest.fixture(scope="module")
def sources(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(root, tmp_path_factory.mktemp("sources"))


def test_sdist_and_wheel_hold_one_package_with_everything(
    root: Path, sources: Path, tmp_path: Path
) -> None:
    sdist = build("build_sdist", sources, tmp_path / "sdist")
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "xzf", str(sdist), "-C", str(tmp_path / "unpacked")], check=True)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = build("build_wheel", unpacked, tmp_path / "wheel")
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    assert {name.partition("/")[0] for name in names} == {"pbc"}
    assert {name for name in names if name.endswith(".py")} == modules(root)
    assert {"pbc/py.typed", "pbc/demo/digits.pbc", "pbc/demo/digits.png"} <= set(names)
    assert len(names) == len(set(names))


def test_setup_cfg_lists_every_package(root: Path) -> None:
    config = ConfigParser()
    config.read(root / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    there = {name.rpartition("/")[0].replace("/", ".") for name in modules(root)}
    assert listed == there


def test_the_links_that_type_checkers_follow(root: Path) -> None:
    for folder in ("passes", "targets"):
        link = root / "pbc" / folder
        assert link.is_symlink()
        assert link.readlink() == Path("..") / folder


def test_the_embedded_assets_are_small(root: Path) -> None:
    files = [file for file in (root / "examples").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 14_000_000
