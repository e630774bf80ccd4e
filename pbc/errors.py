"""What the user can fix, said in one line; any other exception is our bug."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_LISTED_MOST = 15
_LISTED_NEAREST = 5
_LONGEST_REASON = 240


class PbcError(Exception):
    """What the user can fix: one line, exit code 1; several where several things are wrong."""

    exit_code = 1

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines

    def __str__(self) -> str:
        """Return the lines as a text."""
        return "\n".join(self.lines)


class UsageError(PbcError):
    """A command or an option that cannot be meant: one line, exit code 2."""

    exit_code = 2


def suggest(kind: str, name: str, available: Iterable[str]) -> str:
    """Return the line for a name that does not exist, with the nearest one that does.

    >>> suggest("pass", "prune-dim", ["align", "prune-dims"])
    "no pass named 'prune-dim'; did you mean 'prune-dims'? (available: align, prune-dims)"
    """
    names = sorted(set(available))
    close = nearest(name, names)
    hint = f"; did you mean {close!r}?" if close else ""
    return f"no {kind} named {name!r}{hint} (available: {listed(name, names) or 'none'})"


def listed(name: str, names: list[str]) -> str:
    """Return all names in one line, or the nearest few where they would fill a screen."""
    if len(names) <= _LISTED_MOST:
        return ", ".join(names)
    near = difflib.get_close_matches(name, names, n=_LISTED_NEAREST, cutoff=0.0)
    return f"{', '.join(near)} and {len(names) - len(near)} more"


def nearest(name: str, available: Iterable[str]) -> str | None:
    """Return the available name most like `name`, or None if nothing comes near."""
    lowered = {candidate.lower(): candidate for candidate in sorted(available)}
    wanted = name.lower()
    matches = difflib.get_close_matches(wanted, lowered, n=1, cutoff=0.6)
    if not matches and wanted:  # a word cut short, like 'prun' for 'prune-dims'
        matches = [candidate for candidate in lowered if candidate.startswith(wanted)][:1]
    return lowered[matches[0]] if matches else None


def reason_of(error: BaseException) -> str:
    """Return the first line of what an exception says, or its kind; the same in every run.

    >>> reason_of(OSError("cannot identify image file <_io.BytesIO object at 0x7f1f>"))
    'cannot identify image file'
    """
    lines = str(error).strip().splitlines() or [""]
    # Where an object lay in memory tells nobody anything.
    text = re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", lines[0])
    text = re.sub(r" at 0x[0-9a-f]+", "", text).strip(" :") or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 1]}…"
