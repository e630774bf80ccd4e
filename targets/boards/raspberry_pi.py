"""Raspberry Pi boards under 64-bit Raspberry Pi OS 12."""

from __future__ import annotations

from pbc.target import Target


def _board(name: str, model: str, gib: int, cpu: str, tag: str | None = None) -> Target:
    return Target(
        name=name,
        description=f"Raspberry Pi {model}, {gib} GB",
        family="Raspberry Pi",
        arch="aarch64",
        # ONNX Runtime first: two to three times the speed of PyTorch in the frozen part.
        engine="onnxruntime",
        engines=("onnxruntime", "pytorch", "tvm"),
        memory_bytes=gib * 2**30,
        tags={
            "triple": "aarch64-linux-gnu",
            "cpu": cpu,
            "cores": "4",
            "libc": "glibc 2.36",
            "python": "3.11",
            **({} if tag is None else {"tvm": tag}),
        },
        requires={"python": ">=3.10", "libc": "glibc>=2.28"},
    )


pi_4b = _board("raspberry-pi-4b", "4 Model B", 4, "cortex-a72", "raspberry-pi/4b-aarch64")
pi_5 = _board("raspberry-pi-5", "5", 8, "cortex-a76")
