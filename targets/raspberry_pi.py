"""Raspberry Pi boards under 64-bit Raspberry Pi OS 12."""

from __future__ import annotations

from pbc.target import Target

# ONNX Runtime first: two to three times the speed of PyTorch in the frozen part.
_ENGINES = ("onnxruntime", "pytorch", "tvm")
_REQUIRES = {"python": ">=3.10", "libc": "glibc>=2.28"}

pi_4b = Target(
    name="raspberry-pi-4b",
    description="Raspberry Pi 4 Model B, 4 GB",
    arch="aarch64",
    engine="onnxruntime",
    engines=_ENGINES,
    memory_bytes=4 * 2**30,
    tags={
        "cores": "4",
        "cpu": "cortex-a72",
        "libc": "glibc 2.36",
        "tvm": "raspberry-pi/4b-aarch64",
    },
    requires=_REQUIRES,
)

pi_5 = Target(
    name="raspberry-pi-5",
    description="Raspberry Pi 5, 8 GB",
    arch="aarch64",
    engine="onnxruntime",
    engines=_ENGINES,
    memory_bytes=8 * 2**30,
    tags={"cores": "4", "cpu": "cortex-a76", "libc": "glibc 2.36"},
    requires=_REQUIRES,
)
