"""The exact feature cache: what the frozen prefix makes of a sample is computed once.

A row of one array per sample, all features of the sample side by side, in memory or in a
memory-mapped file. What does not fit is never cached and nothing is ever evicted: training visits
every sample once an epoch, the pattern for which an LRU evicts everything before its next use.

Rows are computed in canonical chunks, and a row's key covers its whole chunk: the last bits of a
float depend on what shares a batch, and a refilled cache must hold the bits that were lost.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from pbc.errors import PbcError
from pbc.util.atomic import cannot_write

DTYPES = ("float32", "float16")
_KEY_BYTES = 32
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(PbcError):
    """There is no room for the cache; whoever trains can do without."""


@dataclass(frozen=True)
class Layout:
    """How named features share one row; a [C, H, W] feature is stored as [H, W, C].

    That is the memory order in which engines hand it over and take it back, so that neither
    putting nor gathering transposes anything.
    """

    shapes: Mapping[str, tuple[int, ...]]

    @property
    def width(self) -> int:
        """Return the number of values in a row."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def pack(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """Join features, [B, …] each, into rows [B, width]."""
        parts = []
        for name, shape in self.shapes.items():
            value = features[name]
            if len(shape) == 3:
                value = value.transpose(0, 2, 3, 1)
            parts.append(value.reshape(len(value), -1))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def unpack(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Split rows [B, width] into features; [B, C, H, W] ones are views of NHWC memory."""
        features: dict[str, np.ndarray] = {}
        start = 0
        for name, shape in self.shapes.items():
            stop = start + math.prod(shape)
            value = rows[:, start:stop]
            if len(shape) == 3:
                channels, height, width = shape
                value = value.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
            else:
                value = value.reshape(-1, *shape)
            features[name] = value
            start = stop
        return features


class Store(Protocol):
    """Rows that know which of them are valid."""

    rows: np.ndarray

    def holds(self, slots: np.ndarray, keys: Sequence[bytes]) -> bool:
        """Say whether every slot holds the row of its key."""

    def put(self, slots: np.ndarray, keys: Sequence[bytes], rows: np.ndarray) -> None:
        """Write rows into their slots."""


class MemoryStore:
    """Rows in memory; nothing survives the process."""

    def __init__(self, count: int, width: int, dtype: str) -> None:
        self.rows = np.empty((count, width), dtype)
        self._keys = np.zeros((count, _KEY_BYTES), np.uint8)

    def holds(self, slots: np.ndarray, keys: Sequence[bytes]) -> bool:
        return np.array_equal(self._keys[slots], _key_array(keys))

    def put(self, slots: np.ndarray, keys: Sequence[bytes], rows: np.ndarray) -> None:
        self.rows[slots] = rows
        self._keys[slots] = _key_array(keys)


class DiskStore:
    """Rows in a memory-mapped file, with an index of each row's key and checksum beside it.

    The index is written after the row. Whatever a crash tears apart fails the comparison of the
    key or of the checksum, and is computed again.
    """

    _RECORD = np.dtype([("key", np.uint8, _KEY_BYTES), ("crc", np.uint32)])

    def __init__(self, folder: Path, count: int, width: int, dtype: str) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: np.ndarray = _map(folder / "features.bin", np.dtype(dtype), (count, width))
        self._index = _map(folder / "index.bin", self._RECORD, (count,))

    def holds(self, slots: np.ndarray, keys: Sequence[bytes]) -> bool:
        records = self._index[slots]
        if not np.array_equal(records["key"], _key_array(keys)):
            return False
        rows = self.rows[slots]
        return all(zlib.crc32(row) == crc for row, crc in zip(rows, records["crc"], strict=True))

    def put(self, slots: np.ndarray, keys: Sequence[bytes], rows: np.ndarray) -> None:
        try:
            self._write(slots, keys, rows)
        except OSError as error:
            raise refusal(self._folder, error) from error

    def _write(self, slots: np.ndarray, keys: Sequence[bytes], rows: np.ndarray) -> None:
        stored = np.ascontiguousarray(rows, dtype=self.rows.dtype)
        self.rows[slots] = stored
        records = np.empty(len(slots), self._RECORD)
        records["key"] = _key_array(keys)
        records["crc"] = [zlib.crc32(row) for row in stored]
        self._index[slots] = records


