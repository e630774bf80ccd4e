"""A run that is ready to begin: its scheduler, and where each mini-batch's features come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pbc.runtime.features.lookahead import look_ahead
from pbc.runtime.features.source import Features
from pbc.runtime.routing.decisions import Decisions
from pbc.runtime.schedulers import Batch, Scheduler


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to begin.

    mixed: whether a mini-batch may hold samples of several levels. ahead: whether the prefix runs
    ahead of the steps, on several mini-batches together.
    """

    decisions: Decisions
    floor: float
    scheduler: Scheduler
    features: Features
    mixed: bool
    ahead: bool

    def levels(self, batch: Batch) -> np.ndarray:
        """Return int64[b], where each sample of a batch runs."""
        if self.mixed:
            levels: np.ndarray = self.scheduler.levels[batch.samples]
            return levels
        return np.full(len(batch.samples), batch.level, dtype=np.int64)

    def fetch(
        self, batches: Sequence[Batch], first: int, epoch: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield the features of an epoch's mini-batches from number `first` on."""
        requests = [
            (self.levels(batch), self.features.views.rows(epoch, batch.samples))
            for batch in batches
        ]
        if self.ahead:
            yield from look_ahead(requests, first, self.features)
            return
        for batch, (_, rows) in zip(batches[first:], requests[first:], strict=True):
            yield self.features(batch.level, rows)
