"""The exact feature cache: what the frozen prefix makes of a sample is computed once.

A row of one array per sample, all features of the sample side by side. What does not fit is never
cached and nothing is ever evicted: training visits every sample once an epoch, the pattern for
which an LRU evicts everything before its next use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pbc.bundle import Bundle
from pbc.errors import PbcError
from pbc.runtime.features.keys import chunk_keys
from pbc.runtime.features.stores import DiskStore, Layout, MemoryStore, Store
from pbc.runtime.options import TrainOptions


class FeatureCache:
    """The cached features of a fixed set of samples, each at its own level.

    slots: int64[n], each sample's row, or -1 for those that did not fit.
    """

    def __init__(self, layout: Layout, store: Store, slots: np.ndarray) -> None:
        self.slots = slots
        self._layout = layout
        self._store = store
        self._filled = np.zeros(len(store.rows), dtype=bool)

    @property
    def complete(self) -> bool:
        """Return whether there is a row for every sample."""
        return bool((self.slots >= 0).all())

    def holds(self, samples: np.ndarray) -> np.ndarray:
        """Return bool[b]: of which int64[b] samples the features are here, put or verified."""
        slots = self.slots[samples]
        held: np.ndarray = (slots >= 0) & self._filled[slots]
        return held

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
        self._filled[slots] = True

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
                keys = chunk_keys(level_key(level), size, [contents[index] for index in chunk])
                slots = self.slots[chunk]
                if self._store.holds(slots, keys):
                    self._filled[slots] = True
                else:
                    self.put(slots, keys, compute(level, chunk))
                done += len(chunk)
                progress(done, len(cached))


def open_cache(
    bundle: Bundle, options: TrainOptions, rows: int, folder: Path
) -> FeatureCache | None:
    """Make an empty cache, or find the disk's; None if not even one row would fit.

    Raises DiskFullError where the disk has no room for it.
    """
    shapes = {name: tuple(shape) for name, shape in bundle.manifest["features"].items()}
    layout = Layout(shapes)
    row_bytes = layout.width * np.dtype(options.cache_dtype).itemsize
    count = min(rows, options.cache_mb * 2**20 // row_bytes)
    if count == 0:
        return None
    store: Store
    if options.cache == "disk":
        store = DiskStore(folder, count, layout.width, options.cache_dtype)
    else:
        store = MemoryStore(count, layout.width, options.cache_dtype)
    return FeatureCache(layout, store, assign_slots(rows, count, options.seed))


def assign_slots(samples: int, capacity: int, seed: int) -> np.ndarray:
    """Return int64[samples]: rows for the first `capacity` samples of a seeded order, else -1."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(samples)
    chosen = np.sort(order[:capacity])
    slots = np.full(samples, -1, dtype=np.int64)
    slots[chosen] = np.arange(len(chosen))
    return slots
