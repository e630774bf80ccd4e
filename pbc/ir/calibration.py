"""Calibration data: unlabelled images on the cloud side, split once and for all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pbc.data import InputSpec, Samples, images
from pbc.errors import PbcError
from pbc.util.progress import report, tell

HELD_OUT_SHARE = 0.2
HELD_OUT_MOST = 1000
LEAST = 20
# Images in one call of a network.
BATCH = 64
# Decoded images stay in memory; a larger set is thinned out evenly.
RAM_BYTES = 4 << 30


class Kept:
    """What was computed of images, for passes that ask for the same; as much as the bound allows.

    It is known by a key and the tensors that it was computed with, which are held: the same ones,
    not equal ones.
    """

    def __init__(self, most_bytes: int = 1 << 29) -> None:
        self._left = most_bytes
        self._found: dict[Hashable, tuple[Sequence[Tensor], Sequence[Tensor]]] = {}

    def __call__(
        self,
        key: Hashable,
        tensors: Sequence[Tensor],
        compute: Callable[[], Sequence[Tensor]],
    ) -> Sequence[Tensor]:
        """Return what is known, or else compute it."""
        whole = (key, *map(id, tensors))
        if whole in self._found:
            return self._found[whole][1]
        result = compute()
        size = sum(value.nbytes for value in result)
        if size <= self._left:
            self._left -= size
            self._found[whole] = (tensors, result)
        return result


@dataclass(frozen=True)
class Calibration:
    """Decoded images with the indices that align proxies and those that only measure them."""

    samples: Samples
    align: np.ndarray
    held_out: np.ndarray
    kept: Kept = field(default_factory=Kept, repr=False, compare=False)

    @staticmethod
    def open(path: Path | str, spec: InputSpec, seed: int) -> Calibration:
        """Read every image below a folder or in a zip; raises PbcError for too few."""
        most = RAM_BYTES // int(np.prod(spec.shape))
        samples = images(
            path,
            spec,
            limit=most,
            ram_bytes=RAM_BYTES,
            progress=lambda done, total: report("calibration images", done / total, f"{done}"),
        )
        for line in samples.inventory.lines():
            tell(f"calibration: {line}")
        if len(samples) < LEAST:
            raise PbcError(
                f"{path} has {len(samples)} readable images; calibration needs at least {LEAST}"
            )
        order = np.random.default_rng(seed).permutation(len(samples))
        held_out = min(int(len(samples) * HELD_OUT_SHARE), HELD_OUT_MOST)
        return Calibration(samples, np.sort(order[held_out:]), np.sort(order[:held_out]))

    def batch(self, indices: np.ndarray) -> Tensor:
        """float32 [batch, channels, height, width], preprocessed, channels_last."""
        return torch.from_numpy(self.samples.images(indices))


def batches(indices: np.ndarray) -> Iterator[np.ndarray]:
    """Split indices into those of single calls."""
    return (indices[start : start + BATCH] for start in range(0, len(indices), BATCH))
