"""Choose the levels that a run would use, of those that were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from pbc.bundle.ladder import LATENCY
from pbc.ir.pipeline import PlanAgain
from pbc.ir.program import Program
from pbc.lower.backend import backend
from pbc.proxies import parallel
from pbc.proxies.use import USED, used
from pbc.runtime.routing.outlook import BOUNDS


@dataclass(frozen=True)
class ChooseLevels:
    """Keep a level where some run within 2 points of accuracy would use it, and drop the others.

    The graphs of what stays are as they were; levels close up, and `program.mixes` names them by
    their new numbers. Levels are judged as they will run: aligned, rounded, by the mixes of
    `fit-accuracy-map`; on this machine's own target by their latency, measured anew, since planning
    measured them before they were. A note says what was dropped and why.

    Where a precision is no faster than level 0 as it will run, what gives up more in that precision
    was planned by a cost that is not so: PlanAgain is raised, once for each.

    Does nothing where no level was judged, or where even steps were asked for.
    """

    ladder: str = USED
    slow_precisions: tuple[str, ...] = ()
    stage: ClassVar[str] = "route"
    after: ClassVar[tuple[str, ...]] = ("fit-accuracy-map",)
    before: ClassVar[tuple[str, ...]] = ("learn-policy",)

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        if self.ladder != USED or not program.mixes:
            return program
        if program.cost_model == LATENCY:
            program = _measured(program)
            self._require_faster_precisions(program)
        costs = [level.cost for level in program.levels[1:]]
        losses = [
            [
                sorted((share, lost) for at, share, lost in rows if at == number)
                for number in range(1, len(program.levels))
            ]
            for rows in program.mixes.values()
        ]
        kept = sorted(number + 1 for number in used(costs, losses))
        notes = tuple(
            f"no level {level.title}: within {BOUNDS[-1]:g} points of accuracy no run would use it "
            f"(cost {level.cost:.2f}, {_words(level.accuracy_loss)})"
            for number, level in enumerate(program.levels)
            if number and number not in kept
        )
        if notes and not kept:
            notes += ("no proxy is worth a level here; more alignment (--align-time) may make one",)
        return replace(
            program,
            levels=tuple(program.levels[number] for number in (0, *kept)),
            mixes=_renumbered(program.mixes, {old: new for new, old in enumerate(kept, 1)}),
            notes=(*program.notes, *notes),
        )

    def _require_faster_precisions(self, program: Program) -> None:
        """Raise PlanAgain where a level of nothing but a precision is slower than level 0."""
        for level in program.levels[1:]:
            precision = level.precision
            alone = not (level.keep or level.resolution or level.merges)
            others = sum(other.precision == precision for other in program.levels) > 1
            if alone and others and level.cost >= 1 and precision not in self.slow_precisions:
                raise PlanAgain(precision, level.cost)


def _measured(program: Program) -> Program:
    lowering = backend(program.request.engine).lowering()
    times_ms = parallel.once(lambda: lowering.latency_ms(program, program.levels))
    levels = tuple(
        replace(level, cost=ms / times_ms[0])
        for level, ms in zip(program.levels, times_ms, strict=True)
    )
    return replace(program, levels=levels)


def _renumbered(
    mixes: Mapping[str, Sequence[tuple[int, float, float]]], numbers: Mapping[int, int]
) -> dict[str, tuple[tuple[int, float, float], ...]]:
    return {
        kind: tuple((numbers[at], share, lost) for at, share, lost in rows if at in numbers)
        for kind, rows in mixes.items()
    }


def _words(points: float | None) -> str:
    return "an unknown loss" if points is None else f"{points:.1f} points lost"
