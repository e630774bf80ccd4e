"""Any Linux machine of an architecture, down to the C library that wheels are built for."""

from __future__ import annotations

from pbc.target import Target

generic_arm64 = Target(
    name="generic-arm64",
    description="any 64-bit Arm Linux",
    arch="aarch64",
    engine="pytorch",
    engines=("pytorch", "onnxruntime", "tvm"),
    tags={"libc": "glibc 2.28"},
    requires={"python": ">=3.10", "libc": "glibc>=2.28"},
)

generic_x86_64 = Target(
    name="generic-x86-64",
    description="any 64-bit x86 Linux",
    arch="x86_64",
    engine="pytorch",
    engines=("pytorch", "onnxruntime", "tvm"),
    tags={"libc": "glibc 2.28"},
    requires={"python": ">=3.10", "libc": "glibc>=2.28"},
)
