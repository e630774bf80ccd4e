"""NVIDIA Jetson modules, each under the last JetPack that most of them run.

TVM first: it is the one engine that reaches these GPUs from a bundle. Of its wheel, the part for
GPUs needs the CUDA 13 of JetPack 7; below that the runtime is built on the board. The wheels of
onnxruntime and torch compute on the CPU there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pbc.target import Target

_ENGINES = ("tvm", "onnxruntime", "pytorch")
# Tried by onnxruntime in this order; its wheels on the package index hold the CPU's alone.
_PROVIDERS = "CUDAExecutionProvider,CPUExecutionProvider"
_BUILT = "built on the board with its CUDA (docs/cuda.md): the wheel's needs CUDA 13"
# The part of TVM's wheel that drives GPUs is linked with this one.
WHEEL_CUDA = ">=13"


@dataclass(frozen=True)
class JetPack:
    """A driver stack, which decides about the versions of all that a module runs.

    runtime: where the part of TVM for GPUs comes from; None where the wheel has it.
    """

    version: str
    cuda: str
    glibc: str
    python: str
    runtime: str | None = _BUILT
    libc_floor: str = "glibc>=2.28"
    engines: tuple[str, ...] = _ENGINES
    needs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    providers: str = _PROVIDERS


# Ubuntu 18.04. torch's wheels ask for glibc 2.28; TVM's for 2.27, and onnxruntime's up to 1.28.
JETPACK_4 = JetPack(
    version="4.6",
    cuda="10.2",
    glibc="2.27",
    python="3.6",
    libc_floor="glibc>=2.27",
    providers="CPUExecutionProvider",
    engines=("tvm", "onnxruntime"),
    needs={"onnxruntime": {"onnxruntime": "<1.29"}},
    refused={
        "pytorch": "torch>=2.9 has wheels for glibc 2.28 or newer, and JetPack 4.6 has 2.27; "
        "take --engine tvm, or onnxruntime, which computes on the CPU there"
    },
)
# Ubuntu 20.04.
JETPACK_5 = JetPack(
    version="5.1",
    cuda="11.4",
    glibc="2.31",
    python="3.8",
)
# Ubuntu 22.04. These modules run JetPack 7 too, where the wheel does.
JETPACK_6 = JetPack(
    version="6.2",
    cuda="12.6",
    glibc="2.35",
    python="3.10",
    runtime=f"{_BUILT}, of JetPack 7",
)
# Ubuntu 24.04.
JETPACK_7 = JetPack(
    version="7.0",
    cuda="13.0",
    glibc="2.39",
    python="3.12",
    runtime=None,
)


def module(
    *,
    name: str,
    description: str,
    family: str,
    jetpack: JetPack,
    cpu: str,
    sm: str,
    cores: int | None = None,
    memory_gib: int | None = None,
    tvm_tag: str | None = None,
) -> Target:
    """Return a module under a JetPack; what is not known of it is left out."""
    facts = {
        "triple": "aarch64-linux-gnu",
        "cpu": cpu,
        "cores": None if cores is None else str(cores),
        "sm": sm,
        "cuda": jetpack.cuda,
        "jetpack": jetpack.version,
        "libc": f"glibc {jetpack.glibc}",
        "python": jetpack.python,
        "tvm": tvm_tag,
        "onnxruntime_providers": jetpack.providers,
    }
    gpu = {"cuda": f">={jetpack.cuda}"}
    if jetpack.runtime is not None:
        gpu["tvm runtime"] = jetpack.runtime
    return Target(
        name=name,
        description=description,
        family=family,
        arch="aarch64",
        engine="tvm",
        engines=jetpack.engines,
        memory_bytes=None if memory_gib is None else memory_gib * 2**30,
        tags={fact: value for fact, value in facts.items() if value is not None},
        requires={"python": ">=3.10", "libc": jetpack.libc_floor},
        needs={"tvm": gpu, **jetpack.needs},
        refused=jetpack.refused,
    )


def _jetson(
    *,
    name: str,
    model: str,
    cpu: str,
    cores: int,
    sm: str,
    memory_gib: int,
    jetpack: JetPack,
    tvm_tag: str | None = None,
    listed: bool = True,
) -> Target:
    """Return a module; tvm_tag: TVM's own name, where that is another; listed: it has one."""
    return module(
        name=name,
        description=f"NVIDIA Jetson {model}, {memory_gib} GB",
        family="NVIDIA Jetson",
        jetpack=jetpack,
        cpu=cpu,
        sm=sm,
        cores=cores,
        memory_gib=memory_gib,
        tvm_tag=f"nvidia/{tvm_tag or name}" if listed else None,
    )


nano = _jetson(
    name="jetson-nano",
    model="Nano",
    cpu="cortex-a57",
    cores=4,
    sm="53",
    memory_gib=4,
    jetpack=JETPACK_4,
)
tx1 = _jetson(
    name="jetson-tx1",
    model="TX1",
    cpu="cortex-a57",
    cores=4,
    sm="53",
    memory_gib=4,
    jetpack=JETPACK_4,
)
tx2 = _jetson(
    name="jetson-tx2",
    model="TX2",
    cpu="cortex-a57",  # four; what is compiled for them runs on the two Denver 2 as well
    cores=6,
    sm="62",
    memory_gib=8,
    jetpack=JETPACK_4,
)
agx_xavier = _jetson(
    name="jetson-agx-xavier",
    model="AGX Xavier",
    cpu="carmel",
    cores=8,
    sm="72",
    memory_gib=32,
    jetpack=JETPACK_5,
)
xavier_nx = _jetson(
    name="jetson-xavier-nx",
    model="Xavier NX",
    cpu="carmel",
    cores=6,
    sm="72",
    memory_gib=8,
    jetpack=JETPACK_5,
    listed=False,
)
orin_nano = _jetson(
    name="jetson-orin-nano",
    model="Orin Nano",
    cpu="cortex-a78ae",  # TVM's own tag says carmel, which is Xavier's core
    cores=6,
    sm="87",
    memory_gib=8,
    jetpack=JETPACK_6,
)
orin_nx = _jetson(
    name="jetson-orin-nx",
    model="Orin NX",
    cpu="cortex-a78ae",
    cores=8,
    sm="87",
    memory_gib=16,
    jetpack=JETPACK_6,
    listed=False,
)
agx_orin = _jetson(
    name="jetson-agx-orin",
    model="AGX Orin",
    cpu="cortex-a78ae",
    cores=8,
    sm="87",
    memory_gib=32,
    jetpack=JETPACK_6,
    tvm_tag="jetson-agx-orin-32gb",
)
agx_orin_64gb = _jetson(
    name="jetson-agx-orin-64gb",
    model="AGX Orin",
    cpu="cortex-a78ae",
    cores=12,
    sm="87",
    memory_gib=64,
    jetpack=JETPACK_6,
)
agx_thor = _jetson(
    name="jetson-agx-thor",
    model="AGX Thor",
    cpu="neoverse-v3ae",
    cores=14,
    sm="110",
    memory_gib=128,
    jetpack=JETPACK_7,
)
