"""Lower the program to its engine's artifacts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

from pbc.bundle.graph_name import FORWARD
from pbc.bundle.ladder import LATENCY, PROFILE
from pbc.errors import PbcError
from pbc.ir.program import Program
from pbc.lower.backend import backend
from pbc.lower.lowering import Lowering, Tunes
from pbc.proxies import parallel
from pbc.training_graph.step_check import (
    LOWERED_TOLERANCE,
    TOLERANCE,
    random_batches,
    starting_parameters,
    step_errors,
)

CHECK = "lowered_train_step"
TUNING = "tuning"


@dataclass(frozen=True)
class Lower:
    """Measure what each level costs as it will run, write its files, and check lowered steps.

    Graphs stay as they are; `program.artifacts` is filled. On this machine's own target the
    levels' costs become measured latencies, unless a device's profile gave them; a level that
    turns out no cheaper than the one above it is noted.

    tune: minutes to search faster code for, where the engine's lowering can.
    """

    stage: ClassVar[str] = "lower"
    tune: float | None = None

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        lowering = backend(program.request.engine).lowering()
        if self.tune is not None:
            program = self._tuned(program, lowering, self.tune * 60)
        if program.request.target.local and program.cost_model != PROFILE:
            program = self._measured(program, lowering)
        program = replace(program, artifacts=lowering.lower(program))
        program = replace(program, notes=(*program.notes, *lowering.notes()))
        return self._checked(program, lowering)

    def _tuned(self, program: Program, lowering: Lowering, seconds: float) -> Program:
        assert isinstance(lowering, Tunes)  # or the compiler had refused
        found = parallel.once(lambda: lowering.tune(program, seconds))
        notes = (*program.notes, *found.pop("notes"))
        return replace(program, checks={**program.checks, TUNING: found}, notes=notes)

    def _measured(self, program: Program, lowering: Lowering) -> Program:
        latency = parallel.once(lambda: lowering.latency_ms(program, program.levels))
        levels = tuple(
            replace(level, latency_ms=ms, cost=ms / latency[0])
            for level, ms in zip(program.levels, latency, strict=True)
        )
        notes = program.notes
        for number, (above, below) in enumerate(itertools.pairwise(levels)):
            if below.cost >= above.cost:
                notes += (
                    f"level {number + 1} measures {below.cost:.2f} of level 0's latency, "
                    f"no cheaper than level {number} ({above.cost:.2f})",
                )
        return replace(program, levels=levels, cost_model=LATENCY, notes=notes)

    def _checked(self, program: Program, lowering: Lowering) -> Program:
        """Run the lowered steps beside torch's; levels whose files are the same once."""
        errors: dict[str, dict[str, float]] = {}
        notes, seen = program.notes, set()
        for number, level in enumerate(program.levels):
            step = {role for role in level.graphs if role == FORWARD or role.optimizer}
            files = frozenset(
                program.artifacts[lowering.graph_file(role.at(number))] for role in step
            )
            if not step or files in seen:
                continue
            seen.add(files)
            theta = starting_parameters(program, level)
            batches = random_batches(program, level, program.network.head.classes_in(theta))
            found = step_errors(level.body, theta, batches, lowering.runner(program, level))
            errors[str(number)] = found
            worst = max(found.values())
            if not worst <= LOWERED_TOLERANCE:
                raise PbcError(
                    f"the training step that {program.request.engine} runs at level {number} "
                    f"differs from torch's by {worst:.1e} (relative; at most "
                    f"{LOWERED_TOLERANCE:.0e}): compile with another --engine or --strategy"
                )
            if worst > TOLERANCE:
                notes += (
                    f"the step of level {number} differs from torch's by {worst:.1e} in float32 "
                    f"(relative; {TOLERANCE:.0e} is usual): rounding that the network amplifies",
                )
        checks = {**program.checks, CHECK: errors} if errors else program.checks
        return replace(program, checks=checks, notes=notes)
