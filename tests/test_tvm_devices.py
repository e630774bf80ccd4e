"""Tensors move between the CPU's memory and a device's: here TVM's second CPU stands for a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pbc.errors import PbcError
from pbc.runtime.tvm_devices import CPU, GPU, Device, in_numpy, use_gpu
from pbc.runtime.tvm_library import runtime

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
    ids=["matrix", "turned", "scalar", "labels", "flags", "empty"],
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


def test_a_runtime_without_its_part_for_gpus_is_refused(tmp_path: Path) -> None:
    drives = runtime().get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True)
    assert drives is None, "this process must not load the part for GPUs"
    with pytest.raises(PbcError, match=r"built for an NVIDIA GPU.* drives none; docs/cuda\.md"):
        use_gpu(tmp_path / "libtvm_runtime.so")


def test_where_the_part_for_gpus_cannot_be_loaded_the_reason_is_named(tmp_path: Path) -> None:
    runtime()
    (tmp_path / "libtvm_runtime_cuda.so").write_bytes(b"no library")
    with pytest.raises(PbcError, match=r"part for NVIDIA GPUs cannot be loaded.*docs/cuda\.md"):
        use_gpu(tmp_path / "libtvm_runtime.so")
