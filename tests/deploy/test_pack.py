from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tarfile
from pathlib import Path

import deploying
import pytest
import wheelhouse
from click.testing import CliRunner

from pbc import bundle as bundles
from pbc.cli import main
from pbc.deploy import pack as pack_module
from pbc.deploy.pack import PackOptions, pack
from pbc.errors import PbcError, UsageError
from pbc.target import load_target

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
PYTHON = os.path.realpath(sys.executable)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deploying.wheels(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="module")
def archive(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    bundle = deploying.write(folder / "net.pbc")
    pack(bundle.path, folder / "net.tar", PackOptions(python=VERSION, libc=glibc(), wheels=wheels))
    return folder / "net.tar"


def glibc() -> str:
    return os.confstr("CS_GNU_LIBC_VERSION").split()[1]  # type: ignore[union-attr]


def unpacked(archive: Path, folder: Path) -> Path:
    folder.mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)
    return folder


def activate(folder: Path, root: Path, python: str = PYTHON) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", folder / "activate.sh", root],
        env={"PATH": "/usr/bin:/bin", "PYTHON": python, "HOME": str(root.parent)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_same_bytes_each_time(archive: Path, wheels: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.tar"
    options = PackOptions(python=VERSION, libc=glibc(), wheels=wheels)
    told = pack(archive.with_name("net.pbc"), again, options)
    assert again.read_bytes() == archive.read_bytes()
    assert (told["python"], told["bytes"]) == (VERSION, archive.stat().st_size)


def test_files_are_named_by_their_content(archive: Path) -> None:
    with tarfile.open(archive) as opened:
        plan = json.load(opened.extractfile("plan.json"))  # type: ignore[arg-type]
        names = set(opened.getnames())
        for name in names:
            entry = opened.getmember(name)
            assert (entry.mtime, entry.uid, entry.gid) == (0, 0, 0)
            if name.startswith("files/"):
                data = opened.extractfile(name).read()  # type: ignore[union-attr]
                assert name == f"files/{hashlib.sha256(data).hexdigest()}"
    files = [*plan["slot"], *plan["wheels"]]
    assert {f"files/{file['sha256']}" for file in files} < names


def test_activation_does_what_a_deploy_does(archive: Path, tmp_path: Path) -> None:
    folder, root = unpacked(archive, tmp_path / "unpacked"), tmp_path / "pbc"
    result = activate(folder, root)
    assert result.returncode == 0, result.stderr
    steps = [line.removesuffix(" …") for line in result.stdout.splitlines()[:-1]]
    assert steps == [
        "compare", "packages", "slot", "signature", "self-test", "mark complete", "switch", "prune",
    ]  # fmt: skip
    told = subprocess.run(
        [root / "bin" / "pbc", "inspect", root / "bundle.pbc", "--json"],
        capture_output=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    digest = bundles.Bundle.open(archive.with_name("net.pbc")).digest
    assert json.loads(told.stdout)["digest"] == digest
    again = activate(folder, root)
    assert again.returncode == 0, again.stderr
    assert "packages" not in again.stdout
    assert "switch" not in again.stdout


def test_an_archive_that_lacks_a_file_changes_nothing(archive: Path, tmp_path: Path) -> None:
    folder, root = unpacked(archive, tmp_path / "unpacked"), tmp_path / "pbc"
    plan = json.loads((folder / "plan.json").read_text())
    (manifest,) = (f for f in plan["slot"] if f["path"] == "bundle.pbc/manifest.json")
    stored = folder / "files" / manifest["sha256"]
    stored.write_bytes(bytes(manifest["size"]))
    result = activate(folder, root)
    assert result.returncode == 1
    assert result.stderr == "error: bundle.pbc/manifest.json arrived damaged: deploy again\n"
    stored.unlink()
    result = activate(folder, root)
    assert result.stderr == ("error: the archive lacks bundle.pbc/manifest.json: unpack it again\n")
    assert not (root / "current").is_symlink()


def test_another_python_is_refused(archive: Path, tmp_path: Path) -> None:
    folder = unpacked(archive, tmp_path / "unpacked")
    (folder / "python-version").write_text("3.99\n")
    result = activate(folder, tmp_path / "pbc")
    assert result.returncode == 1
    assert f"{PYTHON} is Python {VERSION}; needed is Python 3.99" in result.stderr
    assert not (tmp_path / "pbc").exists()
    result = activate(folder, tmp_path / "pbc", python="/bin/false")
    assert "no Python was found; needed is Python 3.99" in result.stderr


def test_a_board_that_does_not_fit_is_refused(archive: Path, tmp_path: Path) -> None:
    folder = unpacked(archive, tmp_path / "unpacked")
    plan = json.loads((folder / "plan.json").read_text())
    plan["needs"]["arch"] = "riscv64"
    plan["needs"]["requires"]["libc"] = "glibc>=2.99"
    (folder / "plan.json").write_text(json.dumps(plan))
    result = activate(folder, tmp_path / "pbc")
    assert result.returncode == 1
    arch, libc = result.stderr.splitlines()
    assert arch.endswith("; the bundle is for riscv64")
    assert libc.endswith("; needed is glibc>=2.99")
    assert not (tmp_path / "pbc").exists()


def test_wheels_that_are_not_there(tmp_path: Path) -> None:
    bundle = deploying.write(tmp_path / "net.pbc")
    some = wheelhouse.fill(tmp_path / "some", ["click"])
    with pytest.raises(PbcError, match=r"cannot collect wheels for Python .*: .*requirement pip"):
        pack(bundle.path, tmp_path / "net.tar", PackOptions(wheels=some))
    with pytest.raises(PbcError, match="no folder of wheels at"):
        pack(bundle.path, tmp_path / "net.tar", PackOptions(wheels=tmp_path / "none"))
    with pytest.raises(PbcError, match="were collected here yet: leave --offline out once"):
        pack(bundle.path, tmp_path / "net.tar", PackOptions(offline=True))
    assert not (tmp_path / "net.tar").exists()


def test_a_bundle_for_this_machine_is_packed_for_its_python(wheels: Path, tmp_path: Path) -> None:
    target = load_target("host").to_json()
    assert target["tags"]["python"] == platform.python_version()  # with the patch version
    bundle = deploying.write(tmp_path / "net.pbc", target=target)
    told = pack(bundle.path, tmp_path / "net.tar", PackOptions(wheels=wheels))
    assert (told["python"], told["arch"]) == (VERSION, platform.machine())


@pytest.mark.parametrize("version", ["3.11", "3.11.2", "3.11.0rc1", "3.11.2+"])
def test_wheels_are_chosen_by_the_minor_version_of_python(version: str) -> None:
    manifest = {"requires": {}, "target": {"arch": "x86_64", "tags": {"python": version}}}
    for options in (PackOptions(), PackOptions(python=version)):
        python = pack_module._board_python(manifest, options)
        assert (python.version, python.abi) == ("3.11", "cp311")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (PackOptions(python="3.9"), "--python-version is '3.9'; expected 3.10 or newer"),
        (PackOptions(python="three"), "--python-version is 'three'"),
        (PackOptions(python="3.11.x.y"), "--python-version is '3.11.x.y'"),
        (PackOptions(libc="musl"), "--libc is 'musl'; expected glibc's version"),
    ],
)
def test_wrong_options(options: PackOptions, error: str, tmp_path: Path) -> None:
    bundle = deploying.write(tmp_path / "net.pbc")
    with pytest.raises(UsageError, match=error):
        pack(bundle.path, tmp_path / "net.tar", options)


def test_the_command(wheels: Path, tmp_path: Path) -> None:
    bundle = deploying.write(tmp_path / "net.pbc")
    out = tmp_path / "net.tar"
    words = ["pack", str(bundle.path), "-o", str(out), "--wheels", str(wheels),
             "--python-version", VERSION, "--libc", glibc()]  # fmt: skip
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert f"for Python {VERSION} on " in result.output
    assert json.loads(CliRunner().invoke(main, [*words, "--json"]).output)["archive"] == str(out)
