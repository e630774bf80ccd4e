"""A run's checkpoint as the run sees it: written for itself alone, and refused from any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pbc.errors import PbcError, reason_of
from pbc.runtime.output.checkpoint import FACTS, Checkpoint, difference, join
from pbc.util.shapes import check


@dataclass(frozen=True)
class Resumption:
    """The checkpoint at `path` of the run that `identity` names: all that decides its result.

    epochs: as many as the run may have.
    """

    path: Path
    identity: Mapping[str, Any]
    epochs: int

    def save(self, facts: Mapping[str, Any], parts: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Write the run's facts and arrays, by part."""
        Checkpoint({**self.identity, **facts}, join(parts)).save(self.path)

    def load(self) -> Checkpoint:
        """Read the checkpoint; raises PbcError unless it is of this very run."""
        checkpoint = Checkpoint.load(self.path)
        with self.reading():
            check(checkpoint.facts, FACTS, "facts")
        different = difference(checkpoint.facts, self.identity, self.epochs)
        if different is not None:
            raise PbcError(
                f"cannot resume {self.path.parent}: {different}; --overwrite starts again"
            )
        return checkpoint

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Say of whatever does not fit this run that it is the checkpoint."""
        try:
            yield
        except (PbcError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise PbcError(
                f"the checkpoint {self.path} is damaged ({reason_of(error)}); "
                "start again with --overwrite"
            ) from error


def finite(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Return arrays whose values are all finite; raises ValueError for others."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name!r} is not finite")
    return arrays
