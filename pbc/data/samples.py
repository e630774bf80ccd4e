"""Decoded photos with their labels: what training and evaluation read."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pbc.data import layout
from pbc.data.decoding import BrokenImageError, Photo, UnsupportedImageError
from pbc.data.inventory import Inventory, printable
from pbc.data.listing import FILES, Listing
from pbc.data.spec import InputSpec
from pbc.errors import PbcError
from pbc.util.files import read_bytes

UNLABELLED = -1

# Decoded photos that wait for those before them.
_WINDOW, _WINDOW_BYTES = 256, 128 << 20


@dataclass(frozen=True)
class Samples:
    """Decoded images with their labels; as many as `ram_bytes` allows stay decoded in memory.

    names: file names relative to the data's root, for messages.
    labels: int64[N], indices into `classes`; UNLABELLED where there are none.
    hashes: bytes[32] each, sha256 of the file's bytes: the sample's identity in a cache.
    inventory: every file of the data, read or left out, with the reason.
    root: the folder or zip that the names are relative to; empty where they are of no file.
    """

    spec: InputSpec
    names: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    hashes: tuple[bytes, ...]
    inventory: Inventory
    _decoded: np.ndarray
    _read: Callable[[str], bytes]
    root: str = ""
    # Which rows of what was read these samples are; None: all, in order.
    _rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of every photo that was to be read and could not be."""
        return self.inventory.skipped

    def decode(self, index: int) -> np.ndarray:
        """uint8[H, W, channels] of one sample."""
        row = index if self._rows is None else self._rows[index]
        if row < len(self._decoded):
            image: np.ndarray = self._decoded[row]
            return image
        try:
            return self.spec.decode(self._read(self.names[index]))
        except Exception as error:  # zipfile raises nearly anything on a damaged entry
            raise PbcError(f"{self.names[index]} was readable and no longer is: {error}") from error

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """uint8[B, H, W, channels] of several samples."""
        rows = indices if self._rows is None else self._rows[indices]
        if rows.max() < len(self._decoded):
            gathered: np.ndarray = self._decoded[rows]
            return gathered
        return np.stack([self.decode(int(index)) for index in indices])

    def images(self, indices: np.ndarray) -> np.ndarray:
        """f32[B, channels, H, W] of several samples, normalised (NHWC memory)."""
        return self.spec.normalise(self.batch(indices))

    def subset(self, indices: np.ndarray) -> Samples:
        """Some of the samples, int64[n]; classes and memory are shared."""
        return replace(
            self,
            names=tuple(self.names[index] for index in indices),
            labels=self.labels[indices],
            hashes=tuple(self.hashes[index] for index in indices),
            _rows=indices if self._rows is None else self._rows[indices],
        )

    @property
    def in_memory(self) -> bool:
        """Whether all stay decoded; the others are decoded whenever they are read."""
        if self._rows is None:
            return len(self._decoded) == len(self.names)
        return not self._rows.size or bool(self._rows.max() < len(self._decoded))

    def path(self, index: int) -> str:
        """Where a sample is, for people: its file, or its place in a zip."""
        return str(Path(self.root) / self.names[index])

    def with_classes(self, classes: Sequence[str]) -> Samples:
        """The same samples, labelled by position in `classes`, which must hold every name.

        Names are compared in Unicode's form NFC, whatever form `classes` has them in.
        """
        position = {unicodedata.normalize("NFC", name): index for index, name in enumerate(classes)}
        mapping = np.array([position[name] for name in self.classes], dtype=np.int64)
        return replace(self, labels=mapping[self.labels], classes=tuple(classes))

    def digest(self) -> str:
        """sha256 (hex) over contents and labels in order: the identity of the whole set."""
        total = hashlib.sha256(json.dumps(self.classes).encode())
        for content in self.hashes:
            total.update(content)
        total.update(self.labels.astype("<i8").tobytes())
        return total.hexdigest()


