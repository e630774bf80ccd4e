"""Lower the program to its engine's artifacts."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

from pbc import plugins
from pbc.bundle.ladder import LATENCY, PROFILE, Ladder
from pbc.errors import PbcError
from pbc.ir.program import Program, body, prefix, step_forward, step_update
from pbc.lower.lowering import Candidate, Lowering, Tunes
from pbc.proxies import parallel
from pbc.proxies.fidelity import precision_of
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
    ladder's costs become measured latencies, unless a device's profile gave them; a level that
    turns out no cheaper than the one above it is noted.

    tune: minutes to search faster code for, where the engine's lowering can.
    """

    stage: ClassVar[str] = "lower"
    tune: float | None = None

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        lowering: Lowering = plugins.load("pbc.lowerings", program.engine)()
        if self.tune is not None:
            program = self._tuned(program, lowering, self.tune * 60)
        if program.target.local and program.ladder.cost_model != PROFILE:
            program = self._measured(program, lowering)
        program = replace(program, artifacts=lowering.lower(program))
        program = replace(program, notes=(*program.notes, *lowering.notes()))
        return self._checked(program, lowering)

    def _tuned(self, program: Program, lowering: Lowering, seconds: float) -> Program:
        assert isinstance(lowering, Tunes)  # or the compiler had refused
        found = parallel.once(lambda: lowering.tune(program, seconds))
        notes = (*program.notes, *found.pop("notes"))
        return replace(program, checks={**program.checks, TUNING: found}, notes=notes)

    def _checked(self, program: Program, lowering: Lowering) -> Program:
        """Run the lowered steps beside torch's; levels whose files are the same once."""
        errors: dict[str, dict[str, float]] = {}
        notes, seen = program.notes, set()
        for level in program.levels:
            step = lowering.step(program, level) if step_forward(level) in program.graphs else None
            files = [
                program.artifacts[lowering.graph_file(name)]
                for name in (step_forward(level), step_update(level, "sgd"))
                if name in program.graphs
            ]
            if step is None or tuple(files) in seen:
                continue
            seen.add(tuple(files))
            theta = starting_parameters(program, level)
            batches = random_batches(program, level, program.class_count_in(theta))
            found = step_errors(program.graphs[body(level)], theta, batches, step)
            errors[str(level)] = found
            worst = max(found.values())
            if not worst <= LOWERED_TOLERANCE:
                raise PbcError(
                    f"the training step that {program.engine} runs at level {level} differs from "
                    f"torch's by {worst:.1e} (relative; at most {LOWERED_TOLERANCE:.0e}): compile "
                    "with another --engine or --strategy"
                )
            if worst > TOLERANCE:
                notes += (
                    f"the step of level {level} differs from torch's by {worst:.1e} in float32 "
                    f"(relative; {TOLERANCE:.0e} is usual): rounding that the network amplifies",
                )
        checks = {**program.checks, CHECK: errors} if errors else program.checks
        return replace(program, checks=checks, notes=notes)

    def _measured(self, program: Program, lowering: Lowering) -> Program:
        candidates = [self._candidate(program, level) for level in program.levels]
        latency = parallel.once(lambda: lowering.latency_ms(program, candidates))
        levels = tuple(
            replace(level, latency_ms=ms, cost=ms / latency[0])
            for level, ms in zip(program.ladder.levels, latency, strict=True)
        )
        notes = program.notes
        for above, below in itertools.pairwise(levels):
            if below.cost >= above.cost:
                notes += (
                    f"level {below.level} measures {below.cost:.2f} of level 0's latency, "
                    f"no cheaper than level {above.level} ({above.cost:.2f})",
                )
        return replace(program, ladder=Ladder(levels, LATENCY), notes=notes)

    def _candidate(self, program: Program, level: int) -> Candidate:
        precision = program.ladder.precision(level)
        kinds = (prefix, body, step_forward, functools.partial(step_update, optimizer="sgd"))
        graphs = {
            kind(0): program.graphs[kind(level)] for kind in kinds if kind(level) in program.graphs
        }
        return Candidate(graphs, {name: precision_of(program, name, precision) for name in graphs})
