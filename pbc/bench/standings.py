"""Standings of a match: accuracies, times, ratios, and when accuracies were reached."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pbc.bench.cells import Cell
from pbc.bench.match import MatchPlan, Outcome

BASELINES = ("pet", "pet-cache", "pet-cache-closed")
REFERENCE = "pet"
# Learns from the same features in the same order, and so as well as the reference.
_TWIN = "pet-cache"
FULL = "full"
BUDGETS = (0.85, 0.90, 0.95, 0.99)
_POINT = 0.01


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds: mean, sample standard deviation (None of one), every value."""

    mean: float
    sd: float | None
    values: tuple[float, ...]

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        sd = statistics.stdev(values) if len(values) > 1 else None
        return Spread(statistics.fmean(values), sd, tuple(values))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Reached:
    """Seconds until an accuracy was first reached, over the seeds that reached it.

    ratio: how much sooner than the reference by the same target; None where not both reached it.
    faster: likewise than each baseline, over the seeds in which both did.
    """

    seconds: Spread | None
    seeds: int
    of_seeds: int
    ratio: Spread | None
    faster: Mapping[str, Spread] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds and self.seconds.to_json(),
            "seeds": self.seeds,
            "of_seeds": self.of_seeds,
            "faster_than_reference": self.ratio and self.ratio.to_json(),
            "faster_than": {name: ratio.to_json() for name, ratio in self.faster.items()},
        }


@dataclass(frozen=True)
class Standing:
    """The result of one rival.

    seconds, joules: of all planned epochs; if it ran fewer (`epochs` of `planned`), as
    `total_seconds` extrapolates, and its accuracy is that of the epochs it ran. faster: ratio of
    seconds to each baseline, seed by seed. to_reference: until the reference's final accuracy − 0.5
    point, to_final: until that accuracy, to_best: until its best; None where the reference did not
    run all its epochs. budgets: until that share of full training's final accuracy. stages:
    share of time. levels: visits per epoch and level, mean over seeds. curve: (seconds, accuracy)
    at each mark and after each epoch, means over seeds. done: whether it ended by itself before
    the planned epochs.
    """

    rival: str
    epochs: int
    planned: int
    accuracy: Spread
    seconds: Spread
    faster: Mapping[str, Spread]
    to_reference: Reached | None
    to_final: Reached | None
    to_best: Reached | None
    budgets: Mapping[float, Reached]
    stages: Mapping[str, float]
    levels: tuple[tuple[float, ...], ...]
    curve: tuple[tuple[float, float], ...]
    joules: Spread | None
    facts: Mapping[str, Any]
    done: bool = False

    @property
    def extrapolated(self) -> bool:
        """Return whether its time is a projection."""
        return self.epochs < self.planned and not self.done

    @property
    def label(self) -> str:
        """Return its name, with the epochs it ran where these are not all."""
        if not self.extrapolated:
            return self.rival
        return f"{self.rival} ({self.epochs} of {self.planned} epochs, time extrapolated)"

    def to_json(self) -> dict[str, Any]:
        return {
            "rival": self.rival,
            "epochs": self.epochs,
            "planned_epochs": self.planned,
            "extrapolated": self.extrapolated,
            "accuracy": self.accuracy.to_json(),
            "seconds": self.seconds.to_json(),
            "faster_than": {name: ratio.to_json() for name, ratio in self.faster.items()},
            "to_reference": self.to_reference and self.to_reference.to_json(),
            "to_reference_final": self.to_final and self.to_final.to_json(),
            "to_reference_best": self.to_best and self.to_best.to_json(),
            "accuracy_budgets": {
                f"{share:g}": reached.to_json() for share, reached in self.budgets.items()
            },
            "stage_shares": dict(self.stages),
            "levels_per_epoch": [list(epoch) for epoch in self.levels],
            "curve": [list(point) for point in self.curve],
            "energy_joules": self.joules and self.joules.to_json(),
            "facts": dict(self.facts),
        }


def standings(plan: MatchPlan, outcome: Outcome) -> list[Standing]:
    """Return how every rival did that ran all of its cells, in the plan's order."""
    return standings_of(
        plan.options.epochs,
        {
            name: [list(outcome.cells[name, seed]) for seed in range(plan.seeds)]
            for name in plan.rivals
            if (name, 0) in outcome.cells
        },
        outcome.facts,
    )


def standings_of(
    planned: int,
    runs: Mapping[str, Sequence[Sequence[Cell]]],
    facts: Mapping[str, Mapping[str, Any]],
) -> list[Standing]:
    """Return the standings of runs: per rival the cells of every seed, in the same order."""
    return [_standing(name, planned, runs, facts.get(name, {})) for name in runs]


def total_seconds(run: Sequence[Cell], planned: int) -> float:
    """Return the seconds of a whole run: those of the epochs it has, scaled to the planned ones."""
    return _whole([cell.seconds for cell in run], _wanted(run, planned))


def total_joules(run: Sequence[Cell], planned: int) -> float | None:
    """Return the joules of a whole run, scaled as its seconds are; None if one was not metered."""
    joules = [cell.energy_joules for cell in run if cell.energy_joules is not None]
    return _whole(joules, _wanted(run, planned)) if len(joules) == len(run) else None


def _wanted(run: Sequence[Cell], planned: int) -> int:
    """Return how many epochs a run has in all: those it has where it ended by itself."""
    return len(run) if run[-1].last else planned


