"""The photos below a root, by name, and everything there that is none, with the reason."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Generic, TypeVar

from pbc.data import formats, junk
from pbc.data.budget import Budget
from pbc.data.decoding import BrokenImageError
from pbc.errors import PbcError
from pbc.util.terminal import escaped

FILES = Budget(256 << 20)
"""What all files that are being read may take together, and so the most of one file."""

Place = TypeVar("Place")
"""Where a file is: a path, or the entry of a zip file."""

# Deeper is a loop or an attack.
_MOST_DEPTH = 64
# Millions of photos are beyond a device; a walk that finds more is going round in circles.
_MOST_ENTRIES = 4_000_000


@dataclass
class Listing(Generic[Place]):
    """What is below a root. Names are relative to it, posix, in Unicode's form NFC, and unique.

    photos: files that are photos by suffix or content. folders: all of them, empty ones too.
    others: folders that hold a file which is no photo. ignored: (name, reason).
    unreadable: (folder, reason).
    """

    root: str
    read_bytes: Callable[[Place, int], bytes]
    size_bytes_of: Callable[[Place], int]
    photos: dict[str, Place] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    _entries: int = 0

    def add_folder(self, parts: tuple[str, ...]) -> bool:
        """Enter a folder below the root by the parts of its name; False if it is ignored."""
        self._count()
        deep = f"below more than {_MOST_DEPTH} folders" if len(parts) > _MOST_DEPTH else None
        if (why := deep or junk.reason(parts[-1])) is not None:
            self.ignored.append((f"{'/'.join(parts)}/", why))
            return False
        self.folders.update("/".join(parts[: depth + 1]) for depth in range(len(parts)))
        return True

    def add_file(self, parts: tuple[str, ...], place: Place) -> None:
        """Enter a file, as a photo if it is one by its suffix or its first bytes."""
        self._count()
        name, folder = "/".join(parts), "/".join(parts[:-1])
        if (why := junk.reason(parts[-1])) is None:
            self.folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
            why = self._no_photo(name, place)
            if why is not None:
                self.others.add(folder)
        if why is None:
            self.photos[self._unique(name)] = place
        else:
            self.ignored.append((name, why))

    def ignore(self, parts: tuple[str, ...], why: str) -> None:
        """Leave an entry out."""
        self._count()
        self.ignored.append(("/".join(parts), why))

    def rebase(self, top: str) -> None:
        """Name photos and folders relative to a folder that all of them are in."""
        self.photos = {name.removeprefix(top): place for name, place in self.photos.items()}
        self.folders = {name.removeprefix(top) for name in self.folders if name.startswith(top)}
        self.others = {name.removeprefix(top) for name in self.others if name.startswith(top)}

    def size_bytes(self, name: str) -> int:
        """Return the size of a photo's file; raises BrokenImageError for one beyond the bound."""
        size = self.size_bytes_of(self.photos[name])
        if size > FILES.most_bytes:
            raise BrokenImageError(too_large(size))
        return size

    def read(self, name: str) -> bytes:
        """Return the bytes of a photo's file; raises OSError and what zipfile does."""
        data = self.read_bytes(self.photos[name], FILES.most_bytes + 1)
        if len(data) > FILES.most_bytes:
            raise BrokenImageError(too_large(len(data)))
        return data

    def _no_photo(self, name: str, place: Place) -> str | None:
        if formats.by_suffix(name) is not None:
            return None
        try:
            format = formats.identify(self.read_bytes(place, formats.HEAD_BYTES))
        except Exception as error:  # zipfile raises nearly anything on a malformed entry
            return f"cannot be read: {error}"
        if format is None:
            return "no photo"
        return None if format.photo else f"{format.name}, no photo"

    def _unique(self, name: str) -> str:
        """Return the name, marked where another file has it already but for its normal form."""
        unique, again = name, 1
        while unique in self.photos:
            again += 1
            unique = f"{name} ({again})"
        return unique

    def _count(self) -> None:
        self._entries += 1
        if self._entries > _MOST_ENTRIES:
            raise PbcError(f"{self.root} has more than {_MOST_ENTRIES} files; give a part of it")


def too_large(size_bytes: int) -> str:
    return (
        f"the file takes {size_bytes / 1e6:.0f} MB; "
        f"at most {FILES.most_bytes / 1e6:.0f} MB are read"
    )


def normal(name: str) -> str:
    r"""Return a name in NFC, bytes that are no UTF-8 and control characters as \xNN.

    Composed and decomposed spellings, as Linux and macOS write them, become the same name, and
    every name can be stored and printed.
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return escaped(unicodedata.normalize("NFC", text))


def suffix(name: str) -> str:
    """Return the suffix of a name in lower case, such as `.heic`; the name itself if none."""
    return PurePosixPath(name).suffix.lower() or PurePosixPath(name).name


def basename(name: str) -> str:
    """Return the last part of a name, without the slash of a folder."""
    return PurePosixPath(name).name
