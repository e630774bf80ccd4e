"""Lower the program to its engine's artifacts."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

from pbc import parallel, registry
from pbc.interface import precision_of
from pbc.ladder import Ladder
from pbc.lowering import Candidate, Lowering
from pbc.program import Program, body, prefix, step_forward, step_update


@dataclass(frozen=True)
class Lower:
    """Measure what each level costs as it will run, and write its files.

    Graphs stay as they are; `program.artifacts` is filled. On this machine's own target the
    ladder's costs become measured latencies; a level that turns out no cheaper than the one
    above it is noted.
    """

    stage: ClassVar[str] = "lower"

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        lowering: Lowering = registry.load("pbc.lowerings", program.engine)()
        if program.target.local:
            program = self._measured(program, lowering)
        return replace(program, artifacts=lowering.lower(program))

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
        return replace(program, ladder=Ladder(levels, "latency"), notes=notes)

    def _candidate(self, program: Program, level: int) -> Candidate:
        precision = program.ladder.precision(level)
        kinds = (prefix, body, step_forward, functools.partial(step_update, optimizer="sgd"))
        graphs = {
            kind(0): program.graphs[kind(level)] for kind in kinds if kind(level) in program.graphs
        }
        return Candidate(graphs, {name: precision_of(program, name, precision) for name in graphs})
