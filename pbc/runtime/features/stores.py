"""Rows of cached features, in memory or in a memory-mapped file, and which of them are valid."""

from __future__ import annotations

import errno
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from pbc.errors import PbcError
from pbc.runtime.features.keys import KEY_BYTES
from pbc.util.atomic import cannot_write

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(PbcError):
    """There is no room for the cache; whoever trains can do without."""


@dataclass(frozen=True)
class Layout:
    """The order of named features in one row; a [C, H, W] feature is stored as [H, W, C].

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
        self._keys = np.zeros((count, KEY_BYTES), np.uint8)

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

    _RECORD = np.dtype([("key", np.uint8, KEY_BYTES), ("crc", np.uint32)])

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
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


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
