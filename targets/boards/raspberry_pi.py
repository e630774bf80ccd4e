"""Raspberry Pi boards under 64-bit Raspberry Pi OS 12."""

from __future__ import annotations

from pbc.target import Target


def _board(
    *, name: str, model: str, cpu: str, memory_gib: int, tvm_tag: str | None = None
) -> Target:
    return Target(
        name=name,
        description=f"Raspberry Pi {model}, {memory_gib} GB",
        family="Raspberry Pi",
        arch="aarch64",
        # ONNX Runtime first: two to three times the speed of PyTorch in the frozen part.
        engine="onnxruntime",
        engines=("onnxruntime", "pytorch", "tvm"),
        memory_bytes=memory_gib * 2**30,
        tags={
            "triple": "aarch64-linux-gnu",
            "cpu": cpu,
            "cores": "4",
            "libc": "glibc 2.36",
            "python": "3.11",
            **({} if tvm_tag is None else {"tvm": tvm_tag}),
        },
        requires={"python": ">=3.10", "libc": "glibc>=2.28"},
    )


pi_4b = _board(
    name="raspberry-pi-4b",
    model="4 Model B",
    cpu="cortex-a72",
    memory_gib=4,
    tvm_tag="raspberry-pi/4b-aarch64",
)
pi_5 = _board(name="raspberry-pi-5", model="5", cpu="cortex-a76", memory_gib=8)
