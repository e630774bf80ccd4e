"""Arm boards of TVM's list that are no Jetson: 64-bit ones, and 32-bit ones.

Their systems differ, so the C library is the oldest that pbc builds for, not what a board has.
"""

from __future__ import annotations

from pbc.target import Target

_REQUIRES = {"python": ">=3.10", "libc": "glibc>=2.28"}


def _facts(
    *, name: str, triple: str, cpu: str, cores: int | None, attributes: str | None = None
) -> dict[str, str]:
    known = {
        "triple": triple,
        "cpu": cpu,
        "cores": None if cores is None else str(cores),
        "mattr": attributes,
        "libc": "glibc 2.28",
        "tvm": f"arm/{name}",
    }
    return {fact: value for fact, value in known.items() if value is not None}


def _bytes(memory_gib: float | None) -> int | None:
    return None if memory_gib is None else int(memory_gib * 2**30)


def _board64(
    *,
    name: str,
    description: str,
    cpu: str,
    cores: int | None = None,
    memory_gib: float | None = None,
) -> Target:
    """Return a 64-bit board; name: TVM's own, without its family."""
    return Target(
        name=f"arm-{name}",
        description=description,
        family="Arm, 64 bits",
        arch="aarch64",
        engine="onnxruntime",
        engines=("onnxruntime", "pytorch", "tvm"),
        memory_bytes=_bytes(memory_gib),
        tags=_facts(name=name, triple="aarch64-linux-gnu", cpu=cpu, cores=cores),
        requires=_REQUIRES,
    )


def _board32(
    *,
    name: str,
    description: str,
    cpu: str,
    cores: int,
    memory_gib: float | None = None,
    attributes: str = "+neon,+vfp4,+thumb2",
    as_64_bits: str | None = None,
) -> Target:
    """Return a board with a 32-bit system: no engine has a wheel for it, nor has numpy.

    name: TVM's own, without its family. attributes: extensions of the CPU, as LLVM names them.
    as_64_bits: the target that the board is under a 64-bit system.
    """
    other = "take --engine tvm"
    if as_64_bits is not None:
        other += f", or a 64-bit system and --target {as_64_bits}"
    return Target(
        name=f"arm-{name}",
        description=description,
        family="Arm, 32 bits",
        arch="armv7l",
        engine="tvm",
        engines=("tvm",),
        memory_bytes=_bytes(memory_gib),
        tags=_facts(
            name=name,
            triple="armv7l-linux-gnueabihf",
            cpu=cpu,
            cores=cores,
            attributes=attributes,
        ),
        requires={**_REQUIRES, "numpy": "as the system packages it: there is no wheel"},
        needs={"tvm": {"tvm runtime": "built on the board (docs/targets.md): there is no wheel"}},
        refused={
            "onnxruntime": f"onnxruntime has no wheel for 32-bit Arm; {other}",
            "pytorch": f"torch has no wheel for 32-bit Arm; {other}",
        },
    )


rk3399 = _board64(
    name="rk3399",
    description="boards with Rockchip's RK3399",
    cpu="cortex-a72",  # two, and four Cortex-A53 of the same instructions
    cores=6,
)
thunderx = _board64(
    name="thunderx",
    description="servers with Cavium's ThunderX",
    cpu="thunderxt88",
)
ultra96 = _board64(
    name="ultra96",
    description="Avnet Ultra96, 2 GB",
    cpu="cortex-a53",
    cores=4,
    memory_gib=2,
)

beagleai = _board32(
    name="beagleai",
    description="BeagleBone AI, 1 GB",
    cpu="cortex-a15",
    cores=2,
    memory_gib=1,
)
pynq = _board32(
    name="pynq",
    description="PYNQ-Z1, 512 MB",
    cpu="cortex-a9",  # of the Zynq 7020, older than VFPv4
    attributes="+neon,+vfp3,+thumb2",
    cores=2,
    memory_gib=0.5,
)
rasp3b = _board32(
    name="rasp3b",
    description="Raspberry Pi 3 Model B, 1 GB, 32-bit system",
    cpu="cortex-a53",
    cores=4,
    memory_gib=1,
    as_64_bits="raspberry-pi-3b",
)
rasp4b = _board32(
    name="rasp4b",
    description="Raspberry Pi 4 Model B, 32-bit system",
    cpu="cortex-a72",
    cores=4,
    as_64_bits="raspberry-pi-4b",
)
stm32mp1 = _board32(
    name="stm32mp1",
    description="boards with ST's STM32MP157",
    cpu="cortex-a7",
    cores=2,
)
