"""Arrays at addresses that the results of vectorised sums do not depend on."""

from __future__ import annotations

import numpy as np

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
    memory = np.empty(value.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy: np.ndarray = memory[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
    copy[...] = value
    return copy
