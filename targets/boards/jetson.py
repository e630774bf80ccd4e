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
# What onnxruntime tries in this order; its wheels on the package index hold the CPU's alone.
_PROVIDERS = "CUDAExecutionProvider,CPUExecutionProvider"
_BUILT = "built on the board with its CUDA (docs/cuda.md): the wheel's needs CUDA 13"
# The part of TVM's wheel that drives GPUs is linked with this one.
WHEEL_CUDA = ">=13"


@dataclass(frozen=True)
class JetPack:
    """The driver stack: what a module runs is what its JetPack brings."""

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
    "4.6",
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
    "5.1",
    cuda="11.4",
    glibc="2.31",
    python="3.8",
)
# Ubuntu 22.04. These modules run JetPack 7 too, where the wheel does.
JETPACK_6 = JetPack(
    "6.2",
    cuda="12.6",
    glibc="2.35",
    python="3.10",
    runtime=f"{_BUILT}, of JetPack 7",
)
# Ubuntu 24.04.
JETPACK_7 = JetPack(
    "7.0",
    cuda="13.0",
    glibc="2.39",
    python="3.12",
    runtime=None,
)


def module(
    name: str,
    description: str,
    family: str,
    stack: JetPack,
    *,
    cpu: str,
    sm: str,
    cores: int | None = None,
    gib: int | None = None,
    tag: str | None = None,
) -> Target:
    """Return a module under a JetPack; what is not known of it is left out."""
    facts = {
        "triple": "aarch64-linux-gnu",
        "cpu": cpu,
        "cores": None if cores is None else str(cores),
        "sm": sm,
        "cuda": stack.cuda,
        "jetpack": stack.version,
        "libc": f"glibc {stack.glibc}",
        "python": stack.python,
        "tvm": tag,
        "onnxruntime_providers": stack.providers,
    }
    gpu = {"cuda": f">={stack.cuda}"}
    if stack.runtime is not None:
        gpu["tvm runtime"] = stack.runtime
    return Target(
        name=name,
        description=description,
        family=family,
        arch="aarch64",
        engine="tvm",
        engines=stack.engines,
        memory_bytes=None if gib is None else gib * 2**30,
        tags={fact: value for fact, value in facts.items() if value is not None},
        requires={"python": ">=3.10", "libc": stack.libc_floor},
        needs={"tvm": gpu, **stack.needs},
        refused=stack.refused,
    )


def _jetson(
    name: str, model: str, gib: int, cores: int, cpu: str, sm: str, tag: str, stack: JetPack
) -> Target:
    return module(
        name, f"NVIDIA Jetson {model}, {gib} GB", "NVIDIA Jetson", stack,
        cpu=cpu, sm=sm, cores=cores, gib=gib, tag=f"nvidia/{tag}",
    )  # fmt: skip


# fmt: off
nano = _jetson(
    "jetson-nano", "Nano", 4, 4, "cortex-a57", "53", "jetson-nano", JETPACK_4)
tx1 = _jetson(
    "jetson-tx1", "TX1", 4, 4, "cortex-a57", "53", "jetson-tx1", JETPACK_4)
# Two of its six cores are Denver 2; what is compiled for the other four runs on all.
tx2 = _jetson(
    "jetson-tx2", "TX2", 8, 6, "cortex-a57", "62", "jetson-tx2", JETPACK_4)
agx_xavier = _jetson(
    "jetson-agx-xavier", "AGX Xavier", 32, 8, "carmel", "72", "jetson-agx-xavier", JETPACK_5)
# TVM's own tag says carmel, which is Xavier's core.
orin_nano = _jetson(
    "jetson-orin-nano", "Orin Nano", 8, 6, "cortex-a78ae", "87", "jetson-orin-nano", JETPACK_6)
agx_orin = _jetson(
    "jetson-agx-orin", "AGX Orin", 32, 8, "cortex-a78ae", "87", "jetson-agx-orin-32gb", JETPACK_6)
agx_orin_64gb = _jetson(
    "jetson-agx-orin-64gb", "AGX Orin", 64, 12, "cortex-a78ae", "87", "jetson-agx-orin-64gb",
    JETPACK_6)
agx_thor = _jetson(
    "jetson-agx-thor", "AGX Thor", 128, 14, "neoverse-v3ae", "110", "jetson-agx-thor", JETPACK_7)
# fmt: on
