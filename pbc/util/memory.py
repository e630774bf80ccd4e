"""How much memory this process may still take: of the machine, its control group and its limits."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pbc.util.sizes import memory_text

_GROUPS = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Return what may still be taken without swapping, by the least of all limits that are told."""
    return max(0, min([_machine(), *_groups(), *_own_limits()]))


def refuse_large(file: BinaryIO) -> None:
    """Raise ValueError for an open file that memory cannot hold: it was written by none here."""
    size_bytes, free = os.fstat(file.fileno()).st_size, available_bytes()
    if size_bytes > free:
        raise ValueError(f"it has {memory_text(size_bytes)}, and {memory_text(free)} are free")


def _machine() -> int:
    available = _fact(Path("/proc/meminfo"), "MemAvailable")
    if available is not None:
        return 1024 * available
    # Where the system does not tell what is in use: half of what there is.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _groups() -> Iterator[int]:
    """Yield what is left of this process's control group and of all above it (cgroup v2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    own = next((line[3:] for line in lines if line.startswith("0::")), "/").lstrip("/")
    for folder in (_GROUPS / own, *(_GROUPS / own).parents):
        if not folder.is_relative_to(_GROUPS):
            return
        try:
            most = (folder / "memory.max").read_text().strip()
        except OSError:
            continue
        # Of what it holds, files can be given back.
        if most.isdecimal():
            yield int(most) - (_fact(folder / "memory.stat", "anon") or 0)


def _own_limits() -> Iterator[int]:
    for limit, held in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            yield most - 1024 * (_fact(Path("/proc/self/status"), held) or 0)


def _fact(file: Path, name: str) -> int | None:
    """Return the number that follows a name in a file of such lines; None where there is none."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.replace(":", " ").split()[:1] == [name])
    return next((int(number) for number in found), None)
