"""Arrays at addresses that the results of vectorised sums do not depend on."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64
"""Bytes; a cache line, and the widest vector."""


def aligned(value: np.ndarray) -> np.ndarray:
    """Return the array in C order, writable, at an address that sums do not depend on.

    A vectorised sum begins at the first aligned value: from another address it may add in another
    order, and training would not go on to the same bits after a restart.
    """
    flags = value.flags
    if flags.c_contiguous and flags.writeable and value.ctypes.data % ALIGNMENT == 0:
        return value
    return aligned_copy(value, value.dtype)


def aligned_copy(value: np.ndarray, dtype: npt.DTypeLike) -> np.ndarray:
    """Return the values in memory of their own, likewise."""
    size_bytes = value.size * np.dtype(dtype).itemsize
    copy = _aligned(np.empty(size_bytes + ALIGNMENT, np.uint8), value.shape, dtype)
    copy[...] = value
    return copy


def aligned_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    """Return zeros, likewise; large ones take no memory until they are written."""
    size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    return _aligned(np.zeros(size_bytes + ALIGNMENT, np.uint8), shape, dtype)


def _aligned(memory: np.ndarray, shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    start = -memory.ctypes.data % ALIGNMENT
    within: np.ndarray = memory[start : start + memory.size - ALIGNMENT].view(dtype).reshape(shape)
    return within
