"""A folder of photos: every file below it once, whichever links lead there."""

from __future__ import annotations

import os
import stat
from collections import deque
from pathlib import Path

from pbc.data import formats
from pbc.data.listing import Listing, normal
from pbc.util.files import opened

_AGAIN = "a link to what is read elsewhere"
_NO_FILE = "no regular file"

Parts = tuple[str, ...]


def list_folder(root: Path) -> Listing[Path]:
    """List what is below a folder; links are followed, and no file or folder visited twice.

    Real folders come before links, so that a file counts where it lies and not where a link to
    it is. Hard links to one file are one file, found under the first name in sorted order.
    """
    listing: Listing[Path] = Listing(str(root), _read, lambda path: path.stat().st_size)
    real = root.resolve()
    # A link to the root or above it leads round.
    seen = {_identity(path, path.stat()) for path in (real, *real.parents)}
    folders: deque[tuple[Path, Parts]] = deque([(root, ())])
    links: deque[tuple[Path, Parts]] = deque()
    while folders or links:
        if folders:
            folder, parts = folders.popleft()
            for path in _entries(listing, folder, parts):
                below = (*parts, normal(path.name))
                if path.is_symlink():
                    links.append((path, below))
                else:
                    _visit(listing, path, below, seen, folders)
        else:
            _visit(listing, *links.popleft(), seen, folders)
    return listing


def _entries(listing: Listing[Path], folder: Path, parts: Parts) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        listing.unreadable.append(("/".join(parts) or ".", error.strerror or str(error)))
        return []


def _visit(
    listing: Listing[Path],
    path: Path,
    parts: Parts,
    seen: set[object],
    folders: deque[tuple[Path, Parts]],
) -> None:
    try:
        status = path.stat()
    except OSError:  # a link to nothing, or to itself; as a photo, reading says what is wrong
        status = None
    if status is None:
        if formats.by_suffix(parts[-1]) is not None:
            listing.add_file(parts, path)
        else:
            listing.ignore(parts, "a link to nothing")
        return
    is_folder = stat.S_ISDIR(status.st_mode)
    if not is_folder and not stat.S_ISREG(status.st_mode):
        listing.ignore(parts, _NO_FILE)
        return
    identity = _identity(path, status)
    if identity in seen:
        listing.ignore(parts, _AGAIN)
        return
    if not is_folder:
        seen.add(identity)
        listing.add_file(parts, path)
    elif listing.add_folder(parts):
        seen.add(identity)
        folders.append((path, parts))


def _identity(path: Path, status: os.stat_result) -> object:
    """Return what is equal for two paths of one file; some network disks number no files."""
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _read(path: Path, most_bytes: int) -> bytes:
    with opened(path) as file:
        # Room is made for all that is asked for.
        return file.read(min(most_bytes, os.fstat(file.fileno()).st_size))
