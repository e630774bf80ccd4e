"""Where features come from: the cache, the prefix of each sample's level, or both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pbc.bundle import Bundle
from pbc.data import InputSpec
from pbc.runtime.engines import Executable
from pbc.runtime.features.cache import (
    DiskStore,
    FeatureCache,
    Layout,
    MemoryStore,
    Store,
    assign_slots,
)
from pbc.runtime.features.views import Views
from pbc.runtime.meter import Meter
from pbc.runtime.options import TrainOptions


def has_prefix(bundle: Bundle) -> bool:
    """Say whether anything is frozen before the first trainable layer."""
    return "prefix/0" in bundle.manifest["graphs"]


def one_body(bundle: Bundle) -> bool:
    """Say whether all levels share one body, so that features of any level may be mixed."""
    graphs = bundle.manifest["graphs"]
    bodies = {bundle.sha256(file) for name, file in graphs.items() if name.startswith("body/")}
    return len(bodies) == 1


@dataclass(frozen=True)
class Features:
    """The features of any rows, that is, views of the samples of one set.

    levels: int64[rows], the level whose features the cache holds for each row.
    mixed: whether features of several levels may serve one body.
    chunk_of: the rows per call of a level's prefix, where there are so many.
    padded: whether shorter calls are filled up to this: an engine that specialises its code to
        the shape of its input spends more on a new shape than on a few more rows.
    """

    views: Views
    executable: Executable
    meter: Meter
    cache: FeatureCache | None
    levels: np.ndarray
    mixed: bool
    chunk_of: Callable[[int], int]
    padded: bool

    def __call__(self, level: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return f32 features of int64[b] rows at one level, cached ones where possible."""
        held = self.held(np.full(len(rows), level), rows)
        parts = []
        if held.any():
            parts.append((np.flatnonzero(held), self.gather(rows[held])))
        if not held.all():
            parts.append((np.flatnonzero(~held), self.compute(level, rows[~held])))
        return joined(parts, len(rows))

    def held(self, levels: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return bool[b]: whether the cache has what int64[b] rows are at int64[b] levels."""
        if self.cache is None:
            return np.zeros(len(rows), dtype=bool)
        held: np.ndarray = self.cache.slots[rows] >= 0
        return held if self.mixed else held & (self.levels[rows] == levels)

    def gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return f32 features of rows that the cache holds."""
        assert self.cache is not None
        features = self.cache.gather(self.cache.slots[rows])
        self.meter.lap("cache")
        return features

    def compute(self, level: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Run the prefix of a level on int64[b] rows, in one call."""
        count, size = len(rows), self.chunk_of(level)
        short = self.padded and count < size
        images = self.views.images(np.resize(rows, size) if short else rows)
        self.meter.lap("decode")
        features = self.executable.prefix(level, images)
        self.meter.lap("prefix")
        return {name: value[:count] for name, value in features.items()} if short else features


def joined(
    parts: list[tuple[np.ndarray, dict[str, np.ndarray]]], count: int
) -> dict[str, np.ndarray]:
    """Put the features of several parts at their positions among `count`."""
    _, first = parts[0]
    if len(parts) == 1:
        return first
    # In NHWC memory where there are four axes, as all parts are.
    whole = {
        name: np.empty_like(value, shape=(count, *value.shape[1:])) for name, value in first.items()
    }
    for positions, features in parts:
        for name, value in features.items():
            whole[name][positions] = value
    return whole


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


def level_key(bundle: Bundle, spec: InputSpec, engine: str, dtype: str) -> Callable[[int], bytes]:
    """Return the function from a level to the hash of all that decides its features.

    engine: name and version. The prefix counts with its graph and every file of weights it reads,
    the level with all that the manifest says about how it computes.
    """

    def key(level: int) -> bytes:
        graph = f"prefix/{level}"
        row = bundle.manifest["levels"][level]
        # A bundle that does not say what a graph reads is older: all that it holds counts.
        weights = bundle.manifest.get("weights", {}).get(graph, bundle.manifest["files"])
        files = sorted({bundle.manifest["graphs"][graph], *weights})
        parts = [str(level), *(bundle.sha256(file) for file in files)]
        parts += [str(row["precision"]), str(row["resolution"]), spec.hash(), engine, dtype]
        return hashlib.sha256("\n".join(parts).encode()).digest()

    return key
