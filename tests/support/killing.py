"""Kills in the middle of a training: what a test raises, and a run that is killed until it ends."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

from pbc.runtime.events import Event, Report, StepReport

T = TypeVar("T")


class Killed(BaseException):
    """Stands for a kill: nothing handles it, nothing is written after it."""


def killed_until_done(train: Callable[[Report], T], seed: int, steps: tuple[int, int]) -> T:
    """Return what `train` returns at last; before, each of its lives ends at a random step.

    train: resumes what it left, and tells the report each step. steps: how long a life may be.
    """
    lives, deaths = random.Random(seed), 0
    while True:
        left = lives.randint(*steps)

        def kill(event: Event) -> None:
            nonlocal left
            left -= isinstance(event, StepReport)
            if left == 0:
                raise Killed

        try:
            result = train(kill)
            break
        except Killed:
            deaths += 1
        assert deaths < 100, "it does not get on"
    assert deaths > 1
    return result
