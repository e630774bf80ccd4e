"""The scheduler that decides by measured costs: who runs where, who rests, what a budget buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from pbc.runtime.routing.estimate import NEVER, Rest, Workload, cheapest, full_epochs
from pbc.runtime.schedulers import Batch, Setting

# Measured on MobileNetV3, Caltech-101, 3 seeds: 0.6 to 0.7 of the visits at the accuracy of all.
USUAL_REST = Rest(0.7, 2)
# For a time budget: half of the visits, for a few tenths of a point.
HARD_REST = Rest(0.9, 3)
# Resting that saves less of the run than this is left alone.
_LEAST_SAVED = 0.03


class CostModel:
    """Run each sample at the allowed level of lowest measured cost, and let easy ones rest.

    An epoch's mini-batches are the samples in a random order, as plain training has them; where
    every level has a body of its own they are grouped by level instead. A sample whose last known
    loss is below the mean of all last known losses rests with a fixed probability: it is not even
    decoded. The first epoch and the last 15 % visit everything, and nobody rests more than two
    epochs in a row (InfoBatch, Qin et al., ICLR 2024, without its rescaling of gradients).

    With a time budget that the predicted run would overrun, samples rest more; then levels below
    the fidelity floor are used; then there are fewer epochs.
    """

    cost_aware: ClassVar[bool] = True

    def __init__(self, setting: Setting) -> None:
        choice = _choose(setting)
        self.levels: np.ndarray = choice.levels
        self.epochs = choice.epochs
        self.notes: Sequence[str] = choice.notes
        self.rest = choice.rest
        self._setting = setting
        self._allowed = choice.allowed
        self._sample_ms = choice.sample_ms
        count = len(self.levels)
        # What was known when the epoch began, and what it has told so far.
        self._losses = np.full(count, np.nan)
        self._told = self._losses.copy()
        self._rested = np.zeros(count, dtype=np.int64)
        self._resting = np.zeros(count, dtype=bool)

    def plan(self, epoch: int) -> list[Batch]:
        setting = self._setting
        random = np.random.Generator(np.random.PCG64([setting.seed, epoch]))
        order = random.permutation(len(self.levels))
        self._resting = self._who_rests(epoch, random)
        order = order[~self._resting[order]]
        if not setting.grouped:
            cuts = range(0, len(order), setting.batch)
            return [Batch(0, order[start : start + setting.batch]) for start in cuts]
        full, short = self._grouped(order)
        return [full[index] for index in random.permutation(len(full))] + short

    def observe(self, batch: Batch, losses: np.ndarray) -> bool:
        self._told[batch.samples] = losses
        return True

    def finish_epoch(self) -> None:
        self._losses[:] = self._told
        self._rested[self._resting] += 1
        self._rested[~self._resting] = 0

    def state(self) -> dict[str, np.ndarray]:
        return {
            "losses": self._losses.copy(),
            "told": self._told.copy(),
            "rested": self._rested.copy(),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self._losses[:] = state["losses"]
        self._told[:] = state["told"]
        self._rested[:] = state["rested"]

    def carry(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up nothing: losses are of samples that do not come again."""

    def _who_rests(self, epoch: int, random: np.random.Generator) -> np.ndarray:
        full = epoch == 0 or epoch >= self.epochs - full_epochs(self.epochs)
        if self.rest == NEVER or full:
            return np.zeros(len(self.levels), dtype=bool)
        drawn = random.random(len(self.levels)) < self.rest.rate
        known = self._losses[~np.isnan(self._losses)]
        easy = self._losses < known.mean() if len(known) else np.zeros_like(drawn)
        resting: np.ndarray = easy & drawn & (self._rested < self.rest.in_a_row)
        return resting

    def _grouped(self, order: np.ndarray) -> tuple[list[Batch], list[Batch]]:
        """Cut into mini-batches of one level each: full ones, and at most one that is short.

        What remains of a level joins the next dearer one at which it may run; at the latest, that
        is level 0.
        """
        batch, per_level = self._setting.batch, self._sample_ms.sum(axis=0)
        dearer = sorted(range(1, len(per_level)), key=lambda level: per_level[level])
        full: list[Batch] = []
        left = np.empty(0, dtype=np.int64)
        for level in [*dearer, 0]:
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
    rest: Rest
    epochs: int
    notes: tuple[str, ...] = ()


def _choose(setting: Setting) -> _Choice:
    """Decide levels, resting and epochs by their predicted times."""
    costs = setting.costs
    assert costs is not None, "a cost-aware scheduler is given costs"
    load = Workload(costs, setting.is_cached(), setting.views)

    def run_ms(choice: _Choice) -> float:
        return load.run_ms(choice.levels, choice.epochs, choice.rest)

    def choose(allowed: np.ndarray, rest: Rest) -> _Choice:
        sample_ms = load.sample_ms(setting.epochs, rest)
        return _Choice(allowed, sample_ms, cheapest(allowed, sample_ms), rest, setting.epochs)

    choice = choose(setting.allowed, NEVER)
    resting = choose(setting.allowed, USUAL_REST)
    if setting.rests and run_ms(resting) <= (1 - _LEAST_SAVED) * run_ms(choice):
        choice = resting
    budget = setting.time_budget_ms
    if budget is None or run_ms(choice) <= budget:
        return choice
    notes: list[str] = []
    if setting.rests:
        choice = choose(setting.allowed, HARD_REST)
    lowered = None
    for fallback in setting.fallbacks:
        if run_ms(choice) <= budget:
            break
        cheaper = choose(fallback.allowed, choice.rest)
        if run_ms(cheaper) < run_ms(choice):
            choice, lowered = cheaper, fallback
    if lowered is not None:
        lost = lowered.points_lost
        told = "an unknown loss" if lost is None else f"a loss of {lost:.1f} points"
        notes.append(
            f"the time budget needs levels of fidelity {lowered.floor:.3g}, below the floor: "
            f"{told} of accuracy is predicted"
        )
    while choice.epochs > 1 and run_ms(choice) > budget:
        choice = replace(choice, epochs=choice.epochs - 1)
    if choice.epochs < setting.epochs:
        notes.append(f"the time budget is enough for {choice.epochs} of {setting.epochs} epochs")
    return replace(choice, notes=tuple(notes))
