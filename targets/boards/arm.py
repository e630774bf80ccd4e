"""Arm boards of TVM's list that are no Jetson: 64-bit ones, and 32-bit ones.

Their systems differ, so the C library is the oldest that pbc builds for, not what a board has.
"""

from __future__ import annotations

from pbc.target import Target

_REQUIRES = {"python": ">=3.10", "libc": "glibc>=2.28"}


def _facts(
    triple: str, cpu: str, cores: int | None, tag: str, attributes: str | None = None
) -> dict[str, str]:
    known = {
        "triple": triple,
        "cpu": cpu,
        "cores": None if cores is None else str(cores),
        "mattr": attributes,
        "libc": "glibc 2.28",
        "tvm": f"arm/{tag}",
    }
    return {fact: value for fact, value in known.items() if value is not None}


def _board64(
    tag: str, description: str, cpu: str, cores: int | None = None, gib: int | None = None
) -> Target:
    return Target(
        name=f"arm-{tag}",
        description=description,
        family="Arm, 64 bits",
        arch="aarch64",
        engine="onnxruntime",
        engines=("onnxruntime", "pytorch", "tvm"),
        memory_bytes=None if gib is None else gib * 2**30,
        tags=_facts("aarch64-linux-gnu", cpu, cores, tag),
        requires=_REQUIRES,
    )


def _board32(
    tag: str,
    description: str,
    cpu: str,
    cores: int,
    mib: int | None,
    *,
    instead: str = "",
    attributes: str = "+neon,+vfp4,+thumb2",
) -> Target:
    """A 32-bit system: the package index has no wheel of any engine for it, nor of numpy."""
    other = f"take --engine tvm{instead}"
    return Target(
        name=f"arm-{tag}",
        description=description,
        family="Arm, 32 bits",
        arch="armv7l",
        engine="tvm",
        engines=("tvm",),
        memory_bytes=None if mib is None else mib * 2**20,
        tags=_facts("armv7l-linux-gnueabihf", cpu, cores, tag, attributes),
        requires={**_REQUIRES, "numpy": "as the system packages it: there is no wheel"},
        needs={"tvm": {"tvm runtime": "built on the board (docs/targets.md): there is no wheel"}},
        refused={
            "onnxruntime": f"onnxruntime has no wheel for 32-bit Arm; {other}",
            "pytorch": f"torch has no wheel for 32-bit Arm; {other}",
        },
    )


_AS_64 = ", or a 64-bit system and --target {}"

rasp4b64 = _board64("rasp4b64", "Raspberry Pi 4 Model B, 64-bit system", "cortex-a72", 4)
# Two Cortex-A72 and four Cortex-A53, of the same instructions.
rk3399 = _board64("rk3399", "boards with Rockchip's RK3399", "cortex-a72", 6)
thunderx = _board64("thunderx", "servers with Cavium's ThunderX", "thunderxt88")
ultra96 = _board64("ultra96", "Avnet Ultra96, 2 GB", "cortex-a53", 4, gib=2)

beagleai = _board32("beagleai", "BeagleBone AI, 1 GB", "cortex-a15", 2, 1024)
# Zynq 7020: its Cortex-A9 is older than VFPv4.
pynq = _board32(
    "pynq", "PYNQ-Z1, 512 MB", "cortex-a9", 2, 512, attributes="+neon,+vfp3,+thumb2"
)  # fmt: skip
rasp3b = _board32(
    "rasp3b", "Raspberry Pi 3 Model B, 1 GB, 32-bit system", "cortex-a53", 4, 1024,
    instead=_AS_64.format("generic-arm64"),
)  # fmt: skip
rasp4b = _board32(
    "rasp4b", "Raspberry Pi 4 Model B, 32-bit system", "cortex-a72", 4, None,
    instead=_AS_64.format("raspberry-pi-4b"),
)  # fmt: skip
stm32mp1 = _board32("stm32mp1", "boards with ST's STM32MP157", "cortex-a7", 2, None)
