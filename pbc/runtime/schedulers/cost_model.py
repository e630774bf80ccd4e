"""The scheduler that decides by measured costs: levels, skipped samples, what a budget buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from pbc.runtime.schedulers import Batch, Mix, SchedulerInput
from pbc.runtime.schedulers.estimate import NEVER, Skipping, Workload, cheapest, full_epochs

# Measured on MobileNetV3, Caltech-101, 3 seeds: 0.6 to 0.7 of the visits at the accuracy of all.
USUAL_SKIPPING = Skipping(0.7, 2)
# For a time budget: half of the visits, for a few tenths of a point.
HARD_SKIPPING = Skipping(0.9, 3)
# Skipping that saves less of the run than this is left alone.
_LEAST_SAVED = 0.03


class CostModel:
    """Run each sample at the allowed level of lowest measured cost, and skip easy ones.

    Where a mix of a cheap level and level 0 makes the run shorter than that, it runs instead.

    An epoch's mini-batches are the samples in a random order, as plain training has them; where
    every level has a body of its own they are grouped by level instead. A sample whose last known
    loss is below the mean of all last known losses is skipped with a fixed probability: it is not
    even decoded. The first epoch and the last 15 % visit everything, and none is skipped more than
    two epochs in a row (InfoBatch, Qin et al., ICLR 2024, without its rescaling of gradients).

    With a time budget that the predicted run would overrun, more samples are skipped; then levels
    below the fidelity floor are used; then there are fewer epochs.
    """

    cost_aware: ClassVar[bool] = True

    def __init__(self, given: SchedulerInput) -> None:
        choice = _choose(given)
        self.levels: np.ndarray = choice.levels
        self.epochs = choice.epochs
        self.mix = choice.mix
        self.notes: Sequence[str] = choice.notes
        self.skipping = choice.skipping
        self._given = given
        self._allowed = choice.allowed
        self._sample_ms = choice.sample_ms
        count = len(self.levels)
        # What was known when the epoch began, and what it has told so far.
        self._losses = np.full(count, np.nan)
        self._told = self._losses.copy()
        self._in_a_row = np.zeros(count, dtype=np.int64)
        self._skipped = np.zeros(count, dtype=bool)

    def plan(self, epoch: int) -> list[Batch]:
        given = self._given
        random = np.random.Generator(np.random.PCG64([given.seed, epoch]))
        order = random.permutation(len(self.levels))
        self._skipped = self._skipped_in(epoch, random)
        order = order[~self._skipped[order]]
        if not given.grouped:
            cuts = range(0, len(order), given.batch)
            return [Batch(0, order[start : start + given.batch]) for start in cuts]
        full, short = self._grouped(order)
        return [full[index] for index in random.permutation(len(full))] + short

    def observe(self, batch: Batch, losses: np.ndarray) -> bool:
        self._told[batch.samples] = losses
        return True

    def finish_epoch(self) -> None:
        self._losses[:] = self._told
        self._in_a_row[self._skipped] += 1
        self._in_a_row[~self._skipped] = 0

    def state(self) -> dict[str, np.ndarray]:
        return {
            "losses": self._losses.copy(),
            "told": self._told.copy(),
            "in_a_row": self._in_a_row.copy(),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self._losses[:] = state["losses"]
        self._told[:] = state["told"]
        self._in_a_row[:] = state["in_a_row"]
        # Of a sample that was visited a loss is known.
        if np.isinf(self._losses).any() or np.isinf(self._told).any():
            raise ValueError("a loss is infinite")

    def carry(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up nothing: losses are of samples that do not come again."""

    def _skipped_in(self, epoch: int, random: np.random.Generator) -> np.ndarray:
        full = epoch == 0 or epoch >= self.epochs - full_epochs(self.epochs)
        if self.skipping == NEVER or full:
            return np.zeros(len(self.levels), dtype=bool)
        drawn = random.random(len(self.levels)) < self.skipping.rate
        known = self._losses[~np.isnan(self._losses)]
        easy = self._losses < known.mean() if len(known) else np.zeros_like(drawn)
        skipped: np.ndarray = easy & drawn & (self._in_a_row < self.skipping.in_a_row)
        return skipped

    def _grouped(self, order: np.ndarray) -> tuple[list[Batch], list[Batch]]:
        """Cut into mini-batches of one level each: full ones, and at most one that is short.

        What remains of a level joins the next more expensive one at which it may run, which is
        level 0 at the latest.
        """
        batch, per_level = self._given.batch, self._sample_ms.sum(axis=0)
        ascending = sorted(range(1, len(per_level)), key=lambda level: per_level[level])
        full: list[Batch] = []
        left = np.empty(0, dtype=np.int64)
        for level in [*ascending, 0]:
            may = self._allowed[left, level]
            own = order[self.levels[order] == level]
            if level and not len(own):
                continue
            members = np.concatenate([left[may], own])
            whole = len(members) // batch * batch
            full += [
                Batch(self._level_for(part), part) for part in members[:whole].reshape(-1, batch)
            ]
            left = np.concatenate([left[~may], members[whole:]])
        return full, [Batch(self._level_for(left), left)] if len(left) else []

    def _level_for(self, samples: np.ndarray) -> int:
        """Return the cheapest level at which all of them may run."""
        together = self._allowed[samples].all(axis=0, keepdims=True)
        return int(cheapest(together, self._sample_ms[samples].sum(axis=0, keepdims=True))[0])


