"""Deploys of bundles whose engine is TVM: its runtime comes to the board without the compiler."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sshd
import tiny
import wheelhouse
from deploying import Device
from networks import ConvNet, pruned

from pbc import bundle as bundles
from pbc import compiler
from pbc.bundle import Bundle
from pbc.errors import PbcError
from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.passes.fold_batch_norm import FoldBatchNorm
from pbc.passes.lower import Lower
from pbc.targets.tvm.device_libraries import RUNTIME
from pbc.testing import run_passes, with_request

pytestmark = pytest.mark.skipif(None in (sshd.SSHD, sshd.SSH), reason=sshd.MISSING)

INSTALLED = ("pip", "apache-tvm-ffi", "click", "numpy", "pillow", "rich", "safetensors")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an index has for the board; of TVM's own wheel the part that a deploy reads."""
    house = wheelhouse.fill(tmp_path_factory.mktemp("wheels"), INSTALLED)
    wheelhouse.part(house, "apache-tvm", RUNTIME.members)
    return house


@pytest.fixture(scope="module")
def device(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    lowered = with_request(pruned(ConvNet, levels=1), engine="tvm")
    manifest, files = compiler.package(
        run_passes(lowered, FoldBatchNorm(), DeriveTrainStep(), Lower())
    )

    def write(path: Path, number: int, **changes: Any) -> Bundle:
        return bundles.write(path, {**manifest, "provenance": {"number": number}, **changes}, files)

    with sshd.board(tmp_path_factory.mktemp("board")) as board:
        device = Device(board, wheels, tmp_path_factory.mktemp("work"), write)
        first = device.bundle()
        outcome = device.deploy(first)["self_test"]
        assert outcome["passed"]
        assert "level 0" in outcome["errors"]
        assert device.active() == first.digest
        yield device


def test_the_board_has_the_runtime_and_not_the_compiler(device: Device) -> None:
    (slot,) = (device.board.root / "slots").iterdir()
    brought = {Path(member).name for member in RUNTIME.members}
    assert {path.name for path in (slot / "lib").iterdir()} == brought
    (packages,) = (device.board.root / "packages").iterdir()
    installed = {path.name for path in (packages / "site").iterdir()}
    assert "tvm_ffi" in installed
    assert not installed & {"tvm", "torch", "onnxruntime"}


def test_the_board_trains_with_what_was_brought(device: Device, tmp_path: Path) -> None:
    photos = tiny.photos(tmp_path / "photos")
    model = tmp_path / "mine"
    device.pbc("train", device.board.root / "bundle.pbc", photos, "-o", model, "--epochs", "2")
    evaluated = json.loads(device.pbc("eval", model, photos, "--json"))
    assert evaluated["count"] == 18


def test_a_second_version_and_back(device: Device) -> None:
    before, second = device.active(), device.bundle()
    said: list[str] = []
    device.deploy(second, said.append)
    assert [line.split()[1] for line in said if line.startswith("copy ")] == [
        "bundle.pbc/manifest.json"
    ]
    assert device.active() == second.digest
    device.rollback()
    assert device.active() == before


@pytest.mark.parametrize(
    ("size", "error"), [(40, "file too short"), (100_000, "the self-test was ended by SIGBUS")]
)
def test_a_runtime_that_cannot_be_loaded_is_not_activated(
    device: Device, tmp_path: Path, size: int, error: str
) -> None:
    before = device.active()
    house = tmp_path / "wheels"
    house.mkdir()
    assert device.options.wheels is not None
    for wheel in device.options.wheels.iterdir():
        if not wheel.name.startswith("apache_tvm-"):
            (house / wheel.name).symlink_to(wheel)
    wheelhouse.part(house, "apache-tvm", RUNTIME.members, size)
    with pytest.raises(PbcError, match=error):
        device.deploy(device.bundle(), wheels=house)
    assert device.active() == before
    assert device.status()["half_made"] == []


def test_code_for_another_cpu_is_not_activated(device: Device) -> None:
    """The self-test refuses it in a line: calling it would end the process."""
    before, other = device.active(), device.bundle()
    files = {name: other.read(name) for name in other.manifest["files"]}
    calls = json.loads(files[other.manifest["calls"]])
    files[other.manifest["calls"]] = json.dumps({**calls, "machine": "riscv64"}).encode()
    changed = bundles.write(other.path, other.manifest, files)
    with pytest.raises(PbcError, match="is built for riscv64, this machine is"):
        device.deploy(changed)
    assert device.active() == before
