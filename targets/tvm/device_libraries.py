"""The part of TVM that a device needs: a few megabytes of the compiler's wheel."""

from __future__ import annotations

from pbc.deploy.libraries import DeviceLibraries

RUNTIME = DeviceLibraries(
    requirement="apache-tvm>=0.27,<0.28",
    members=("tvm/lib/libtvm_runtime.so", "tvm/lib/libtvm_runtime_cuda.so"),
    variable="PBC_TVM_RUNTIME",
    unless="tvm runtime",
)