@dataclass(frozen=True)
class _Choice:
    """sample_ms: f64[n, levels], what the levels were chosen by."""

    allowed: np.ndarray
    sample_ms: np.ndarray
    levels: np.ndarray
    skipping: Skipping
    epochs: int
    mix: Mix | None = None
    notes: tuple[str, ...] = ()


def _choose(given: SchedulerInput) -> _Choice:
    """Decide levels, skipping and epochs by their predicted times."""
    costs = given.costs
    assert costs is not None, "a cost-aware scheduler is given costs"
    load = Workload(costs, given.is_cached(), given.views)

    def run_ms(choice: _Choice) -> float:
        return load.run_ms(choice.levels, choice.epochs, choice.skipping)

    def choose(allowed: np.ndarray, skipping: Skipping) -> _Choice:
        sample_ms = load.sample_ms(given.epochs, skipping)
        return _Choice(allowed, sample_ms, cheapest(allowed, sample_ms), skipping, given.epochs)

    def best(skipping: Skipping) -> _Choice:
        mixed = (replace(choose(mix.allowed, skipping), mix=mix) for mix in given.mixes)
        return min((choose(given.allowed, skipping), *mixed), key=run_ms)

    choice, usual = best(NEVER), best(USUAL_SKIPPING)
    if given.skips_samples and run_ms(usual) <= (1 - _LEAST_SAVED) * run_ms(choice):
        choice = usual
    budget = given.time_budget_ms
    notes = [] if choice.mix is None else [choice.mix.told()]
    if budget is None or run_ms(choice) <= budget:
        return replace(choice, notes=tuple(notes))
    if given.skips_samples:
        choice = best(HARD_SKIPPING)
        notes = [] if choice.mix is None else [choice.mix.told()]
    lowered = None
    for fallback in given.fallbacks:
        if run_ms(choice) <= budget:
            break
        cheaper = choose(fallback.allowed, choice.skipping)
        if run_ms(cheaper) < run_ms(choice):
            choice, lowered, notes = cheaper, fallback, []
    if lowered is not None:
        lost = lowered.points_lost
        told = "an unknown loss" if lost is None else f"a loss of {lost:.1f} points"
        notes.append(
            f"the time budget needs levels of fidelity {lowered.floor:.3g}, below the floor: "
            f"{told} of accuracy is predicted"
        )
    while choice.epochs > 1 and run_ms(choice) > budget:
        choice = replace(choice, epochs=choice.epochs - 1)
    if choice.epochs < given.epochs:
        notes.append(f"the time budget is enough for {choice.epochs} of {given.epochs} epochs")
    return replace(choice, notes=tuple(notes))
