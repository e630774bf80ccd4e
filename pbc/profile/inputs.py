"""Images and labels that stages are measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pbc import data
from pbc.data import InputSpec


def images(spec: InputSpec, count: int, photos: str | None) -> np.ndarray:
    """Return f32[count, 3, H, W] in NHWC memory: photos, in turn if there are too few, or noise."""
    if photos is None:
        channels, height, width = spec.shape
        random = np.random.Generator(np.random.PCG64(0))
        noise = random.standard_normal((count, height, width, channels), np.float32)
        pixels: np.ndarray = noise.transpose(0, 3, 1, 2)
        return pixels
    samples = data.images(Path(photos), spec, limit=count)
    return samples.images(np.arange(count) % len(samples))


def labels(batch: int, classes: int) -> np.ndarray:
    """Return int64[batch], the classes in turn."""
    return np.arange(batch) % classes
