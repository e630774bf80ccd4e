"""Where a mini-batch's features come from: the cache, the prefix of a level, or both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pbc.bundle import Bundle
from pbc.data import InputSpec, Samples
from pbc.runtime.cache import DiskStore, FeatureCache, Layout, MemoryStore, Store, assign_slots
from pbc.runtime.engines import Executable
from pbc.runtime.meter import Meter
from pbc.runtime.options import TrainOptions

_VIEW = "whole"  # the one view of a sample there is: the whole image, not augmented


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
    """The features of any samples of one set.

    levels: int64[n], the level whose features the cache holds for each sample.
    mixed: whether one mini-batch may hold features of several levels.
    """

    samples: Samples
    executable: Executable
    meter: Meter
    cache: FeatureCache | None
    levels: np.ndarray
    mixed: bool

    def __call__(self, level: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return f32 features of int64[B] samples, from the cache where it holds them."""
        if self.cache is None:
            return self.compute(level, indices)
        slots = self.cache.slots[indices]
        usable = slots >= 0
        if not self.mixed:
            usable &= self.levels[indices] == level
        if usable.all():
            features = self.cache.gather(slots)
            self.meter.lap("cache")
            return features
        if not usable.any():
            return self.compute(level, indices)
        cached = self.cache.gather(slots[usable])
        self.meter.lap("cache")
        features = {}
        for name, value in self.compute(level, indices[~usable]).items():
            # Joined in NHWC memory where there are four axes, as both parts are.
            joined = np.empty_like(value, shape=(len(indices), *value.shape[1:]))
            joined[usable], joined[~usable] = cached[name], value
            features[name] = joined
        return features

    def compute(self, level: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Run the prefix of a level."""
        images = self.samples.images(indices)
        self.meter.lap("decode")
        features = self.executable.prefix(level, images)
        self.meter.lap("prefix")
        return features


def open_cache(
    bundle: Bundle, options: TrainOptions, samples: int, folder: Path
) -> FeatureCache | None:
    """Make an empty cache, or find the disk's; None if not even one sample would fit."""
    shapes = {name: tuple(shape) for name, shape in bundle.manifest["features"].items()}
    layout = Layout(shapes)
    row_bytes = layout.width * np.dtype(options.cache_dtype).itemsize
    count = min(samples, options.cache_mb * 2**20 // row_bytes)
    if count == 0:
        return None
    store: Store
    if options.cache == "disk":
        store = DiskStore(folder, count, layout.width, options.cache_dtype)
    else:
        store = MemoryStore(count, layout.width, options.cache_dtype)
    return FeatureCache(layout, store, assign_slots(samples, count, options.seed))


def level_key(bundle: Bundle, spec: InputSpec, engine: str, dtype: str) -> Callable[[int], bytes]:
    """Return the function from a level to the hash of all that decides its features.

    engine: name and version. The prefix counts with its graph and every file of weights it reads.
    """

    def key(level: int) -> bytes:
        graph = bundle.manifest["graphs"][f"prefix/{level}"]
        sources = bundle.json(graph)["tensors"].values()
        files = sorted({graph, *(source.partition("#")[0] for source in sources)})
        parts = [_VIEW, str(level), *(bundle.sha256(file) for file in files)]
        parts += [spec.hash(), engine, dtype]
        return hashlib.sha256("\n".join(parts).encode()).digest()

    return key
