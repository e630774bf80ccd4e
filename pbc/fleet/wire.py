"""An update on the wire: all of it, or its values that are not zero and the gaps between them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pbc.errors import PbcError
from pbc.fleet.protection import Protection

_FLOATS = (np.dtype(np.float16), np.dtype(np.float32))
_GAPS = (np.dtype(np.uint16), np.dtype(np.uint32))

LARGEST = 1e9
"""What no training moves a value by, nor is a loss: what strategies make of it stays finite."""


def encode(update: np.ndarray, protection: Protection) -> dict[str, np.ndarray]:
    """Return what is sent of f32[d], as a protection left it."""
    kind = np.float16 if protection.float16 else np.float32
    if protection.top_k is None:
        return {"update": update.astype(kind)}
    places = np.flatnonzero(update)
    gaps = np.diff(places, prepend=0)
    small = gaps.max(initial=0) <= np.iinfo(np.uint16).max
    return {
        "values": update[places].astype(kind),
        "gaps": gaps.astype(np.uint16 if small else np.uint32),
    }


def decode(arrays: Mapping[str, np.ndarray], size: int) -> np.ndarray:
    """Return the update f32[d] of d = size values; raises PbcError for what `encode` never sends.

    Arrays come from another machine: nothing about them is taken for granted.
    """
    if set(arrays) == {"update"}:
        update = arrays["update"]
        if update.dtype not in _FLOATS or update.shape != (size,):
            raise PbcError(f"an update is {update.dtype}{list(update.shape)}; expected [{size}]")
    elif set(arrays) == {"values", "gaps"}:
        values, gaps = arrays["values"], arrays["gaps"]
        if (
            values.dtype not in _FLOATS
            or gaps.dtype not in _GAPS
            or values.ndim != 1
            or values.shape != gaps.shape
            or len(values) > size
        ):
            raise PbcError("a compressed update has other arrays than values and their gaps")
        places = np.cumsum(gaps.astype(np.int64))
        if len(places) and (places[-1] >= size or (gaps[1:] == 0).any()):
            raise PbcError(f"a compressed update names places beyond its {size}, or one twice")
        update = np.zeros(size, np.float32)
        update[places] = values
    else:
        raise PbcError(f"an update has the arrays {sorted(arrays)}")
    if not np.isfinite(update).all():
        raise PbcError("an update is not finite")
    update = update.astype(np.float32)
    if np.abs(update).max(initial=0) > LARGEST:
        raise PbcError(f"an update moves a value by more than {LARGEST:g}")
    return update
