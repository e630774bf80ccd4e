"""Images and labels that stages are measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pbc import data
from pbc.data import InputSpec


def noise(spec: InputSpec, count: int) -> np.ndarray:
    """Return f32[count, C, H, W] in NHWC memory."""
    channels, height, width = spec.shape
    random = np.random.Generator(np.random.PCG64(0))
    values = random.standard_normal((count, height, width, channels), np.float32)
    pixels: np.ndarray = values.transpose(0, 3, 1, 2)
    return pixels


def photos(spec: InputSpec, count: int, path: str) -> tuple[np.ndarray, list[str]]:
    """Return f32[count, C, H, W] in NHWC memory, photos in turn if there are too few.

    Also what of the data was left out or changed, in lines.
    """
    samples = data.images(Path(path), spec, limit=count)
    return samples.images(np.arange(count) % len(samples)), samples.inventory.lines()


def labels(batch: int, classes: int) -> np.ndarray:
    """Return int64[batch], the classes in turn."""
    return np.arange(batch) % classes
