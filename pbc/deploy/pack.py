"""Put a deploy into an archive, for boards that another updater brings files to."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pbc.bundle import Bundle
from pbc.bundle.keys import read_keys
from pbc.bundle.trust import configured, require
from pbc.deploy.deployment import prepared
from pbc.deploy.payload import PROBE, SCRIPT
from pbc.deploy.wheels import BoardPython
from pbc.errors import PbcError, UsageError
from pbc.util.atomic import replacing

ACTIVATE = "activate.sh"
_OLDEST = (3, 10)
_FLOOR = "2.28"
# A full version counts too: wheels are for 3.11, whatever comes after it.
_PYTHON = re.compile(r"(3\.\d+)(?:\.\w+)?\+?")
_LIBC = re.compile(r"2\.(\d+)")


@dataclass(frozen=True)
class PackOptions:
    """Facts of the board that cannot be asked for, and where wheels come from.

    python, libc: versions, like 3.11 and 2.36; None is what the bundle's target says, else this
    machine's Python and the oldest C library that its wheels run on. wheels, offline: see
    pbc.deploy.wheels.collect. trust, allow_older: see pbc.deploy.deployment.DeployOptions.
    """

    python: str | None = None
    libc: str | None = None
    wheels: Path | None = None
    offline: bool = False
    trust: tuple[str, ...] = ()
    allow_older: bool = False


def pack(path: Path | str, output: Path, options: PackOptions = PackOptions()) -> dict[str, Any]:
    """Write an archive whose activate.sh does on a board what a deploy does; say what for.

    The bytes depend on the bundle, pbc and the wheels alone.
    """
    bundle = Bundle.open(path)
    keys = read_keys(os.pathsep.join(options.trust)) if options.trust else configured()
    signer = require(bundle, keys)
    python = _board_python(bundle.manifest, options)
    ready = prepared(
        bundle,
        python,
        wheels=options.wheels,
        offline=options.offline,
        keys=keys,
        signer=signer,
        allow_older=options.allow_older,
    )
    needs = dict(ready.plan["needs"])
    # The wheels were chosen for this C library; an older one could not load them.
    libc = ".".join(str(number) for number in python.glibc)
    needs["requires"] = {**needs["requires"], "libc": f"glibc>={libc}"}
    plan = json.dumps({**ready.plan, "needs": needs}, sort_keys=True, indent=1)
    files: dict[str, Callable[[], bytes]] = {
        ACTIVATE: resources.files("pbc.deploy").joinpath(ACTIVATE).read_bytes,
        "board.py": lambda: SCRIPT,
        "probe.sh": lambda: PROBE,
        "plan.json": plan.encode,
        "python-version": f"{python.version}\n".encode,
        **{f"files/{sha256}": read for sha256, read in sorted(ready.sources.items())},
    }
    with replacing(output, mode=0o644) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for name, read in files.items():
            data = read()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            entry.mode = 0o755 if name == ACTIVATE else 0o644
            archive.addfile(entry, io.BytesIO(data))
    return {
        "archive": str(output),
        "bytes": output.stat().st_size,
        "python": python.version,
        "arch": python.arch,
        "libc": f"glibc {libc}",
    }


def _board_python(manifest: Mapping[str, Any], options: PackOptions) -> BoardPython:
    target = manifest.get("target", {})
    tags: Mapping[str, str] = target.get("tags", {})
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    told_python = options.python or _at_least_oldest(tags.get("python")) or own
    matched = _PYTHON.fullmatch(told_python)
    if matched is None or _numbers(matched[1]) < _OLDEST:
        raise UsageError(f"--python-version is {told_python!r}; expected 3.10 or newer, like 3.11")
    version = matched[1]
    floor = re.search(r"glibc\s*>=\s*(2\.\d+)", manifest["requires"].get("libc", ""))
    told = tags.get("libc", "").removeprefix("glibc ")
    libc = options.libc or (told if _LIBC.fullmatch(told) else None) or (floor and floor[1])
    if not _LIBC.fullmatch(libc or _FLOOR):
        raise UsageError(f"--libc is {libc!r}; expected glibc's version, like 2.36")
    arch = target.get("arch", "any")
    if arch not in ("aarch64", "x86_64", "any"):
        raise PbcError(f"the bundle is for {arch}; its engines have no wheels for that")
    major, minor = _numbers(libc or _FLOOR)
    abi = f"cp{version.replace('.', '')}"
    return BoardPython(version, abi, platform.machine() if arch == "any" else arch, (major, minor))


def _at_least_oldest(version: str | None) -> str | None:
    """Return a target's Python; None for one older than pbc runs on: then another is there."""
    return version if version and _numbers(version) >= _OLDEST else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])
