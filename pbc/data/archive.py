"""A zip file of photos: its entries, as far as they can be inflated within a bound."""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path

from pbc.data.decoding import BrokenImageError
from pbc.data.listing import Listing, normal
from pbc.errors import PbcError
from pbc.util.files import opened

Parts = tuple[str, ...]

_UTF_8_FLAG = 0x800
# The other decoders of zipfile inflate what they are given whole, whatever they are asked for.
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def is_zip(path: Path) -> bool:
    """Return whether a path is a zip file; a pipe or a device is none, and is not waited for."""
    try:
        with opened(path) as file:
            return zipfile.is_zipfile(file)
    except OSError:
        return False


def list_zip(path: Path) -> Listing[zipfile.ZipInfo]:
    """List the entries of a zip file; raises PbcError for a file that is none."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise PbcError(f"{path} is neither a folder nor a zip file of images: {error}") from error

    def read(entry: zipfile.ZipInfo, most_bytes: int) -> bytes:
        if entry.compress_type not in _BOUNDED:
            raise BrokenImageError("the entry is compressed by another method than deflate")
        with archive.open(entry) as file:
            return file.read(min(most_bytes, entry.file_size))

    listing: Listing[zipfile.ZipInfo] = Listing(str(path), read, lambda entry: entry.file_size)
    taken: set[Parts] = set()
    entered: dict[Parts, bool] = {}
    end = 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        *folders, file = _parts(entry)
        overlaps, end = entry.header_offset < end, max(end, _end(entry))
        if not _enter(listing, tuple(folders), entered) or not file:
            continue
        parts = (*folders, file)
        if overlaps or parts in taken:
            listing.ignore(parts, "a malformed entry of the zip file")
        else:
            taken.add(parts)
            listing.add_file(parts, entry)
    _look_through_top(listing)
    return listing


def _look_through_top(listing: Listing[zipfile.ZipInfo]) -> None:
    """Name photos below the one folder that most archives are packed in, if it holds folders."""
    tops = {name.partition("/")[0] for name in (*listing.photos, *listing.folders)}
    if len(tops) == 1 and all(name.count("/") > 1 for name in listing.photos):
        listing.rebase(f"{tops.pop()}/")


def _end(entry: zipfile.ZipInfo) -> int:
    return entry.header_offset + entry.compress_size


def _parts(entry: zipfile.ZipInfo) -> list[str]:
    """Return the folders and the name of an entry; the name is empty for a folder itself.

    Some programs of Windows write backslashes, and macOS writes UTF-8 without saying so.
    """
    name = entry.orig_filename
    if not entry.flag_bits & _UTF_8_FLAG:
        with contextlib.suppress(UnicodeError):  # else code page 437, as the standard has it
            name = name.encode("cp437").decode("utf-8")
    *folders, file = name.partition("\0")[0].replace("\\", "/").split("/")
    return [normal(part) for part in folders if part not in ("", ".")] + [normal(file)]


def _enter(listing: Listing[zipfile.ZipInfo], folder: Parts, entered: dict[Parts, bool]) -> bool:
    """Enter a folder and those around it; False if one of them is ignored."""
    for depth in range(1, len(folder) + 1):
        around = folder[:depth]
        if around not in entered:
            entered[around] = listing.add_folder(around)
        if not entered[around]:
            return False
    return True
