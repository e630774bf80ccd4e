"""Any Linux machine of an architecture, down to the C library that wheels are built for."""

from __future__ import annotations

from pbc.target import Arch, Target


def _any(*, name: str, description: str, arch: Arch) -> Target:
    return Target(
        name=name,
        description=description,
        family="Any machine",
        arch=arch,
        engine="onnxruntime",
        engines=("onnxruntime", "pytorch", "tvm"),
        tags={"triple": f"{arch}-linux-gnu", "libc": "glibc 2.28"},
        requires={"python": ">=3.10", "libc": "glibc>=2.28"},
    )


generic_arm64 = _any(name="generic-arm64", description="any 64-bit Arm Linux", arch="aarch64")
generic_x86_64 = _any(name="generic-x86-64", description="any 64-bit x86 Linux", arch="x86_64")
