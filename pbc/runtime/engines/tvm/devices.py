"""The memory of a TVM library's tensors: the CPU's, or that of a GPU beside it."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pbc.errors import PbcError
from pbc.runtime.engines.tvm import cuda_kernels

_CPU, _CUDA = 1, 2  # as DLPack numbers kinds of devices
_POOLED_ALLOCATOR = 2
_CUDA_RUNTIME = "libtvm_runtime_cuda.so"
_LOADER = "ffi.Module.load_from_bytes.cuda"


@dataclass(frozen=True)
class Device:
    """A device that runs a library's functions; its tensors are in this device's memory.

    Only a second device needs copies. Beside a GPU, the CPU computes the sizes of tensors.
    """

    kind: int = _CPU
    index: int = 0

    def initialization(self) -> Sequence[int]:
        """Return what TVM's virtual machine is told: each device, and how it allocates there."""
        beside = () if self == CPU else (CPU.kind, CPU.index, _POOLED_ALLOCATOR)
        return (self.kind, self.index, _POOLED_ALLOCATOR, *beside)

    def placed(self, value: Any) -> Any:
        """Return the runtime's tensor in this device's memory: itself, or a copy."""
        if _place(value) == (self.kind, self.index):
            return value
        return self._copied(in_numpy(value))

    def _copied(self, value: np.ndarray) -> Any:
        import tvm_ffi

        source = np.asarray(value, order="C")
        made = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")(
            tvm_ffi.Shape(source.shape),
            tvm_ffi.dtype(str(source.dtype)),
            tvm_ffi.device(self.kind, self.index),
            None,
        )
        tvm_ffi.get_global_func("runtime.TVMTensorCopyFromBytes")(
            made, ctypes.c_void_p(source.ctypes.data), source.nbytes
        )
        return made


CPU = Device()
GPU = Device(_CUDA)


def in_numpy(value: Any) -> np.ndarray:
    """Return the values of the runtime's tensor: a view of the CPU's memory, or a copy to it."""
    import tvm_ffi

    if _place(value) == (CPU.kind, CPU.index):
        return np.from_dlpack(value)
    made = np.empty(tuple(value.shape), np.dtype(str(value.dtype)))
    tvm_ffi.get_global_func("runtime.TVMTensorCopyToBytes")(
        value, ctypes.c_void_p(made.ctypes.data), made.nbytes
    )
    return made


def use_gpu(sm: int, runtime: Path) -> None:
    """Prepare for libraries whose kernels are for `sm`; the runtime lies there.

    The GPU is asked what it is before anything is loaded. A runtime that was built with CUDA in it
    needs no part for GPUs beside it.
    """
    import tvm_ffi

    driver = cuda_kernels.CudaDriver()
    own = driver.sm()
    if not cuda_kernels.runs_on(own, sm):
        raise PbcError(f"this machine's is of sm_{own}: compile for it (pbc targets)")
    part = _part_for_gpus(runtime)
    if part is not None:
        try:
            ctypes.CDLL(part, ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise PbcError(
                f"the TVM runtime's part for it cannot be loaded: {error}; docs/cuda.md says which "
                "CUDA it needs, and how to build it for another"
            ) from error
    if tvm_ffi.get_global_func(_LOADER, allow_missing=True) is None:
        raise PbcError(
            f"the TVM runtime {runtime} drives none; docs/cuda.md says how to build one that does"
        )
    cuda_kernels.install(driver)


def _part_for_gpus(runtime: Path) -> str | None:
    """Find it beside the runtime, or where the system found the runtime by its name alone."""
    if runtime.parent == Path():
        return ctypes.util.find_library("tvm_runtime_cuda")
    beside = runtime.with_name(_CUDA_RUNTIME)
    return str(beside) if beside.is_file() else None


def _place(value: Any) -> tuple[int, int]:
    kind, index = value.__dlpack_device__()
    return int(kind), int(index)
