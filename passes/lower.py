"""Lower the program to its engine's artifacts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from pbc.bundle.graph_name import FORWARD
from pbc.bundle.ladder import FLOAT32, LATENCY, PROFILE
from pbc.errors import PbcError
from pbc.ir.levels import LevelGraphs
from pbc.ir.pipeline import OWN_ROUNDING
from pbc.ir.program import Program
from pbc.ir.runner import Runner, TorchRunner
from pbc.lower.backend import backend
from pbc.lower.graph_check import USUAL, bound, graph_error_beside_float64, graph_errors
from pbc.lower.lowering import Lowering, Tunes
from pbc.lower.manifest import expected_classes, training_memory
from pbc.proxies import parallel
from pbc.proxies.fidelity import precision_of
from pbc.training_graph.step_check import (
    LOWERED_TOLERANCE,
    TOLERANCE,
    random_batches,
    starting_parameters,
    step_error_beside_float64,
    step_errors,
    usual,
    worst,
)

CHECK = "lowered_train_step"
GRAPHS_CHECK = "lowered_graphs"
TUNING = "tuning"


@dataclass(frozen=True)
class Lower:
    """Measure what each level costs as it will run, write its files, and check what was lowered.

    Graphs stay as they are; `program.artifacts` is filled, and `program.memory` with what training
    will hold. On this machine's own target the levels' costs become measured latencies, unless a
    device's profile gave them, and `program.costs` has their parts, so that training here need not
    measure again; a level that turns out no cheaper than the one above it is noted. Prefixes,
    bodies and derived steps are run as the engine will run them, in libraries for this machine
    where those of the target cannot be run, and held against torch's; `program.checks` has the
    errors.

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
        program = replace(program, memory=_memory(program, lowering))
        return self._checked(program, lowering)

    def _tuned(self, program: Program, lowering: Lowering, seconds: float) -> Program:
        assert isinstance(lowering, Tunes)  # or the compiler had refused
        found = parallel.once(lambda: lowering.tune(program, seconds))
        notes = (*program.notes, *found.pop("notes"))
        return replace(program, checks={**program.checks, TUNING: found}, notes=notes)

    def _measured(self, program: Program, lowering: Lowering) -> Program:
        costs = parallel.once(lambda: lowering.level_costs(program, program.levels))
        latency = [(cost.prefix_ms + cost.body_ms) * program.request.batch for cost in costs]
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
        return replace(program, levels=levels, costs=tuple(costs), cost_model=LATENCY, notes=notes)

    def _checked(self, program: Program, lowering: Lowering) -> Program:
        """Run what was lowered beside torch's; levels whose files are the same once."""
        step_found: dict[str, dict[str, float]] = {}
        graphs_found: dict[str, dict[str, float]] = {}
        notes: tuple[str, ...] = ()
        # A library may hold a level's step and the graphs beside it.
        seen: set[tuple[bool, frozenset[bytes]]] = set()
        for number, level in enumerate(program.levels):
            step = {role for role in level.graphs if role == FORWARD or role.optimizer}
            runner: Runner | None = None
            for roles in (set(level.graphs) - step, step):
                files = frozenset(
                    program.artifacts[lowering.graph_file(role.at(number))] for role in roles
                )
                key = (roles == step, files)
                if not roles or key in seen:
                    continue
                seen.add(key)
                runner = runner or lowering.runner(program, level)
                if roles == step:
                    step_found[str(number)], told = _check_step(program, number, runner)
                else:
                    graphs_found[str(number)], told = _check_graphs(program, number, runner)
                notes += told
        found = {CHECK: step_found, GRAPHS_CHECK: graphs_found}
        checks = {**program.checks, **{name: errors for name, errors in found.items() if errors}}
        return replace(program, checks=checks, notes=(*program.notes, *notes))


def _memory(program: Program, lowering: Lowering) -> dict[str, dict[str, int]] | None:
    level = program.levels[0]
    if level.forward is None:
        return None
    recorded = lowering.recorded_step(program, level, expected_classes(program))
    return training_memory(program, recorded)


def _check_graphs(
    program: Program, number: int, runner: Runner
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Compare prefix and body with torch's."""
    level = program.levels[number]
    errors = graph_errors(program, level, runner)
    notes: tuple[str, ...] = ()
    for role, error in errors.items():
        precision = precision_of(program.levels[0], role, level.precision)
        most = bound(program, level, role)
        beside_float64 = partial(graph_error_beside_float64, program, level, role)
        if not error <= most and not (
            precision == FLOAT32 and _is_rounding(beside_float64, runner, level)
        ):
            raise PbcError(
                f"what {program.request.engine} computes for the {role} of level {number} differs "
                f"from torch's by {error:.1e} (relative; at most {most:.0e} in "
                f"{precision}): compile with another --engine"
            )
        if error > USUAL[precision]:
            notes += (
                f"the {role} of level {number} differs from torch's by {error:.1e} in {precision} "
                f"(relative; {USUAL[precision]:.0e} is usual): rounding that the network amplifies",
            )
    return {str(role): error for role, error in errors.items()}, notes


def _is_rounding(
    beside_float64: Callable[[Runner], float], runner: Runner, level: LevelGraphs
) -> bool:
    """Whether an engine is nearly as close to float64 as torch's own float32 is."""
    return beside_float64(runner) <= OWN_ROUNDING * beside_float64(TorchRunner(level))


def _check_step(
    program: Program, number: int, runner: Runner
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Compare the derived step with torch's."""
    level = program.levels[number]
    theta = starting_parameters(program, level)
    batches = random_batches(program, level, program.network.head.classes_in(theta))
    found = step_errors(level.body, theta, batches, runner)
    wrong = max(usual(found).values())
    beside_float64 = partial(step_error_beside_float64, level.body, theta, batches)
    if not all(error <= LOWERED_TOLERANCE for error in usual(found).values()) and not _is_rounding(
        beside_float64, runner, level
    ):
        raise PbcError(
            f"the training step that {program.request.engine} runs at level {number} "
            f"differs from torch's by {wrong:.1e} (relative; at most "
            f"{LOWERED_TOLERANCE:.0e}): compile with another --engine or --strategy"
        )
    errors = worst(found)
    most = max(errors.values())
    if most <= TOLERANCE:
        return errors, ()
    return errors, (
        f"the step of level {number} differs from torch's by {most:.1e} in float32 "
        f"(relative; {TOLERANCE:.0e} is usual): rounding that the network amplifies",
    )
