"""Requirements are names and versions, and nothing that pip would act on otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from pbc import bundle
from pbc.bundle.requires import checked, told_apart
from pbc.deploy.requirements import device_requirements
from pbc.errors import PbcError


@pytest.mark.parametrize(
    "wanted", [">=2.9,<2.14", "==0.1.14.post1", ">=0.27, <0.28", "~=1.4.2", "!=2.0.*", ">=1.0rc1"]
)
def test_versions_as_pep_440_has_them(wanted: str) -> None:
    checked({"torch": wanted, "python": ">=3.10", "libc": "glibc>=2.28", "jetpack": "4.6"})


@pytest.mark.parametrize(
    "wanted",
    [
        " @ file:///tmp/evil.whl", "@ https://x/evil.whl", ">=1; python_version > '3'",
        "[extra]>=1", ">=1 --index-url http://x", "", "newest", "===1.0", ">=1\n--pre", ">=1,",
        ">=1 <2", ">=" + "1." * 200 + "0", "==1.*.2", "1.0", None, 5, [">=1"],
    ],
)  # fmt: skip
def test_all_else_is_refused_when_a_bundle_is_opened(wanted: Any, tmp_path: Path) -> None:
    manifest, files = tiny.contents()
    with pytest.raises(PbcError, match=r"requires 'onnxruntime' as .*only versions are read"):
        bundle.write(tmp_path / "b.pbc", {**manifest, "requires": {"onnxruntime": wanted}}, files)


@pytest.mark.parametrize("name", ["", "-r", "a b", "a[x]", "a@b", "../x", "a;b", "a\n"])
def test_a_name_is_that_of_one_package(name: str) -> None:
    with pytest.raises(PbcError, match="requires names"):
        checked({name: ">=1"})


def test_only_names_that_pbc_asks_for_reach_pip() -> None:
    manifest = {"engine": "onnxruntime", "requires": {"onnxruntime": ">=1.20", "evil": ">=1"}}
    with pytest.raises(PbcError, match="requires 'evil', which this pbc does not know"):
        device_requirements(manifest)
    with pytest.raises(PbcError, match="only versions are read"):
        device_requirements({"engine": "onnxruntime", "requires": {"onnxruntime": " @ file:///x"}})


def test_words_for_the_boards_owner_stand_apart() -> None:
    versions, words = told_apart({"libc": "bionic", "numpy": "as Termux packages it"})
    assert versions == {"libc": "bionic"}
    assert words == {"numpy": "as Termux packages it"}