class ImageFolder:
    """A folder of class folders of images, or a zip file of them."""

    @staticmethod
    def open(
        path: Path | str,
        spec: InputSpec,
        *,
        held_out: bool = False,
        strict: bool = False,
        ram_bytes: int = 1 << 30,
        known: Collection[bytes] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Samples:
        """Read and decode every image once; what cannot be read is skipped, or stops if `strict`.

        Of a data set in parts (train/ and val/), the part to train on is read or, if `held_out`,
        the other one; see `layout.classes`.
        known: sha256 of photos that could be decoded before; they are when somebody asks for them.
        `progress` is called with (done, total) images before the first one and after each.
        """
        listing = layout.listed(Path(path))
        found = layout.classes(listing, held_out=held_out)
        classes = tuple(found.members)
        labels = [label for label, name in enumerate(classes) for _ in found.members[name]]
        names = [name for name in classes for name in found.members[name]]
        account = Inventory(
            ignored=(
                *listing.ignored,
                *((name, "outside class folders") for name in found.outside),
            ),
            note=found.note,
        )
        samples = _load(
            listing, names, labels, classes, spec, account, strict, ram_bytes, known, progress
        )
        alive = np.bincount(samples.labels, minlength=len(classes))
        if not alive.all():
            lost = classes[int(alive.argmin())]
            why = dict(samples.skipped)[found.members[lost][0]]
            raise PbcError(
                printable(f"class folder {lost!r} of {path} has no readable image: {why}")
            )
        return samples


def images(
    path: Path | str,
    spec: InputSpec,
    *,
    strict: bool = False,
    limit: int | None = None,
    ram_bytes: int = 1 << 30,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """All images below a folder or in a zip, without labels; at most `limit`, evenly spread."""
    listing = layout.listed(Path(path))
    names = sorted(listing.photos)
    if not names:
        raise PbcError(f"{path} has no images in any format that is known")
    if limit is not None and limit < len(names):
        names = [names[index] for index in np.linspace(0, len(names) - 1, limit).astype(int)]
    labels = [UNLABELLED] * len(names)
    account = Inventory(ignored=tuple(listing.ignored))
    return _load(listing, names, labels, (), spec, account, strict, ram_bytes, (), progress)


def read_image(path: Path | str, spec: InputSpec) -> np.ndarray:
    """uint8[H, W, channels] of one image file; raises PbcError for one that cannot be read."""
    try:
        data = read_bytes(Path(path), FILES.most_bytes)
        return spec.photo(data, str(path)).pixels
    except OSError as error:
        raise PbcError(f"cannot read {path}: {error.strerror or error}") from error
    except UnsupportedImageError as error:
        raise PbcError(f"cannot read {path}: {error}") from error
    except BrokenImageError as error:
        raise PbcError(f"{path} is not an image that can be decoded: {error}") from error


def _load(
    listing: Listing[Any],
    names: Sequence[str],
    labels: Sequence[int],
    classes: tuple[str, ...],
    spec: InputSpec,
    account: Inventory,
    strict: bool,
    ram_bytes: int,
    known: Collection[bytes],
    progress: Callable[[int, int], None] | None,
) -> Samples:
    """Decode `names` on all cores, drop what cannot be, keep what fits in `ram_bytes`."""
    channels, height, width = spec.shape
    capacity = min(len(names), ram_bytes // (height * width * channels))
    # Untouched pages of an empty array cost nothing, so broken images only shorten it.
    decoded = np.empty((capacity, height, width, channels), np.uint8)
    hashes: list[bytes] = []
    alive: list[int] = []
    broken = list(listing.unreadable)
    unsupported: list[tuple[str, str]] = []
    remarks: Counter[str] = Counter()
    if strict and broken:
        raise PbcError(
            printable(f"{broken[0][0]} of {listing.root} cannot be read: {broken[0][1]}")
        )

    def load(name: str) -> tuple[bytes, Photo | None] | Exception:
        try:
            with FILES.held(listing.size_bytes(name)):
                data = listing.read(name)
                content = hashlib.sha256(data).digest()
                return content, None if content in known else spec.photo(data, name)
        except Exception as error:  # zipfile raises nearly anything on a damaged entry
            return error

    if progress is not None:
        progress(0, len(names))
    window = max(1, min(_WINDOW, _WINDOW_BYTES // (height * width * channels)))
    for index, result in enumerate(_ordered_map(load, names, window)):
        if progress is not None:
            progress(index + 1, len(names))
        if isinstance(result, Exception):
            foreign = isinstance(result, UnsupportedImageError)
            if strict:
                fault = "cannot be read" if foreign else "is broken"
                why = _reason(result)
                raise PbcError(printable(f"{names[index]} of {listing.root} {fault}: {why}"))
            (unsupported if foreign else broken).append((names[index], _reason(result)))
            continue
        content, photo = result
        if photo is None:  # the first ones alone are in memory, so none after it is
            capacity = min(capacity, len(alive))
        else:
            remarks.update(photo.remarks)
        if photo is not None and len(alive) < capacity:
            decoded[len(alive)] = photo.pixels
        hashes.append(content)
        alive.append(index)
    account = replace(
        account,
        read=len(alive),
        broken=tuple(broken),
        unsupported=tuple(unsupported),
        remarks=tuple(sorted(remarks.items())),
    )
    if not alive:
        why = printable(account.skipped[-1][1])
        raise PbcError(f"none of the {len(names)} images of {listing.root} can be decoded: {why}")
    return Samples(
        spec,
        tuple(names[index] for index in alive),
        np.array([labels[index] for index in alive], dtype=np.int64),
        classes,
        tuple(hashes),
        account,
        decoded[: min(capacity, len(alive))],
        listing.read,
        str(listing.root),
    )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror
    return str(error) or type(error).__name__


def _ordered_map(
    load: Callable[[str], tuple[bytes, Photo | None] | Exception], names: Sequence[str], window: int
) -> Iterable[tuple[bytes, Photo | None] | Exception]:
    """Map on all cores (PIL and hashlib release the GIL), holding at most `window` results."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for start in range(0, len(names), window):
            yield from pool.map(load, names[start : start + window])
