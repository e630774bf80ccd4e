"""ElasticTrainer's selection: the most important tensors that a backward reaches in time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pbc.runtime.selectors import Candidates


@dataclass(frozen=True)
class Elastic:
    """Maximise the sum of importances within the time of a backward, exactly.

    Huang, Yang and Gao, ElasticTrainer, MobiSys 2023, equation 3. What a choice takes is what it
    takes to pass gradients to the last of its tensors, and each one's own: for every last tensor, a
    0/1 knapsack of those before it, by dynamic programming over the time, O(n · units). Costs are
    rounded up to a unit, so that no choice is beyond the budget. (The published code's recursion
    loses the optimum where two ways have one time.)

    units: into how many the budget is divided.
    """

    units: int = 2000

    def choose(self, candidates: Candidates, budget_ms: float) -> tuple[str, ...]:
        if not budget_ms > 0:
            return ()
        unit = budget_ms / self.units
        own = _rounded_up(candidates.own_ms, unit)
        passing = _rounded_up(candidates.passing_ms, unit)
        # The best sum of those before a tensor, by their time at most; and whether it was taken.
        best = np.zeros(self.units + 1)
        taken = np.zeros((len(own), self.units + 1), dtype=bool)
        most, last, left = 0.0, -1, 0
        for tensor, (time, value) in enumerate(zip(own, candidates.importance, strict=True)):
            rest = self.units - passing[tensor] - time
            if rest >= 0 and best[rest] + value > most:
                most, last, left = best[rest] + value, tensor, rest
            if time <= self.units:
                with_it = best[: self.units + 1 - time] + value
                taken[tensor, time:] = with_it > best[time:]
                best[time:] = np.maximum(best[time:], with_it)
        chosen = [last] if last >= 0 else []
        for tensor in reversed(range(max(last, 0))):
            if taken[tensor, left]:
                chosen.append(tensor)
                left -= own[tensor]
        return tuple(candidates.names[tensor] for tensor in reversed(chosen))


def _rounded_up(times_ms: np.ndarray, unit: float) -> list[int]:
    # A whole number of units stays one, whatever the division's last bit is.
    return [int(units) for units in np.ceil(times_ms / unit - 1e-9)]
