"""What a board needs installed, and pbc itself as a wheel."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import subprocess
import sys
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from distribution import modules

import pbc
from pbc.deploy import libraries
from pbc.deploy.own_wheel import own_wheel
from pbc.deploy.requirements import device_requirements
from pbc.deploy.wheels import BoardPython, board_python, collect
from pbc.errors import PbcError

PI = BoardPython("3.12", "cp312", "aarch64", (2, 36))


@pytest.mark.parametrize(
    ("engine", "requires", "brought"),
    [
        ("onnxruntime", {"onnxruntime": ">=1.20"}, {"onnxruntime>=1.20"}),
        ("pytorch", {"torch": ">=2.9,<2.14"}, {"torch<2.14,>=2.9", "torch>=2.9,<2.14"}),
        ("onnxruntime", {"onnxruntime": ">=1.20,<1.29"}, {"onnxruntime>=1.20,<1.29"}),
    ],
)
def test_what_an_engine_needs(engine: str, requires: dict[str, str], brought: set[str]) -> None:
    found = device_requirements({"engine": engine, "requires": {"python": ">=3.10", **requires}})
    assert brought <= set(found)
    names = {requirement.split("<")[0].split(">")[0] for requirement in found}
    engines = {"onnxruntime", "torch"}
    assert names & engines == requires.keys() & engines
    assert {"click", "numpy", "pillow", "rich", "safetensors"} < names


def test_an_engine_that_no_extra_brings() -> None:
    manifest = {"engine": "onnxruntime", "requires": {"python": ">=3.10"}}
    with pytest.raises(PbcError, match="no extra of pbc brings engine 'onnxruntime' to a device"):
        device_requirements(manifest)


def test_the_wheel_of_this_pbc(root: Path, tmp_path: Path) -> None:
    name, data = own_wheel()
    assert name == f"pbc-{pbc.__version__}-py3-none-any.whl"
    assert own_wheel.__wrapped__() == (name, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
    assert {entry for entry in files if entry.endswith(".py")} == modules(root)
    assert {"pbc/py.typed", "pbc/deploy/probe.sh", "pbc/bench/report/report.css"} <= files.keys()
    info = f"pbc-{pbc.__version__}.dist-info"
    rows = list(csv.reader(files[f"{info}/RECORD"].decode().splitlines()))
    assert {row[0] for row in rows} == files.keys()
    for entry, digest, size in rows[:-1]:
        found = base64.urlsafe_b64encode(hashlib.sha256(files[entry]).digest()).rstrip(b"=")
        assert (digest, size) == (f"sha256={found.decode()}", str(len(files[entry])))


def test_the_wheel_installs_and_lists_its_plugins(tmp_path: Path) -> None:
    name, data = own_wheel()
    (tmp_path / name).write_bytes(data)
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
         "--no-index", "--disable-pip-version-check", tmp_path / name],
        check=True, cwd=tmp_path,
    )  # fmt: skip
    code = "from importlib.metadata import entry_points as e; print(*e(group='pbc.engines').names)"
    told = subprocess.run(
        [python, "-I", "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert {"onnxruntime", "pytorch"} <= set(told.stdout.split())


def test_the_tags_of_a_board() -> None:
    tags = PI.platforms
    assert tags[0] == "manylinux_2_36_aarch64"
    assert tags[-3:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64", "linux_aarch64"]
    old = BoardPython("3.10", "cp310", "x86_64", (2, 17)).platforms
    assert old[0] == "manylinux_2_17_x86_64"
    assert "manylinux2010_x86_64" in old


def test_the_facts_of_a_board() -> None:
    facts = {
        "machine": "arm64",
        "libc": "glibc 2.36",
        "python_version": "3.12",
        "python_abi": "312",
    }
    assert board_python(facts) == PI


def wheel(folder: Path, name: str, *requires: str, tag: str = "py3-none-any") -> None:
    """An empty wheel with requirements."""
    info = f"{name}-1.0.dist-info"
    metadata = "".join(
        [f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"]
        + [f"Requires-Dist: {requirement}\n" for requirement in requires]
    )
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(
            f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
        )
        archive.writestr(f"{info}/RECORD", "")


def names(found: list[Path]) -> list[str]:
    return [path.name for path in found]


def test_markers_are_the_boards(tmp_path: Path) -> None:
    """Of what is required somewhere alone, that comes which the board needs; not this machine."""
    house = tmp_path / "house"
    wheel(house, "pip")
    wheel(
        house, "engine",
        'arm; platform_machine == "aarch64"', 'intel; platform_machine != "aarch64"',
        'new; python_version >= "3.12"', 'old; python_version < "3.12"',
        tag="cp312-cp312-manylinux_2_28_aarch64",
    )  # fmt: skip
    for name in ("arm", "intel", "new", "old"):
        wheel(house, name)
    for_pi = collect(["engine"], PI, wheels=house)
    assert names(for_pi) == [
        "arm-1.0-py3-none-any.whl",
        "engine-1.0-cp312-cp312-manylinux_2_28_aarch64.whl",
        "new-1.0-py3-none-any.whl",
        "pip-1.0-py3-none-any.whl",
    ]
    with pytest.raises(PbcError, match=r"cannot collect wheels for Python 3.11 on aarch64"):
        collect(["engine"], replace(PI, version="3.11", abi="cp311"), wheels=house)
    with pytest.raises(PbcError, match=r"with glibc 2.27: .*engine"):
        collect(["engine"], replace(PI, glibc=(2, 27)), wheels=house)


def test_a_changed_folder_is_looked_at_again(tmp_path: Path) -> None:
    house = tmp_path / "house"
    wheel(house, "pip")
    wheel(house, "acme")
    assert len(collect(["acme"], PI, wheels=house)) == 2
    wheel(house, "acme", "more")
    with pytest.raises(PbcError, match="requirement more"):
        collect(["acme"], PI, wheels=house)
    wheel(house, "more")
    assert len(collect(["acme"], PI, wheels=house)) == 3


def test_a_library_out_of_a_wheel(tmp_path: Path) -> None:
    house = tmp_path / "house"
    house.mkdir()
    tag = "py3-none-manylinux_2_28_aarch64"
    with zipfile.ZipFile(house / f"apache_tvm-0.27.0-{tag}.whl", "w") as archive:
        archive.writestr("tvm/lib/libtvm_runtime.so", b"runtime")
        archive.writestr("tvm/lib/libtvm_runtime_cuda.so", b"cuda")
        archive.writestr("tvm/lib/libtvm_compiler.so", b"compiler")
        info = "apache_tvm-0.27.0.dist-info"
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: apache-tvm\nVersion: 0.27.0\nRequires-Dist: gone\n",
        )
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    manifest = {"engine": "tvm", "requires": {"tvm": ">=0.27"}}
    runtime, cuda = libraries.libraries(manifest, PI, wheels=house, offline=False)
    assert runtime == libraries.Library("lib/libtvm_runtime.so", b"runtime", "PBC_TVM_RUNTIME")
    assert cuda == libraries.Library("lib/libtvm_runtime_cuda.so", b"cuda", None)
    own = {"engine": "tvm", "requires": {}, "by_hand": {"tvm runtime": "built on the board"}}
    assert libraries.libraries(own, PI, wheels=house, offline=False) == []
    other = {"engine": "onnxruntime", "requires": {}}
    assert libraries.libraries(other, PI, wheels=house, offline=False) == []
