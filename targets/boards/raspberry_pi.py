"""Raspberry Pi boards under 64-bit Raspberry Pi OS 12."""

from __future__ import annotations

from pbc.target import Target


def _board(
    *, name: str, model: str, cpu: str, memory_mib: int, tvm_tag: str | None = None
) -> Target:
    return Target(
        name=name,
        description=f"Raspberry Pi {model}, {_text(memory_mib)}",
        family="Raspberry Pi",
        arch="aarch64",
        # ONNX Runtime first: two to three times the speed of PyTorch in the frozen part.
        engine="onnxruntime",
        engines=("onnxruntime", "pytorch", "tvm"),
        memory_bytes=memory_mib * 2**20,
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


def _text(memory_mib: int) -> str:
    return f"{memory_mib} MB" if memory_mib < 1024 else f"{memory_mib // 1024} GB"


zero_2 = _board(name="raspberry-pi-zero-2", model="Zero 2 W", cpu="cortex-a53", memory_mib=512)
pi_3b = _board(name="raspberry-pi-3b", model="3 Model B", cpu="cortex-a53", memory_mib=1024)
pi_4b = _board(
    name="raspberry-pi-4b",
    model="4 Model B",
    cpu="cortex-a72",
    memory_mib=4096,
    tvm_tag="raspberry-pi/4b-aarch64",
)
pi_5 = _board(name="raspberry-pi-5", model="5", cpu="cortex-a76", memory_mib=8192)
