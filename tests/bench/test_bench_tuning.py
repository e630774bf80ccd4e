"""Rates that are tuned for each rival: which one wins, and what a rival that fails gets."""

from __future__ import annotations

from pathlib import Path

import tiny

from pbc.bench import tuning
from pbc.data import ImageFolder, InputSpec, Samples
from pbc.errors import PbcError

SPEC = InputSpec((3, 8, 8), (0.5,) * 3, (0.25,) * 3)


def samples(folder: Path) -> Samples:
    return ImageFolder.open(tiny.photos(folder / "photos", 10), SPEC)


def test_the_most_accurate_wins_and_of_equals_the_lowest_loss(tmp_path: Path) -> None:
    outcomes = {
        "clear": {0.001: (0.5, 1.0), 0.003: (0.9, 2.0), 0.01: (0.8, 0.1), 0.03: (0.1, 9.0)},
        "equal": {0.001: (0.4, 1.2), 0.003: (0.4, 1.1), 0.01: (0.4, 1.0), 0.03: (0.3, 0.5)},
    }
    seen: list[tuple[int, int]] = []

    def trial(name: str, rate: float, train: Samples, held_out: Samples) -> tuple[float, float]:
        seen.append((len(train), len(held_out)))
        return outcomes[name][rate]

    told: list[str] = []
    best = tuning.tune_each(outcomes, trial, samples(tmp_path), "sgd", told.append)
    assert best == {"clear": 0.003, "equal": 0.01}
    assert told[0] == (
        "clear: learning rate 0.003 (0.001: 50.0%, 0.003: 90.0%, 0.01: 80.0%, 0.03: 10.0%)"
    )
    assert set(seen) == {(24, 6)}  # as many tries for all, on the same photos


def test_rates_that_fail_are_told_and_a_rival_without_any_has_none(tmp_path: Path) -> None:
    def trial(name: str, rate: float, train: Samples, held_out: Samples) -> tuple[float, float]:
        if name == "broken" or rate > 0.002:
            raise PbcError("the loss is nan")
        return 0.5, 1.0

    told: list[str] = []
    best = tuning.tune_each(("steep", "broken"), trial, samples(tmp_path), "adam", told.append)
    assert best == {"steep": 0.0001}
    assert "broken: learning rate 0.003: the loss is nan" in told
