"""Shared libraries that an engine needs on the board and that no wheel of its extra brings.

They lie inside a wheel whose other content, a compiler, has nothing to do on a device.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbc import plugins
from pbc.deploy.wheels import BoardPython, collect
from pbc.errors import PbcError

GROUP = "pbc.device_libraries"


@dataclass(frozen=True)
class DeviceLibraries:
    """Libraries for the boards of an engine; entry point group `pbc.device_libraries`, by its name.

    requirement: the wheel, as pip is asked for it. members: their places there. variable: by which
    the engine finds the first, with the others beside it. unless: where the board has to bring this
    of the board, the board has libraries of its own.
    """

    requirement: str
    members: tuple[str, ...]
    variable: str
    unless: str


@dataclass(frozen=True)
class Library:
    """Library with its place in a slot, its bytes, and the variable that is to name it, or none."""

    path: str
    data: bytes
    variable: str | None


def libraries(
    manifest: Mapping[str, Any], python: BoardPython, *, wheels: Path | None, offline: bool
) -> list[Library]:
    """Take what the bundle's engine needs out of the wheel for the board."""
    entry = plugins.entries(GROUP).get(manifest["engine"])
    if entry is None:
        return []
    wanted = entry.load()
    if not isinstance(wanted, DeviceLibraries):
        raise PbcError(
            f"{plugins.kind(GROUP)} {entry.name!r} is a {type(wanted).__name__}, "
            "not a pbc.deploy.libraries.DeviceLibraries"
        )
    if wanted.unless in manifest.get("by_hand", {}):
        return []
    found: dict[str, Library] = {}
    collected = collect(
        [wanted.requirement], python, wheels=wheels, offline=offline, dependencies=False
    )
    for wheel in collected:
        with zipfile.ZipFile(wheel) as archive:
            for member in set(wanted.members) & set(archive.namelist()):
                first = member == wanted.members[0]
                path = f"lib/{member.rpartition('/')[2]}"
                variable = wanted.variable if first else None
                found[member] = Library(path, archive.read(member), variable)
    for member in wanted.members:
        if member not in found:
            raise PbcError(f"no wheel of {wanted.requirement} for {python} has {member}")
    return [found[member] for member in wanted.members]
