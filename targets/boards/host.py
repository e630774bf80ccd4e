"""This machine: its facts are read when the target is loaded."""

from __future__ import annotations

import os
import platform

from pbc.target import Arch, Target

_ARCHS: dict[str, Arch] = {
    "x86_64": "x86_64",
    "amd64": "x86_64",
    "aarch64": "aarch64",
    "arm64": "aarch64",
}


def host() -> Target:
    """Return this machine as a target."""
    cores = len(os.sched_getaffinity(0))
    libc, version = platform.libc_ver()
    tags = {"cores": str(cores), "python": platform.python_version()}
    if libc:
        tags["libc"] = f"{libc} {version}"
    return Target(
        name="host",
        description=f"this machine, {cores} core{'s' if cores != 1 else ''}",
        family="This machine",
        arch=_ARCHS.get(platform.machine().lower(), "any"),
        engine="onnxruntime",
        engines=("onnxruntime", "pytorch", "tvm"),
        local=True,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        tags=tags,
        requires={"python": ">=3.10"},
    )
