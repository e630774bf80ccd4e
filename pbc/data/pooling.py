"""Area pooling: the small view of an image that a policy decides by."""

from __future__ import annotations

import numpy as np


def pooled_view(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area-pool f32[B, C, H, W] to f32[B, C, height, width]: what the policy looks at."""
    batch, channels, *size = images.shape
    if size[0] % height == 0 and size[1] % width == 0:
        # Plain sums: a matrix product would wake BLAS's threads beside the engine's, and each
        # would wait for the other's to stop spinning.
        rows = images.transpose(0, 2, 3, 1).reshape(batch, height, -1, size[1] * channels).mean(2)
        means: np.ndarray = rows.reshape(batch, height, width, -1, channels).mean(3)
        view: np.ndarray = means.transpose(0, 3, 1, 2)
        return view
    down = _area_weights(size[0], height)
    across = _area_weights(size[1], width)
    # Matrix products over the last axis of contiguous memory; B and C are carried along.
    narrow = np.matmul(np.ascontiguousarray(images), across.T)
    pooled: np.ndarray = np.matmul(down, narrow)
    return pooled


def _area_weights(size: int, pooled: int) -> np.ndarray:
    """f32[pooled, size]: the share of every pixel in every equal interval of the axis."""
    edges = np.linspace(0, size, pooled + 1)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights: np.ndarray = np.clip(overlap, 0, None) * (pooled / size)
    return weights.astype(np.float32)
