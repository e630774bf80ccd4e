"""Build: a TVM module becomes a shared library for a CPU or a GPU, this machine's or another's.

What a GPU computes is compiled by `cuda/cubin.py`; the CPU beside it allocates and launches.
LLVM is in TVM; what links is the C compiler of the ziglang package, which has the C libraries of
every Linux target in it, down to an old enough version of glibc, and needs nothing of the system.
"""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tvm
from tvm import relax
from tvm.relax.backend.cpu_generic import pipeline

from pbc import plugins
from pbc.errors import PbcError
from pbc.target import Target
from pbc.targets.tvm.cuda import cubin
from pbc.util.processor import DECIDING_FLAGS, missing_flags

# Where a target names no CPU: x86-64 with AVX2, as all since 2015 have it, and any 64-bit Arm.
_CPUS = {"x86_64": "x86-64-v3", "aarch64": "generic"}
_TRIPLES = {
    "x86_64": "x86_64-linux-gnu",
    "aarch64": "aarch64-linux-gnu",
    "armv7l": "armv7l-linux-gnueabihf",
}
_OLDEST_GLIBC = "2.28"
_LINKED_TRIPLES = {"armv7l": "arm"}


class Schedule(Protocol):
    """Entry point group `pbc.tvm_schedules`: writes how a module's functions are computed.

    kinds: of TVM's targets, such as `llvm`. A schedule of CPUs may have a `tunable`, too.
    """

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of TVM's targets that it is for."""

    def __call__(self, module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
        """Return the module with its functions scheduled; the input stays unchanged."""


@dataclass(frozen=True)
class Platform:
    """The processors that code is built for.

    facts: TVM's description of a CPU. linked: the linker's name for the system, with its C library.
    sm: the architecture of the NVIDIA GPU beside this CPU, where that is what computes.
    """

    facts: Mapping[str, Any]
    linked: str
    sm: int | None = None

    @property
    def host(self) -> tvm.target.Target:
        return tvm.target.Target(dict(self.facts))

    @property
    def target(self) -> tvm.target.Target:
        return self.host if self.sm is None else cubin.gpu_target(self.sm, self.host)

    def flags(self) -> list[str]:
        """The x86 extensions that the code may use, as /proc/cpuinfo calls them."""
        if "x86_64" not in self.linked:
            return []
        known = tvm.target.codegen.llvm_get_cpu_features(self.host)
        return sorted({str(name).replace(".", "_") for name in known} & DECIDING_FLAGS)

    def key(self) -> str:
        """All that decides what a module becomes."""
        return json.dumps([dict(self.facts), self.linked, self.sm], sort_keys=True)


def platform_of(target: Target) -> Platform:
    """The processors of a board, or this machine's CPU."""
    if target.local:
        return this_machine()
    triple = target.tags.get("triple") or _TRIPLES.get(target.arch)
    if triple is None:
        raise PbcError(
            f"target {target.name} does not say what its CPU is; TVM builds for one: take "
            f"--target generic-arm64 or generic-x86-64"
        )
    arch, _, system = triple.partition("-")
    if not system.startswith("linux-gnu"):
        raise PbcError(
            f"the tvm engine cannot link for {target.name} ({triple}): it links for Linux with "
            "glibc; compile with another --engine"
        )
    facts: dict[str, Any] = {"kind": "llvm", "mtriple": triple}
    cpu = target.tags.get("cpu", _CPUS.get(target.arch))
    if cpu is not None:
        facts["mcpu"] = cpu
    features = target.tags.get("mattr", "+neon" if arch == "aarch64" else "")
    if features:
        facts["mattr"] = [feature.strip() for feature in features.split(",")]
    if "cores" in target.tags:
        facts["num-cores"] = int(target.tags["cores"])
    linked = f"{_LINKED_TRIPLES.get(arch, arch)}-{system}"
    sm = int(target.tags["sm"]) if "sm" in target.tags else None
    return Platform(facts, f"{linked}.{_glibc(target)}", sm)


def this_machine() -> Platform:
    """The CPU that this runs on."""
    cpu = tvm.target.codegen.llvm_get_system_cpu()
    triple = _TRIPLES.get(platform.machine(), f"{platform.machine()}-linux-gnu")
    facts = {"kind": "llvm", "mtriple": triple, "mcpu": str(cpu)}
    return Platform(facts, f"{triple}.{_OLDEST_GLIBC}")


def runs_here(target: Target) -> bool:
    """Whether this machine's CPU runs what is built for a target."""
    where = platform_of(target)
    machine = where.linked.partition("-")[0]
    alike = target.local or machine == platform.machine() == "x86_64"
    return where.sm is None and alike and not missing_flags(where.flags())


def _glibc(target: Target) -> str:
    """The oldest C library that the library has to run with."""
    wanted = [target.tags.get("libc", ""), target.requires.get("libc", "")]
    found = [match.group(1) for text in wanted if (match := re.search(r"glibc\D*(\d+\.\d+)", text))]
    return (
        min(found, key=lambda version: [int(part) for part in version.split(".")])
        if (found)
        else _OLDEST_GLIBC
    )


def build(module: tvm.IRModule, where: Platform) -> bytes:
    """The module as a shared library that the TVM runtime loads; its bytes depend on it alone."""
    return compiled(scheduled(module, where), where)


def scheduled(module: tvm.IRModule, where: Platform) -> tvm.IRModule:
    """The module's graphs as loop nests, by all installed schedules."""
    target = where.target
    module = legalized(module, where)
    with target:
        for schedule in schedules(str(target.kind.name)):
            module = schedule(module, target)
    if where.sm is not None:
        cubin.require_scheduled(module)
    return module


def legalized(module: tvm.IRModule, where: Platform) -> tvm.IRModule:
    """The module's graphs as calls of functions that say what is computed, and not how."""
    target = where.target
    with target:
        return tvm.transform.Sequential(
            [
                relax.transform.CanonicalizeBindings(),
                relax.transform.DeadCodeElimination(),
                *pipeline.legalize_passes(target),
                relax.transform.DeadCodeElimination(),
            ]
        )(module)


def compiled(module: tvm.IRModule, where: Platform) -> bytes:
    """The library of a module that has its schedules."""
    target = where.target
    with target:
        module = tvm.transform.Sequential(
            [*pipeline.dataflow_lower_passes(target), *pipeline.finalize_passes(target)]
        )(module)
        with contextlib.nullcontext() if where.sm is None else cubin.embedding(where.sm):
            executable = relax.build(module, target, relax_pipeline=None)
    with tempfile.TemporaryDirectory(prefix="pbc-") as folder:
        library = Path(folder) / "library.so"
        executable.export_library(str(library), fcompile=_linker(where.linked))
        if where.sm is not None:
            cubin.require(library, where.sm)
        return library.read_bytes()


@functools.cache
def schedules(kind: str) -> tuple[Schedule, ...]:
    """The installed schedules for a kind of TVM target, in the order of their names."""
    found = plugins.entries("pbc.tvm_schedules")
    every = [found[name].load() for name in sorted(found)]
    return tuple(schedule for schedule in every if kind in schedule.kinds)


def _linker(triple: str) -> Callable[..., None]:
    def link(output: str, objects: Sequence[str], *_: Any, **__: Any) -> None:
        command = [sys.executable, "-m", "ziglang", "cc", "-target", triple, "-shared", "-s"]
        done = subprocess.run(
            [*command, "-o", output, *objects, "-lm"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
            raise PbcError(f"ziglang cannot link for {triple}: {reason}")

    link.output_format = "so"  # type: ignore[attr-defined]
    return link
