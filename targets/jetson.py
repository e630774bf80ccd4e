"""NVIDIA Jetson modules, each under the last JetPack that most of them run.

TVM first: it is the one engine that reaches these GPUs from a bundle. Its wheels need the CUDA 13
of JetPack 7; below that the runtime is built on the board, and `tags` say so.
"""

from __future__ import annotations

from pbc.target import Target

_ENGINES = ("tvm", "onnxruntime", "pytorch")
# What onnxruntime tries in this order; its wheels on the package index hold the CPU's alone.
_PROVIDERS = "CUDAExecutionProvider,CPUExecutionProvider"
_JETPACK_4 = {  # Ubuntu 18.04: older than what any current wheel of torch or onnxruntime needs
    "jetpack": "4.6",
    "cuda": "10.2",
    "libc": "glibc 2.27",
    "torch": "no wheel: torch>=2.9 needs glibc 2.28; build it on the board",
    "tvm_runtime": "build it on the board: the wheels need CUDA 13",
}
_JETPACK_4_REQUIRES = {"python": ">=3.10", "libc": "glibc>=2.27", "cuda": "10.2"}

tx2 = Target(
    name="jetson-tx2",
    description="NVIDIA Jetson TX2, 8 GB",
    arch="aarch64",
    engine="tvm",
    engines=("tvm", "pytorch"),
    memory_bytes=8 * 2**30,
    tags={
        **_JETPACK_4,
        "cores": "6",
        "cpu": "cortex-a57",
        "sm": "62",
        "tvm": "nvidia/jetson-tx2",
    },
    requires=_JETPACK_4_REQUIRES,
)

nano = Target(
    name="jetson-nano",
    description="NVIDIA Jetson Nano, 4 GB",
    arch="aarch64",
    engine="tvm",
    engines=("tvm", "pytorch"),
    memory_bytes=4 * 2**30,
    tags={
        **_JETPACK_4,
        "cores": "4",
        "cpu": "cortex-a57",
        "sm": "53",
        "tvm": "nvidia/jetson-nano",
    },
    requires=_JETPACK_4_REQUIRES,
)

agx_xavier = Target(
    name="jetson-agx-xavier",
    description="NVIDIA Jetson AGX Xavier, 32 GB",
    arch="aarch64",
    engine="tvm",
    engines=_ENGINES,
    memory_bytes=32 * 2**30,
    tags={
        "cores": "8",
        "cpu": "carmel",
        "cuda": "11.4",
        "jetpack": "5.1",
        "libc": "glibc 2.31",
        "onnxruntime_providers": _PROVIDERS,
        "sm": "72",
        "tvm": "nvidia/jetson-agx-xavier",
        "tvm_runtime": "build it on the board: the wheels need CUDA 13",
    },
    requires={"python": ">=3.10", "libc": "glibc>=2.28", "cuda": "11.4"},
)

_JETPACK_6 = {
    "cpu": "cortex-a78",
    "cuda": "12.6",
    "jetpack": "6.2",
    "libc": "glibc 2.35",
    "onnxruntime_providers": _PROVIDERS,
    "sm": "87",
    "tvm_runtime": "wheels from JetPack 7 (CUDA 13) on; below that, build it on the board",
}
_JETPACK_6_REQUIRES = {"python": ">=3.10", "libc": "glibc>=2.28", "cuda": ">=12.6"}

orin_nano = Target(
    name="jetson-orin-nano",
    description="NVIDIA Jetson Orin Nano, 8 GB",
    arch="aarch64",
    engine="tvm",
    engines=_ENGINES,
    memory_bytes=8 * 2**30,
    tags={**_JETPACK_6, "cores": "6", "tvm": "nvidia/jetson-orin-nano"},
    requires=_JETPACK_6_REQUIRES,
)

agx_orin = Target(
    name="jetson-agx-orin",
    description="NVIDIA Jetson AGX Orin, 32 GB",
    arch="aarch64",
    engine="tvm",
    engines=_ENGINES,
    memory_bytes=32 * 2**30,
    tags={**_JETPACK_6, "cores": "8", "tvm": "nvidia/jetson-agx-orin-32gb"},
    requires=_JETPACK_6_REQUIRES,
)
