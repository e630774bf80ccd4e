"""Bundles with kernels for GPUs: what is in them, and what refuses them where no such GPU is."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_net
import numpy as np
import pytest
from click.testing import CliRunner, Result
from networks import ConvNet, split

from pbc import compiler
from pbc.bundle import Bundle
from pbc.cli import main
from pbc.errors import PbcError
from pbc.runtime.engines.tvm import cuda_kernels, nvrtc
from pbc.runtime.engines.tvm import devices as tvm_devices
from pbc.runtime.engines.tvm.devices import CPU, Device
from pbc.runtime.engines.tvm.engine import TvmEngine
from pbc.runtime.objective import Objective
from pbc.runtime.parameters import initial_parameters
from pbc.target import load_target
from pbc.targets.tvm.cuda import cubin, cubin_elf
from pbc.targets.tvm.lowering import TvmLowering
from pbc.testing import with_request

tvm = pytest.importorskip("tvm")

AARCH64 = 183


def pbc(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def source(folder: Path) -> Path:
    path = folder / "gpu_example_net.py"
    path.write_text(bench_net.SOURCE)
    return path


@pytest.fixture(scope="module")
def for_tx2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Bundle]:
    folder = tmp_path_factory.mktemp("tx2")
    path = folder / "m.pbc"
    result = pbc(
        "compile", f"{source(folder)}:factory", "--weights", "random", "--input", "3x16x16",
        "--levels", "0", "--target", "jetson-tx2", "-o", path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return result, Bundle.open(path)


def test_what_a_bundle_for_a_tx2_holds(for_tx2: tuple[Result, Bundle], tmp_path: Path) -> None:
    manifest = for_tx2[1].manifest
    assert manifest["engine"] == "tvm"
    calls = json.loads(for_tx2[1].read(manifest["calls"]))
    assert (calls["sm"], calls["machine"]) == (62, "aarch64")
    libraries = [file for file in manifest["files"] if file.endswith(".so")]
    assert sorted(libraries) == ["tvm/body-0.so", "tvm/prefix-0.so"]
    for file in libraries:
        content = for_tx2[1].read(file)
        (tmp_path / "library.so").write_bytes(content)
        (kernels,) = cubin.require(tmp_path / "library.so", 62)
        assert cubin_elf.architecture(kernels.cubin) == 62
        assert set(cubin_elf.kernels(kernels.cubin)) == set(
            re.findall(r"__global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(", kernels.source)
        )
        assert struct.unpack_from("<H", content, 18) == (AARCH64,)
        wanted = [tuple(map(int, v.split(b"."))) for v in re.findall(rb"GLIBC_([\d.]+)", content)]
        assert max(wanted, default=(0,)) <= (2, 27)
    assert max(manifest["checks"]["lowered_train_step"]["0"].values()) <= 1e-4


def test_compiling_says_what_the_board_must_have_and_what_nobody_has_seen(
    for_tx2: tuple[Result, Bundle],
) -> None:
    output, bundle = for_tx2[0].stdout, for_tx2[1]
    assert bundle.manifest["requires"]["libc"] == "glibc>=2.27"
    assert bundle.manifest["requires"]["cuda"] == ">=10.2"
    assert "docs/cuda.md" in bundle.manifest["by_hand"]["tvm runtime"]
    assert re.search(r"requires on the device: .*cuda >=10\.2.*built on the board", output)
    said = r"note: \d+ kernels are compiled for GPUs of sm_62, and were not run: checks ran"
    assert re.search(said, output)
    assert "Fallback instead of Transpose" in output


def test_another_machine_refuses_it_in_one_line(
    for_tx2: tuple[Result, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    photos = bench_net.photos(tmp_path / "photos")
    result = pbc("train", for_tx2[1].path, photos / "train", "-o", tmp_path / "out")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "is built for aarch64, this machine is x86_64: compile for it (pbc targets)" in line
    assert not (tmp_path / "out").exists()


@pytest.fixture
def on_its_machine(for_tx2: tuple[Result, Bundle], monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """The bundle where the processor is right, and no library is reached."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    return for_tx2[1]


