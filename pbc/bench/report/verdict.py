"""The outcome of a bench in words: what it saves, beside what one would have written by hand."""

from __future__ import annotations

from pbc.bench.report import tables
from pbc.bench.results import Results
from pbc.bench.standings import BASELINES, Standing

WORDS = {
    "pet": "fine-tuning",
    "pet-cache": "fine-tuning with a feature cache",
    "pet-cache-closed": "a feature cache with a head in closed form",
}
"""What each of the baselines is called."""


def lines(results: Results) -> list[str]:
    """Return two lines, on accuracy and on time; none without pbc or something to compare with."""
    ours, others = tables.ours(results), _baselines(results)
    if ours is None or not others:
        return []
    accuracies = "; ".join(
        f"{WORDS[other.rival]} {tables.percent(other.accuracy)}" for other in _complete(others)
    )
    times = "; ".join(
        f"{WORDS[other.rival]} {tables.seconds(other.seconds)}{_measured(other)}, "
        f"{_times(ours, other)}"
        for other in others
    )
    return [
        f"accuracy: {ours.rival} {tables.percent(ours.accuracy)}; {accuracies}",
        f"time: {ours.rival} {tables.seconds(ours.seconds)}; {times}",
    ]


def sentence(results: Results) -> str:
    """Return what is saved, in one sentence; empty where there is nothing to compare with."""
    ours, others = tables.ours(results), _baselines(results)
    if ours is None or not others:
        return ""
    saved = " and ".join(_saved(ours, other) for other in others)
    beside = _complete(others)[0]
    return (
        f"{ours.rival} trains in {tables.seconds(ours.seconds)}, {saved}, and reaches "
        f"{tables.percent(ours.accuracy)} ({WORDS[beside.rival]}: "
        f"{tables.percent(beside.accuracy)})."
    )


def _baselines(results: Results) -> list[Standing]:
    found = (results.standing(name) for name in BASELINES)
    return [standing for standing in found if standing is not None]


def _complete(others: list[Standing]) -> list[Standing]:
    """Return those that ran all their epochs: a few of them say nothing about an accuracy."""
    return [other for other in others if not other.extrapolated] or others


def _measured(other: Standing) -> str:
    return f" (by {other.epochs} of {other.planned} epochs)" if other.extrapolated else ""


def _times(ours: Standing, other: Standing) -> str:
    ratio = ours.faster.get(other.rival)
    return "not comparable" if ratio is None else f"{ratio.mean:.2f} times as long"


def _saved(ours: Standing, other: Standing) -> str:
    less = other.seconds.mean - ours.seconds.mean
    amount = f"{abs(less) / 60:.1f} minutes" if abs(less) >= 120 else f"{abs(less):.2g} s"
    return f"{amount} {'less' if less >= 0 else 'more'} than {WORDS[other.rival]}"
