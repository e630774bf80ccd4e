"""PieBridge's scheduler: mini-batches of one level, and no backward for what is learnt already."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from pbc.runtime.schedulers import Batch, Mix, SchedulerInput

EMA_WEIGHT = 2 / (10 + 1)


class PieBridge:
    """Group by level, skip the backward of unimportant mini-batches, move their samples on.

    Every epoch the samples are shuffled and grouped by level into mini-batches; what remains of a
    level joins the next more expensive level that has samples, so that only the epoch's last batch
    can be short; then the batches are shuffled. A batch whose mean loss is at most alpha times the
    running mean (an EMA of weight 2/11) skips its backward, and in the next epoch its samples run
    one level cheaper, where they are allowed to and not cached where they are.
    """

    cost_aware: ClassVar[bool] = False

    def __init__(self, given: SchedulerInput) -> None:
        self.levels: np.ndarray = given.levels.copy()
        self.epochs = given.epochs
        self.mix: Mix | None = None
        self.notes: Sequence[str] = ()
        self._given = given
        self._moving = np.zeros(len(self.levels), dtype=bool)
        self._ema = math.nan

    def plan(self, epoch: int) -> list[Batch]:
        given = self._given
        random = np.random.Generator(np.random.PCG64([given.seed, epoch]))
        order = random.permutation(len(self.levels))
        levels = self.levels if given.grouped else np.zeros_like(self.levels)
        full, short = group(levels[order], given.batch)
        batches = [Batch(level, order[at]) for level, at in full]
        shuffled = [batches[index] for index in random.permutation(len(batches))]
        return shuffled + [Batch(level, order[at]) for level, at in short]

    def observe(self, batch: Batch, losses: np.ndarray) -> bool:
        loss = float(losses.mean())
        before, alpha = self._ema, self._given.alpha
        if math.isnan(before):
            self._ema = loss
            return True
        self._ema = EMA_WEIGHT * loss + (1 - EMA_WEIGHT) * before
        if alpha is None or loss > alpha * before:
            return True
        self._moving[batch.samples] = True
        return False

    def finish_epoch(self) -> None:
        allowed = self._given.allowed
        moving = np.flatnonzero(self._moving)
        cheaper = np.minimum(self.levels[moving] + 1, allowed.shape[1] - 1)
        able = allowed[moving, cheaper] & ~self._given.is_cached()[moving]
        self.levels[moving[able]] = cheaper[able]
        self._moving[:] = False

    def state(self) -> dict[str, np.ndarray]:
        return {
            "levels": self.levels.copy(),
            "moving": self._moving.copy(),
            "ema": np.array([self._ema]),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.levels[:] = state["levels"]
        self._moving[:] = state["moving"]
        self.carry(state)

    def carry(self, state: Mapping[str, np.ndarray]) -> None:
        self._ema = float(state["ema"][0])


_Groups = list[tuple[int, np.ndarray]]


def group(levels: np.ndarray, batch: int) -> tuple[_Groups, _Groups]:
    """Split positions 0…n-1 into full batches, and the one short batch if there is one.

    Each batch is (level, int64[b]); its level is that of its most expensive member.
    """
    full: _Groups = []
    remainder = np.empty(0, dtype=np.int64)
    level = 0
    for level in np.unique(levels)[::-1].tolist():
        # The remainder goes first, so that no sample is carried over two levels.
        members = np.concatenate([remainder, np.flatnonzero(levels == level)])
        whole = len(members) // batch * batch
        full += [(level, part) for part in members[:whole].reshape(-1, batch)]
        remainder = members[whole:]
    return full, [(level, remainder)] if len(remainder) else []
