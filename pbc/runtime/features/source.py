"""The source of features: the cache, the prefix of each sample's level, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from pbc.runtime.engines import Executable
from pbc.runtime.features.cache import FeatureCache
from pbc.runtime.features.views import Views
from pbc.runtime.meter import Meter

Made: TypeAlias = dict[tuple[int, bytes], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Features:
    """The features of any rows, that is, views of the samples of one set.

    levels: int64[rows], the level whose features the cache holds for each row.
    mixed: whether features of several levels may serve one body.
    chunk_of: the most rows per call of a level's prefix.
    padded: whether shorter calls are filled up to this: an engine that specialises its code to
        the shape of its input spends more on a new shape than on a few more rows.
    made: features that are there already, by level and rows; taken out once they are used.
    """

    views: Views
    executable: Executable
    meter: Meter
    cache: FeatureCache | None
    levels: np.ndarray
    mixed: bool
    chunk_of: Callable[[int], int]
    padded: bool
    made: Made = field(default_factory=dict)

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
        held = self.cache.holds(rows)
        return held if self.mixed else held & (self.levels[rows] == levels)

    def gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return f32 features of rows that the cache holds."""
        assert self.cache is not None, "rows are held by a cache"
        features = self.cache.gather(self.cache.slots[rows])
        self.meter.lap("cache")
        return features

    def compute(self, level: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Run the prefix of a level on int64[b] rows, in one call."""
        if (level, rows.tobytes()) in self.made:
            return self.made.pop((level, rows.tobytes()))
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
