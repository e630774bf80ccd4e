"""This machine's CPU: what decides how fast it is, and which last bits it computes."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from pathlib import Path

from pbc.errors import UsageError

# More than there are CPUs gain nothing and do no harm, until a process is not given so many.
_THREADS_ANYWHERE = 64

DECIDING_FLAGS = frozenset(
    (
        "avx",
        "avx2",
        "avx512bw",
        "avx512cd",
        "avx512dq",
        "avx512f",
        "avx512vl",
        "bmi2",
        "f16c",
        "fma",
    )
)
"""Extensions of x86 without which code that was built for them does not run."""


def cores() -> int:
    """Return how many cores this process may run on; the second thread of one counts nothing."""
    try:
        threads = os.sched_getaffinity(0)
        siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        return len({Path(siblings.format(thread)).read_text() for thread in threads})
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def check_threads(count: int | None) -> None:
    """Raise UsageError for a number of threads that an engine cannot start here, or would die of.

    None is as many as the engine likes.
    """
    most = max(_THREADS_ANYWHERE, os.cpu_count() or 1)
    if count is not None and not 1 <= count <= most:
        raise UsageError(f"threads is {count}; it must be in 1…{most}")


def cpu_name() -> str:
    """Return the CPU's name, for whoever reads figures that were measured on it."""
    named = (value for key, value in _facts() if key == "model name")
    return next(named, platform.processor() or platform.machine())


@cache
def cpu_identity() -> str:
    """Return the CPU's name, and a hash of all that lets results differ between CPUs."""
    deciding = {
        "model name", "vendor_id", "cpu family", "model", "stepping", "flags", "Features",
        "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision",
    }  # fmt: skip
    facts = sorted({f"{key}: {value}" for key, value in _facts() if key in deciding})
    digest = hashlib.sha256("\n".join([platform.machine(), *facts]).encode()).hexdigest()
    return f"{cpu_name()} ({digest[:8]})"


def machine() -> str:
    """Return what decides how long things take here: the CPU, and how much of it."""
    return f"{cpu_identity()}, {cores()} cores"


def missing_flags(wanted: list[str]) -> list[str]:
    """Return those extensions of x86 that this CPU lacks; none where it does not tell."""
    flags = {flag for key, value in _facts() if key == "flags" for flag in value.split()}
    return [flag for flag in wanted if flags and flag not in flags]


def _facts() -> list[tuple[str, str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [
        (key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)
    ]
