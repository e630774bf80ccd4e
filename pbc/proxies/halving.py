"""Successive halving of alignment: a short one tells which levels are worth the rest.

Jamieson and Talwalkar, «Non-stochastic best arm identification and hyperparameter optimization»,
AISTATS 2016, in two rounds: levels are few, and one that is judged late has cost most of its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pbc.bundle.ladder import FLOAT32
from pbc.ir.program import Program
from pbc.proxies import parallel
from pbc.proxies.pseudo_tasks import losses_by_share
from pbc.proxies.use import USED, used
from pbc.runtime.routing.outlook import BOUNDS

QUARTER = 0.25
# A judgement takes as long as a dozen steps: in a shorter alignment none pays.
LEAST_STEPS, LEAST_MINUTES = 100, 2.0
# What the rest of alignment leaves of a loss that is judged after a quarter (docs/alignment.md).
LEFT_BY_THE_REST = 0.8


@dataclass(frozen=True)
class Round:
    """A part of a level's alignment, from one share of it to another.

    words: what progress adds to the level's name.
    """

    start: float
    end: float
    words: str

    @property
    def begins(self) -> bool:
        return self.start == 0

    @property
    def share(self) -> float:
        return self.end - self.start

    @property
    def seed(self) -> int:
        """Added to a level's own, so that a further round draws other images."""
        return 0 if self.begins else 500

    def steps(self, whole: int | None) -> int | None:
        """Of so many."""
        return None if whole is None else round(whole * self.end) - round(whole * self.start)


WHOLE = Round(0.0, 1.0, "")
FIRST = Round(0.0, QUARTER, ", first quarter")
LAST = Round(QUARTER, 1.0, ", the rest")


def halves(ladder: str, steps: int | None, minutes: float | None) -> bool:
    """Whether an alignment of so many steps and minutes is in two rounds; None is no bound."""
    return (
        ladder == USED
        and (steps is None or steps >= LEAST_STEPS)
        and (minutes is None or minutes >= LEAST_MINUTES)
    )


def worth_the_rest(program: Program, numbers: Sequence[int]) -> Program:
    """Return the program without the levels, of `numbers`, that no run would use at the end.

    Levels close up; a note names each that goes. All stay where there are too few images to tell.
    """
    judged = [replace(program.levels[number], precision=FLOAT32) for number in numbers]
    macs = program.levels[0].macs + sum(level.macs for level in judged)
    words = "points lost after a quarter"
    losses = parallel.once(lambda: losses_by_share(program, judged, macs, "align", words))
    if losses is None:
        return program
    proxies = range(1, len(program.levels))
    found = dict(zip(numbers, losses, strict=True))
    # A precision loses next to nothing, and is not aligned.
    expected = [
        [(share, LEFT_BY_THE_REST * lost) for share, lost in found.get(number, [(1.0, 0.0)])]
        for number in proxies
    ]
    best = used([program.levels[number].cost for number in proxies], [expected])
    gone = [number for number in numbers if number - 1 not in best]
    notes = tuple(
        f"no level {program.levels[number].title}: within {BOUNDS[-1]:g} points of accuracy no run "
        f"would use it (cost {program.levels[number].cost:.2f}, {found[number][-1][1]:.1f} points "
        "lost after a quarter of its alignment)"
        for number in gone
    )
    kept = tuple(level for number, level in enumerate(program.levels) if number not in gone)
    return replace(program, levels=kept, notes=(*program.notes, *notes))
