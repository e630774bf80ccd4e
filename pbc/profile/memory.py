"""Memory of this process: its peak, and its share of what it maps now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pbc.runtime.meter import peak_memory_bytes

MOST_STEPS = 30
"""Steps of a process whose memory is measured, where its peak keeps growing."""

# The peak of memory has settled when this many steps in a row added less than a share of it.
_SETTLED_STEPS = 3
_SETTLED_SHARE = 0.005


def until_settled(step: Callable[[], object]) -> int:
    """Repeat a step until it needs no more memory than before; return how often.

    A step of a slow network takes seconds, and the second or third is like all that follow.
    """
    peaks: list[int] = []
    while len(peaks) < MOST_STEPS:
        step()
        peaks.append(peak_bytes())
        before = peaks[-1 - _SETTLED_STEPS] if len(peaks) > _SETTLED_STEPS else 0
        if peaks[-1] - before < _SETTLED_SHARE * peaks[-1]:
            break
    return len(peaks)


def memory() -> dict[str, int | None]:
    """Return the peak of what this process had resident, and what is its own share of it now.

    `getrusage` would do for neither: its peak is inherited from the parent process.
    """
    return {
        "peak_rss_bytes": peak_bytes(),
        "pss_bytes": _kilobytes("smaps_rollup", "Pss"),
    }


def peak_bytes() -> int:
    """Return the peak of what this process had resident."""
    return _kilobytes("status", "VmHWM") or peak_memory_bytes()


def forget_peak() -> int | None:
    """Have the peak count from here on; return what this process holds of its own, in bytes.

    None where the system does not say: then `peak_above` cannot be asked.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _kilobytes("status", "RssAnon")


def peak_above(own_bytes: int) -> int:
    """Return the peak since `forget_peak`, above what was there then, without mapped files."""
    return peak_bytes() - (_kilobytes("status", "RssFile") or 0) - own_bytes


def _kilobytes(file: str, entry: str) -> int | None:
    """Return a figure of /proc in bytes; None where the system has none."""
    try:
        lines = Path("/proc/self", file).read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith(f"{entry}:"))
    return next((1024 * int(count) for count in found), None)
