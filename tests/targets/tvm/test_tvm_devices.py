"""Tensors move between the CPU's memory and a device's: here TVM's second CPU stands for a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pbc.errors import PbcError
from pbc.runtime.engines.tvm import cuda_kernels
from pbc.runtime.engines.tvm.devices import CPU, GPU, Device, in_numpy, use_gpu
from pbc.runtime.engines.tvm.library import runtime

pytest.importorskip("tvm_ffi")

SECOND = Device(CPU.kind, 1)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
        np.array(0.5, np.float32),
        np.arange(5, dtype=np.int64),
        np.array([True, False]),
        np.zeros((0, 3), np.float32),
    ],
    ids=["matrix", "transposed", "scalar", "labels", "flags", "empty"],
)
def test_a_tensor_comes_back_as_it_went(value: np.ndarray) -> None:
    own = runtime().from_dlpack(np.ascontiguousarray(value) if value.ndim else value)
    assert CPU.placed(own) is own
    there = SECOND.placed(own)
    assert there.__dlpack_device__() == (1, 1)
    assert SECOND.placed(there) is there
    back = in_numpy(there)
    assert back.dtype == value.dtype
    assert back.shape == value.shape
    np.testing.assert_array_equal(back, value)


def test_the_cpu_is_beside_every_other_device() -> None:
    assert CPU.initialization() == (1, 0, 2)
    assert GPU.initialization() == (2, 0, 2, 1, 0, 2)


class Pascal:
    """The driver of a TX2's GPU."""

    def sm(self) -> int:
        return 62


@pytest.fixture
def on_a_tx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a driver answer; what is behind it is not reached."""
    monkeypatch.setattr(cuda_kernels, "CudaDriver", Pascal)


@pytest.mark.parametrize(
    ("own", "built", "runs"), [(62, 62, True), (89, 86, True), (86, 89, False), (72, 62, False)]
)
def test_machine_code_runs_on_its_own_architecture_and_minor_ones_after_it(
    own: int, built: int, runs: bool
) -> None:
    assert cuda_kernels.runs_on(own, built) == runs


@pytest.mark.usefixtures("on_a_tx2")
def test_a_runtime_without_its_part_for_gpus_is_refused(tmp_path: Path) -> None:
    drives = runtime().get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True)
    assert drives is None, "this process must not load the part for GPUs"
    for runtime_path in (tmp_path / "libtvm_runtime.so", Path("libtvm_runtime.so")):
        with pytest.raises(PbcError, match=r"TVM runtime .* drives none; docs/cuda\.md"):
            use_gpu(62, runtime_path)


@pytest.mark.usefixtures("on_a_tx2")
def test_a_gpu_of_another_kind_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(PbcError, match="is of sm_62: compile for it"):
        use_gpu(53, tmp_path / "libtvm_runtime.so")


@pytest.mark.usefixtures("on_a_tx2")
def test_where_the_part_for_gpus_cannot_be_loaded_the_reason_is_named(tmp_path: Path) -> None:
    runtime()
    (tmp_path / "libtvm_runtime_cuda.so").write_bytes(b"no library")
    with pytest.raises(PbcError, match=r"part for it cannot be loaded.*docs/cuda\.md"):
        use_gpu(62, tmp_path / "libtvm_runtime.so")
