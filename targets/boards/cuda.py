"""Any machine with an NVIDIA GPU of an architecture: Tegra modules under their JetPack, and PCs."""

from __future__ import annotations

from pbc.target import Target
from pbc.targets.boards.jetson import JETPACK_4, JETPACK_5, JETPACK_6, WHEEL_CUDA, JetPack, module

_FAMILY = "Any NVIDIA GPU"


def _tegra(*, sm: str, description: str, cpu: str, jetpack: JetPack) -> Target:
    return module(
        name=f"cuda-sm_{sm}",
        description=description,
        family=_FAMILY,
        jetpack=jetpack,
        cpu=cpu,
        sm=sm,
    )


def _pc(*, sm: str, description: str) -> Target:
    return Target(
        name=f"cuda-sm_{sm}",
        description=description,
        family=_FAMILY,
        arch="x86_64",
        engine="tvm",
        engines=("tvm", "onnxruntime", "pytorch"),
        tags={"triple": "x86_64-linux-gnu", "sm": sm, "libc": "glibc 2.28"},
        requires={"python": ">=3.10", "libc": "glibc>=2.28"},
        needs={"tvm": {"cuda": WHEEL_CUDA}},
    )


sm_53 = _tegra(
    sm="53",
    description="Tegra X1: Jetson Nano and TX1",
    cpu="cortex-a57",
    jetpack=JETPACK_4,
)
sm_62 = _tegra(
    sm="62",
    description="Tegra X2: Jetson TX2 and TX2 NX",
    cpu="cortex-a57",
    jetpack=JETPACK_4,
)
sm_72 = _tegra(
    sm="72",
    description="Xavier: Jetson AGX Xavier and Xavier NX",
    cpu="carmel",
    jetpack=JETPACK_5,
)
sm_87 = _tegra(
    sm="87",
    description="Orin: Jetson AGX Orin, Orin NX and Orin Nano",
    cpu="cortex-a78ae",
    jetpack=JETPACK_6,
)

sm_75 = _pc(sm="75", description="Turing: T4, RTX 20, GTX 16")
sm_80 = _pc(sm="80", description="Ampere: A100, A30")
sm_86 = _pc(sm="86", description="Ampere: RTX 30, A10, A40")
sm_89 = _pc(sm="89", description="Ada: RTX 40, L4, L40")
sm_90 = _pc(sm="90", description="Hopper: H100, H200")
