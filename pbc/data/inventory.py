"""The account of a data set: what was read, what was left out, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pbc.data.junk import HIDDEN, SYSTEM
from pbc.data.listing import basename, suffix

_NAMED_MOST = 3

Entries = tuple[tuple[str, str], ...]
"""(name, reason) each."""


@dataclass(frozen=True)
class Inventory:
    """Every file of a data set, counted as read, skipped or ignored.

    read: photos that were decoded.
    broken: photos that could not be. unsupported: photos of a format that is not read here.
    ignored: files and folders that are no photos of the data: what systems leave, other files,
    links to what is read elsewhere, photos outside the class folders.
    remarks: (what was done to photos beyond scaling, how many).
    note: how the folders were understood, where they are not the classes themselves.
    """

    read: int = 0
    broken: Entries = ()
    unsupported: Entries = ()
    ignored: Entries = ()
    remarks: tuple[tuple[str, int], ...] = ()
    note: str = ""

    @property
    def skipped(self) -> Entries:
        """Photos that were to be read and were not; an error where the caller is strict."""
        return (*self.broken, *self.unsupported)

    def lines(self) -> list[str]:
        """Return what a user has to know, in few lines; none if all there is was read as it is."""
        lines = [self.note] if self.note else []
        if self.broken:
            total = self.read + len(self.skipped)
            lines.append(
                f"skipped {len(self.broken)} broken images of {total}: {_named(self.broken)}"
            )
        lines += [
            f"skipped {count} {kind} files: {hint}"
            for (kind, hint), count in _counted(
                (suffix(name), hint) for name, hint in self.unsupported
            )
        ]
        if self.ignored:
            reasons = (
                f"{count} {reason} ({_kinds(self.ignored, reason)})"
                for reason, count in _counted(reason for _, reason in self.ignored)
            )
            lines.append(f"ignored {len(self.ignored)} files: {', '.join(reasons)}")
        if self.remarks:
            lines.append("; ".join(f"{count} photos {text}" for text, count in self.remarks))
        return [printable(line) for line in lines]

    def to_json(self) -> dict[str, Any]:
        """Return counts, names and reasons."""
        return {
            "read": self.read,
            "broken": [list(entry) for entry in self.broken],
            "unsupported": [list(entry) for entry in self.unsupported],
            "ignored": [list(entry) for entry in self.ignored],
            "remarks": dict(self.remarks),
            "note": self.note,
        }


def printable(text: str) -> str:
    """Return the text with control characters escaped: a file name must not move the cursor."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _named(entries: Entries) -> str:
    shown = ", ".join(f"{name} ({reason})" for name, reason in entries[:_NAMED_MOST])
    return shown + _more(len(entries))


def _kinds(entries: Entries, wanted: str) -> str:
    """Return what the entries with a reason are called, the most frequent first: their suffixes.

    What systems leave is known by its whole name.
    """
    spell = basename if wanted in (SYSTEM, HIDDEN) else suffix
    kinds = [kind for kind, _ in _counted(spell(name) for name, why in entries if why == wanted)]
    return ", ".join(kinds[:_NAMED_MOST]) + _more(len(kinds))


def _more(count: int) -> str:
    return f" and {count - _NAMED_MOST} more" if count > _NAMED_MOST else ""


def _counted(items: Iterable[Any]) -> list[tuple[Any, int]]:
    """Return the different items with how often each comes, the most frequent first."""
    return sorted(Counter(items).items(), key=lambda item: (-item[1], item[0]))