def test_without_a_gpu_one_line_says_so(
    on_its_machine: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", absent)
    with pytest.raises(
        PbcError,
        match=r"m\.pbc is built for an NVIDIA GPU of sm_62: this machine has no driver of NVIDIA's "
        r"\(libcuda\.so\.1: .*\); run it where such a GPU is, or compile for this machine",
    ):
        TvmEngine().load(on_its_machine)


class Hopper:
    """A driver of another GPU than the bundle is for."""

    def sm(self) -> int:
        return 90


def test_kernels_for_another_gpu_are_refused_before_anything_is_loaded(
    on_its_machine: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_kernels, "CudaDriver", Hopper)
    words = r"for an NVIDIA GPU of sm_62: this machine's is of sm_90: compile for it \(pbc targets"
    with pytest.raises(PbcError, match=words):
        TvmEngine().load(on_its_machine)


def test_a_compiler_without_nvrtc_refuses_before_anything_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "_SONAMES", ("libabsent.so",))
    options = compiler.CompileOptions(target="jetson-tx2", weights="random", shape=(3, 16, 16))
    with pytest.raises(PbcError, match=r"pip install '.*\[cuda\]'"):
        compiler.start("no model is looked at", options)
    pi = replace(options, target="raspberry-pi-4b", engine="tvm")
    assert compiler.start(f"{source(tmp_path)}:factory", pi).request.engine == "tvm"


@pytest.mark.parametrize("target", [*(f"cuda-sm_{sm}" for sm in (53, 87)), "jetson-agx-thor"])
def test_kernels_for_old_and_new_architectures(target: str, tmp_path: Path) -> None:
    program = with_request(split(ConvNet), engine="tvm", target=load_target(target))
    lowering = TvmLowering()
    files, count = lowering.lower(program), 0
    for part in ("prefix", "body"):
        path = tmp_path / f"{part}.so"
        path.write_bytes(files[f"tvm/{part}-0.so"])
        (kernels,) = cubin.require(path, int(program.request.target.tags["sm"]))
        count += len(cubin_elf.kernels(kernels.cubin))
    assert lowering.notes()[0].startswith(f"{count} kernels are compiled")


# ---- where tensors are: TVM's second CPU stands for a GPU ------------------------------------

SECOND = Device(CPU.kind, 1)


@pytest.fixture(scope="module")
def for_here(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("here")
    options = compiler.CompileOptions(
        target="generic-x86-64", engine="tvm", weights="random", shape=(3, 16, 16), levels=0
    )
    return compiler.compile(f"{source(folder)}:factory", folder / "m.pbc", options)


def trained(executable: Any, bundle: Bundle, between: Callable[[], None]) -> list[np.ndarray]:
    """Two steps; then all that a device can ask for."""
    executable.start(initial_parameters(bundle, 3, 0), Objective("adam", 0.01))
    images = np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32)
    results = []
    for _ in range(2):
        features = executable.prefix(0, images)
        results += [*features.values(), *executable.forward(0, features, np.arange(4) % 3)]
        executable.update()
        between()
    results.append(executable.logits(0, features))
    for arrays in (executable.parameters(), executable.optimizer_state()):
        results += list(arrays.values())
    return results


def test_only_what_changes_is_copied(for_here: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = trained(TvmEngine().load(for_here, threads=1), for_here, lambda: None)
    monkeypatch.setattr("pbc.runtime.engines.tvm.engine._Loader._device", lambda *_: SECOND)
    copies: list[tuple[int, ...]] = []
    steps: list[list[tuple[int, ...]]] = []
    copied = tvm_devices.Device._copied

    def counted(self: Device, value: np.ndarray) -> Any:
        copies.append(value.shape)
        return copied(self, value)

    def between() -> None:
        steps.append(sorted(copies))
        copies.clear()

    monkeypatch.setattr(tvm_devices.Device, "_copied", counted)
    executable = TvmEngine().load(for_here, threads=1)
    found = trained(executable, for_here, between)
    for value, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(value, other)
    # The second step: its images, features and labels, and Adam's two corrections.
    assert steps[1] == sorted([(), (), (4,), (4, 3, 16, 16), (4, 32)])
    assert all(v.value.__dlpack_device__() == (1, 1) for v in executable._theta.values())
    (graph,) = (g for n, g in executable._loader._graphs.items() if n == "prefix/0")
    assert {held.__dlpack_device__() for held in graph._held} == {(1, 1)}
