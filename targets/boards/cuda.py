"""Any machine with an NVIDIA GPU of an architecture: Tegra modules under their JetPack, and PCs."""

from __future__ import annotations

from pbc.target import Target
from pbc.targets.boards.jetson import JETPACK_4, JETPACK_5, JETPACK_6, WHEEL_CUDA, JetPack, module

_FAMILY = "Any NVIDIA GPU"


def _tegra(sm: str, modules: str, cpu: str, stack: JetPack) -> Target:
    return module(f"cuda-sm_{sm}", modules, _FAMILY, stack, cpu=cpu, sm=sm)


def _pc(sm: str, gpus: str) -> Target:
    return Target(
        name=f"cuda-sm_{sm}",
        description=gpus,
        family=_FAMILY,
        arch="x86_64",
        engine="tvm",
        engines=("tvm", "onnxruntime", "pytorch"),
        tags={"triple": "x86_64-linux-gnu", "sm": sm, "libc": "glibc 2.28"},
        requires={"python": ">=3.10", "libc": "glibc>=2.28"},
        needs={"tvm": {"cuda": WHEEL_CUDA}},
    )


sm_53 = _tegra("53", "Tegra X1: Jetson Nano and TX1", "cortex-a57", JETPACK_4)
sm_62 = _tegra("62", "Tegra X2: Jetson TX2 and TX2 NX", "cortex-a57", JETPACK_4)
sm_72 = _tegra("72", "Xavier: Jetson AGX Xavier and Xavier NX", "carmel", JETPACK_5)
sm_75 = _pc("75", "Turing: T4, RTX 20, GTX 16")
sm_80 = _pc("80", "Ampere: A100, A30")
sm_86 = _pc("86", "Ampere: RTX 30, A10, A40")
sm_87 = _tegra("87", "Orin: Jetson AGX Orin, Orin NX and Orin Nano", "cortex-a78ae", JETPACK_6)
sm_89 = _pc("89", "Ada: RTX 40, L4, L40")
sm_90 = _pc("90", "Hopper: H100, H200")