def _whole(per_epoch: Sequence[float], planned: int) -> float:
    """Sum up; what is missing costs the mean of the later epochs: the first one prepares, once."""
    missing = max(0, planned - len(per_epoch))
    return sum(per_epoch) + missing * statistics.fmean(per_epoch[1:] or per_epoch)


def seconds_until(run: Sequence[Cell], accuracy: float) -> float | None:
    """Return the seconds until the first mark or epoch's end at an accuracy; None if none was."""
    return next((spent for spent, found in _points(run) if found >= accuracy - 1e-12), None)


def _points(run: Sequence[Cell]) -> list[tuple[float, float]]:
    """Return (seconds, accuracy) at every mark and epoch's end of a run."""
    points, spent = [], 0.0
    for cell in run:
        points += [(spent + seconds, accuracy) for seconds, accuracy in cell.marks]
        spent += cell.seconds
        points.append((spent, cell.accuracy))
    return points


def _standing(
    name: str,
    planned: int,
    runs: Mapping[str, Sequence[Sequence[Cell]]],
    facts: Mapping[str, Any],
) -> Standing:
    mine = runs[name]
    seconds = [total_seconds(run, planned) for run in mine]
    faster = {
        baseline: Spread.of(
            [
                total_seconds(other, planned) / own
                for other, own in zip(runs[baseline], seconds, strict=True)
            ]
        )
        for baseline in BASELINES
        if baseline in runs
    }
    joules = [spent for run in mine if (spent := total_joules(run, planned)) is not None]
    return Standing(
        rival=name,
        epochs=len(mine[0]),
        planned=planned,
        accuracy=Spread.of([run[-1].accuracy for run in mine]),
        seconds=Spread.of(seconds),
        faster=faster,
        to_reference=_to_reference(mine, planned, runs, -0.5 * _POINT),
        to_final=_to_reference(mine, planned, runs, 0.0),
        to_best=_to_reference(mine, planned, runs, None),
        budgets=_budgets(mine, runs),
        stages=_stages(mine),
        levels=_levels(mine),
        curve=_curve(mine),
        joules=Spread.of(joules) if len(joules) == len(mine) else None,
        facts=facts,
        done=mine[0][-1].last,
    )


def _to_reference(
    mine: Sequence[Sequence[Cell]],
    planned: int,
    runs: Mapping[str, Sequence[Sequence[Cell]]],
    margin: float | None,
) -> Reached | None:
    """Return when the reference's final accuracy plus a margin was reached; None: its best.

    Two epochs of twelve say nothing about a final accuracy: then its twin's counts, or nothing.
    """
    names = (name for name in (REFERENCE, _TWIN) if name in runs)
    known = next((runs[name] for name in names if len(runs[name][0]) >= planned), None)
    if known is None:
        return None
    if margin is None:
        targets = [max(accuracy for _, accuracy in _points(run)) for run in known]
    else:
        targets = [run[-1].accuracy + margin for run in known]
    found = _reached(mine, runs.get(REFERENCE, known), targets)
    faster = {
        name: ratio
        for name in BASELINES
        if name in runs and (ratio := _reached(mine, runs[name], targets).ratio) is not None
    }
    return replace(found, faster=faster, ratio=found.ratio if REFERENCE in runs else None)


def _budgets(
    mine: Sequence[Sequence[Cell]], runs: Mapping[str, Sequence[Sequence[Cell]]]
) -> dict[float, Reached]:
    if FULL not in runs:
        return {}
    reference = runs.get(REFERENCE, runs[FULL])
    return {
        share: _reached(mine, reference, [share * run[-1].accuracy for run in runs[FULL]])
        for share in BUDGETS
    }


def _reached(
    mine: Sequence[Sequence[Cell]],
    reference: Sequence[Sequence[Cell]],
    targets: Sequence[float],
) -> Reached:
    own = [seconds_until(run, target) for run, target in zip(mine, targets, strict=True)]
    other = [seconds_until(run, target) for run, target in zip(reference, targets, strict=True)]
    there = [seconds for seconds in own if seconds is not None]
    ratios = [b / a for a, b in zip(own, other, strict=True) if a is not None and b is not None]
    return Reached(
        Spread.of(there) if there else None,
        len(there),
        len(own),
        Spread.of(ratios) if ratios else None,
    )


def _stages(runs: Sequence[Sequence[Cell]]) -> dict[str, float]:
    spent: dict[str, float] = {}
    for run in runs:
        for cell in run:
            for stage, seconds in cell.stage_seconds.items():
                spent[stage] = spent.get(stage, 0.0) + seconds
    total = sum(spent.values()) or 1.0
    return {stage: seconds / total for stage, seconds in spent.items()}


def _levels(runs: Sequence[Sequence[Cell]]) -> tuple[tuple[float, ...], ...]:
    count = max(len(cell.levels) for run in runs for cell in run)
    return tuple(
        tuple(
            statistics.fmean(
                cell.levels[level] if level < len(cell.levels) else 0 for cell in epoch
            )
            for level in range(count)
        )
        for epoch in zip(*runs, strict=True)
    )


def _curve(runs: Sequence[Sequence[Cell]]) -> tuple[tuple[float, float], ...]:
    return tuple(
        (
            statistics.fmean(seconds for seconds, _ in moment),
            statistics.fmean(accuracy for _, accuracy in moment),
        )
        for moment in zip(*map(_points, runs), strict=False)
    )
