"""Plan the ladder: what each level gives up to be cheaper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from pbc.bundle.ladder import FLOAT32, INT8, LATENCY
from pbc.errors import UsageError, suggest
from pbc.ir.dim_rules import dims_of
from pbc.ir.levels import LevelPlan
from pbc.ir.program import Program
from pbc.lower.cost_profile import CostProfile
from pbc.proxies import parallel
from pbc.proxies.forms import AXES, INT8_COST, PRECISION, WORTHWHILE, Form, Forms
from pbc.proxies.halving import halves
from pbc.proxies.pseudo_tasks import losses_by_share
from pbc.proxies.use import EVEN, LADDERS, USED, Losses, used
from pbc.runtime.routing.outlook import BOUNDS

_Chosen = list[tuple[Form, float]]
_Found = tuple[_Chosen, tuple[str, ...]]

# What alignment leaves of a loss, at worst and at best (docs/alignment.md): what either plans is
# judged again on the way. Of a short one little is expected.
LEFT_BY_LONG, LEFT_BY_SHORT = (0.6, 0.25), (0.8,)


@dataclass(frozen=True)
class PlanLevels:
    """Choose every level's form so that costs fall in even steps.

    Four axes, given up in this order: precision (the first of those that the program's engine
    offers and that is measured to be faster on this machine; a bfloat16 level needs no weights of
    its own, an int8 level rounds its prefix, see `quantize`), resolution (fewer pixels, where the
    frozen prefix pools them away), tokens (a transformer's most alike ones become one, see
    `merge-tokens`; more and more of them), width (all independent dimensions shrink by one common
    width, rounded to `rounding`, 0 meaning 16 where there are depthwise convolutions, else 8; of an
    attention the head size shrinks, the number of heads stays).

    Level 1 is the original in the cheaper precision, if there is one; from there even steps lead
    down to `min_cost`, or to the cheapest cost in reach. Cost is what the device's own profile
    predicts, where there is one (`cost`, see `pbc.lower.cost_profile`); else the latency of one
    training iteration measured here when this machine is the target; else MACs. Then int8 is
    planned for convolutional networks without depthwise layers, which gain little, and a note says
    what was assumed; bfloat16 is not planned, since few devices multiply it, unless it was
    profiled.
    Graphs stay as they are; `program.plans` has one plan per proxy. Every form is tried before it
    is planned (`pbc.proxies.trial`): one that fails is left out, and a note says why. A level that
    rounding makes equal to the one above is dropped and noted. Where nothing can be given up, or
    nothing frozen sends what trains, level 0 is the only one, whatever a timing says.

    ladder: "used" plans the levels that a run within some bound would use: without narrowing, forms
    are judged before alignment on calibration images (`pbc.proxies.pseudo_tasks`), of whose losses
    alignment is taken to leave a part, and for each bound the one is planned that makes a run
    shortest (`pbc.proxies.use`). What a long alignment may leave is a wide range: those that are
    best at either end of it are planned, and `align` gives up what does not keep its promise.
    `choose-levels` judges them again. "even" plans the even steps of PieBridge, as is done without
    calibration, or where only channels can go.
    align_steps, align_time: as for `align`.
    axes: those that may be used, of "precision", "resolution", "tokens", "width". cost: a file that
    `pbc profile` wrote on the device, of a bundle compiled with the same options. trials: False
    plans forms untried, in seconds; of those that fail, a compilation makes no level.
    slow_precisions: those that turned out to be no faster, of an earlier plan.
    """

    levels: int = 4
    min_cost: float = 0.3
    rounding: int = 0
    axes: tuple[str, ...] = AXES
    cost: Path | None = None
    trials: bool = True
    ladder: str = USED
    align_steps: int | None = None
    align_time: float | None = None
    slow_precisions: tuple[str, ...] = ()
    stage: ClassVar[str] = "plan"

    def __post_init__(self) -> None:
        """Refuse an axis or a ladder that there is not."""
        if self.ladder not in LADDERS:
            raise UsageError(suggest("ladder", self.ladder, LADDERS))
        for axis in self.axes:
            if axis not in AXES:
                raise UsageError(suggest("axis", axis, AXES))

    def __call__(self, program: Program) -> Program:
        profile = None if self.cost is None else CostProfile.open(self.cost)
        if profile is not None:
            profile.check(program)
        dims = dims_of(program)
        forms = Forms(program, dims, self.rounding, profile, trials=self.trials)
        notes = program.notes
        chosen: _Chosen = []
        precision = FLOAT32
        levels = self.levels if forms.frozen else 0
        if levels and PRECISION in self.axes:
            fast = [f for f in forms.precisions() if f.precision not in self.slow_precisions]
            for form in forms.runnable(fast):
                cost = float(forms.costs([form])[0])
                if cost <= WORTHWHILE:  # not if it is NaN
                    precision = form.precision
                    chosen.append((form, cost))
                    break
        if precision == INT8 and forms.cost_model != LATENCY and not forms.profiled(INT8):
            notes += (
                f"costs of int8 levels are assumed, not measured: {INT8_COST} of a float32 "
                "multiply-accumulate for an int8 one",
            )
        count = levels - len(chosen)
        further = self._of_use(program, forms, chosen, count) if count else None
        if further is None and count:
            further = self._even(forms, precision, count)
        if further is not None:
            chosen += further[0]
            notes += further[1]
        taken: list[Form] = [Form()]
        plans: list[LevelPlan] = [forms.plan(Form(), 1.0)]
        for number, (form, cost) in enumerate(chosen, 1):
            shrunk = forms.sizes(form)
            if shrunk == plans[-1].sizes and replace(form, width=taken[-1].width) == taken[-1]:
                notes += (
                    f"level {number} of {self.levels} is dropped: it rounds to the level above it",
                )
                continue
            if not forms.runnable([form], chosen=True):
                continue
            taken.append(form)
            # MACs follow from the sizes; a latency is read off between the forms measured.
            expected = cost if forms.cost_model == LATENCY else forms.predicted(form)
            plans.append(forms.plan(form, expected))
        notes += (*forms.notes, *forms.extrapolations(taken))
        program = program.copy()
        original = replace(program.levels[0], macs=plans[0].macs)
        return replace(
            program,
            levels=(original, *program.levels[1:]),
            plans=tuple(plans[1:]),
            cost_model=forms.cost_model,
            dims=dims,
            notes=notes,
        )

    def _halves(self) -> bool:
        return halves(self.ladder, self.align_steps, self.align_time)

    def _of_use(
        self, program: Program, forms: Forms, planned: _Chosen, count: int
    ) -> _Found | None:
        """At most `count` forms that a run would use beside those planned, and what to note.

        None where nothing says so, or only channels can go.
        """
        if self.ladder == EVEN or program.calibration is None:
            return None
        precision = planned[-1][0].precision if planned else FLOAT32
        candidates = forms.without_narrowing(self.axes, precision)
        if not candidates:
            return None
        costs = [float(cost) for cost in forms.costs(candidates)]
        pairs = [pair for pair in zip(candidates, costs, strict=True) if math.isfinite(pair[1])]
        # Rounding needs ranges, which are to come, and loses little beside what else is given up.
        trials = [forms.trial(replace(form, precision=FLOAT32)) for form, _ in pairs]
        macs = forms.whole + sum(forms.macs(form) for form, _ in pairs)
        words = "points lost before alignment"
        losses = parallel.once(lambda: losses_by_share(program, trials, macs, "plan-levels", words))
        if losses is None:
            return None
        promising = self._promising(planned, [cost for _, cost in pairs], losses)
        notes = tuple(
            f"no level {form.title}: within {BOUNDS[-1]:g} points of accuracy no run would use it "
            f"(cost {cost:.2f}, {found[-1][1]:.1f} points lost before alignment)"
            for index, ((form, cost), found) in enumerate(zip(pairs, losses, strict=True))
            if index not in promising
        )
        return sorted((pairs[i] for i in promising[:count]), key=lambda pair: -pair[1]), notes

    def _promising(
        self, planned: _Chosen, costs: Sequence[float], losses: Sequence[Losses]
    ) -> list[int]:
        """The forms, by position, that a run would use beside those planned; the surest first."""
        # A precision costs next to nothing; what gives up more has to be worth more.
        above = [[(1.0, 0.0)] for _ in planned]
        all_costs = [*(cost for _, cost in planned), *costs]
        found: list[int] = []
        for left in LEFT_BY_LONG if self._halves() else LEFT_BY_SHORT:
            expected = [[(share, left * lost) for share, lost in of_form] for of_form in losses]
            positions = used(all_costs, [[*above, *expected]])
            forms = {position - len(planned) for position in positions if position >= len(planned)}
            found += sorted(forms.difference(found), key=lambda form: -costs[form])
        return found

    def _even(self, forms: Forms, precision: str, count: int) -> _Found:
        """So many forms whose costs fall in even steps, and what to note."""
        path = forms.path(self.axes, precision)
        costs = forms.costs(path) if len(path) > 1 else np.ones(len(path))
        path = [form for form, cost in zip(path, costs, strict=True) if math.isfinite(cost)]
        if len(path) < 2:
            return [], ()
        costs = np.minimum.accumulate(costs[np.isfinite(costs)].clip(max=1.0))
        if precision == FLOAT32:
            costs[0] = 1.0
        cheapest = max(self.min_cost, float(costs[-1]))
        goals = np.linspace(float(costs[0]), cheapest, count + 1)[1:]
        chosen = [_at(path, costs, float(goal)) for goal in goals]
        if cheapest <= self.min_cost:
            return chosen, ()
        return chosen, (
            f"a cost of {self.min_cost:.2f} is out of reach: the most that can be given up "
            f"still costs {cheapest:.2f}, so the levels step down to that",
        )


def _at(path: Sequence[Form], costs: np.ndarray, goal: float) -> tuple[Form, float]:
    """The form on the path that costs `goal`, or as near as its steps allow, with its cost."""
    below = min(int(np.searchsorted(-costs, -goal)), len(path) - 1)
    above = max(below - 1, 0)
    if replace(path[above], width=path[below].width) == path[below]:
        known = costs[[below, above]]
        width = np.interp(goal, known, [path[below].width, path[above].width])
        return replace(path[below], width=float(width)), float(goal)
    nearest = min((above, below), key=lambda index: abs(costs[index] - goal))
    return path[nearest], float(costs[nearest])