def _key_array(keys: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY_BYTES)


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Map a file of the wanted size; its blocks are reserved first.

    A write to a mapped hole on a full disk is a SIGBUS that nothing can catch; a reservation that
    fails is an error that can be told. Raises DiskFullError, or PbcError for any other refusal.
    """
    size = dtype.itemsize * math.prod(shape)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.fchmod(handle, 0o600)
            os.ftruncate(handle, size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
        finally:
            os.close(handle)
        return np.memmap(path, dtype, "r+", shape=shape)
    except OSError as error:
        raise refusal(path, error) from error


def refusal(path: Path, error: OSError) -> PbcError:
    """Return the error for a refused write: DiskFullError where there is no room."""
    kind = DiskFullError if error.errno in _NO_ROOM else PbcError
    return kind(f"{cannot_write(path, error)}; a smaller --cache-mb or --cache ram needs no disk")


class FeatureCache:
    """The cached features of a fixed set of samples, each at its own level.

    slots: int64[n], each sample's row, or -1 for those that did not fit.
    """

    def __init__(self, layout: Layout, store: Store, slots: np.ndarray) -> None:
        self.slots = slots
        self._layout = layout
        self._store = store

    @property
    def complete(self) -> bool:
        """Return whether every sample has a row."""
        return bool((self.slots >= 0).all())

    @property
    def size_bytes(self) -> int:
        """Return the size of the rows."""
        return self._store.rows.nbytes

    def gather(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        """Return f32 features of several rows, copied in one sweep."""
        rows = self._store.rows.take(slots, axis=0)
        return self._layout.unpack(rows.astype(np.float32, copy=False))

    def put(
        self, slots: np.ndarray, keys: Sequence[bytes], features: Mapping[str, np.ndarray]
    ) -> None:
        """Write the features of several samples."""
        rows = self._layout.pack(features)
        if self._store.rows.dtype == np.float16:
            largest = float(np.abs(rows).max())
            if largest > float(np.finfo(np.float16).max):
                raise PbcError(
                    f"a feature is {largest:.3g}, beyond float16's 65504: use --cache-dtype float32"
                )
        self._store.put(slots, keys, rows)

    def fill(
        self,
        rows: np.ndarray,
        levels: np.ndarray,
        contents: Sequence[bytes],
        chunk_of: Callable[[int], int],
        level_key: Callable[[int], bytes],
        compute: Callable[[int, np.ndarray], Mapping[str, np.ndarray]],
        progress: Callable[[int, int], None],
    ) -> None:
        """Compute what the store does not hold of int64[m] samples: per level, in chunks.

        levels, contents: every sample's level and content hash. chunk_of: a level's samples per
        chunk. level_key: all that decides a level's features besides the sample.
        compute: (level, int64[b]) to features. progress: (done, total).
        """
        cached = rows[self.slots[rows] >= 0]
        done = 0
        for level in np.unique(levels[cached]).tolist():
            members = cached[levels[cached] == level]
            size = chunk_of(level)
            for start in range(0, len(members), size):
                chunk = members[start : start + size]
                keys = chunk_keys(level_key(level), [contents[index] for index in chunk])
                slots = self.slots[chunk]
                if not self._store.holds(slots, keys):
                    self.put(slots, keys, compute(level, chunk))
                done += len(chunk)
                progress(done, len(cached))


def chunk_keys(level_key: bytes, contents: Sequence[bytes]) -> list[bytes]:
    """Return the 32-byte keys of the rows that are computed together."""
    chunk = hashlib.sha256(level_key)
    for content in contents:
        chunk.update(content)
    return [
        hashlib.sha256(chunk.digest() + position.to_bytes(4, "little")).digest()
        for position in range(len(contents))
    ]


def assign_slots(samples: int, capacity: int, seed: int) -> np.ndarray:
    """Return int64[samples]: rows for the first `capacity` samples of a seeded order, else -1."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(samples)
    chosen = np.sort(order[:capacity])
    slots = np.full(samples, -1, dtype=np.int64)
    slots[chosen] = np.arange(len(chosen))
    return slots
