"""Checks of an installation: which packages are there, what works with them, what to install."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pbc
from pbc import plugins
from pbc.deploy.requirements import own_requirements, requirement_name
from pbc.errors import PbcError
from pbc.target import load_target
from pbc.util.extras import DEVICE_EXTRAS, EXTRAS, install, missing
from pbc.util.processor import cpu_name

# Extras for work on pbc itself.
_NOT_FOR_USERS = {"dev"}


@dataclass(frozen=True)
class Check:
    """Outcome of one check.

    detail: versions where it works, else the reason. remedy: a command that helps, where there is
    one.
    """

    name: str
    works: bool
    detail: str
    remedy: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """State of pbc on this machine.

    extras: by extra. engines: what trains here. lowerings: what can be compiled for here, by
    engine. targets: by target, whether an engine of it can be compiled for here. tools: programs
    of the system that single commands need.
    """

    about: Mapping[str, str]
    extras: Sequence[Check]
    engines: Sequence[Check]
    lowerings: Sequence[Check]
    targets: Sequence[Check]
    tools: Sequence[Check]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at what is installed; engines and lowerings are imported, which takes seconds."""
    lowerings = [_lowering(name) for name in plugins.entries("pbc.lowerings")]
    able = {check.name for check in lowerings if check.works}
    return Diagnosis(
        about={
            "pbc": f"{pbc.__version__} in {Path(pbc.__file__).parent}",
            "python": f"{platform.python_version()} ({platform.python_implementation()})",
            "system": " ".join(
                filter(None, (platform.system(), platform.machine(), *platform.libc_ver()))
            ),
            "processor": f"{cpu_name()}, {len(os.sched_getaffinity(0))} for this process",
        },
        extras=[_extra(*extra) for extra in sorted(own_requirements()[1].items())
                if extra[0] not in _NOT_FOR_USERS],
        engines=[_engine(name) for name in plugins.entries("pbc.engines")],
        lowerings=lowerings,
        targets=[_target(name, able) for name in plugins.entries("pbc.targets")],
        tools=[_tool("ssh", "pbc deploy and pbc profile --on", "apt install openssh-client")],
    )  # fmt: skip


def _extra(name: str, requirements: Sequence[str]) -> Check:
    versions = {}
    lacking = []
    for requirement in requirements:
        package = requirement_name(requirement)
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            lacking.append(package)
    if lacking:
        reason = f"{', '.join(lacking)} not installed"
        return Check(name, False, reason, install(name))
    return Check(name, True, ", ".join(f"{name} {known}" for name, known in versions.items()))


def _engine(name: str) -> Check:
    return _tried(name, DEVICE_EXTRAS, lambda: str(plugins.load("pbc.engines", name)().version()))


def _lowering(name: str) -> Check:
    def loaded() -> str:
        lowering = plugins.load("pbc.lowerings", name)
        for package in lowering.packages:
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return ", ".join(lowering.packages)

    return _tried(name, EXTRAS, loaded)


def _tried(name: str, extras: Mapping[str, str], load: Callable[[], str]) -> Check:
    """Return whether something loads; what it needs and lacks comes with the way to install it."""
    try:
        return Check(name, True, load())
    except ModuleNotFoundError as error:
        needs = missing(error, extras)
        if needs is None:
            return Check(name, False, str(error))
        package, _, remedy = needs.partition(", which is not installed: ")
        return Check(name, False, f"{package} is not installed", remedy)
    except (PbcError, ImportError, OSError) as error:
        return Check(name, False, str(error).partition("\n")[0])


def _target(name: str, able: set[str]) -> Check:
    target = load_target(name)
    engines = dict.fromkeys((target.engine, *target.engines))
    usable = [engine for engine in engines if engine in able]
    if usable:
        return Check(name, True, ", ".join(usable))
    return Check(name, False, f"none of {', '.join(engines)} can be compiled for here")


def _tool(name: str, users: str, remedy: str) -> Check:
    path = shutil.which(name)
    if path is None:
        return Check(name, False, f"not found; {users} need it", remedy)
    return Check(name, True, path)
