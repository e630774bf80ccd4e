"""The TVM backend's facts: it builds libraries, by rules or by measuring which code is fastest."""

from __future__ import annotations

from pbc.lower.backend import Backend

BACKEND = Backend(
    lowering_class="pbc.targets.tvm.lowering:TvmLowering",
    packages=("tvm", "tvm_ffi", "ziglang"),
    requires={"tvm": ">=0.27,<0.28", "apache-tvm-ffi": "==0.1.14.post1"},
    derives_steps=True,
    tunes=True,
)
