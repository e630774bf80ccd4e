"""The pipeline: orders passes, runs them, and checks the program after each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pbc import plugins
from pbc.errors import PbcError, UsageError, suggest
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.rewrite import in_float64
from pbc.ir.stages import order
from pbc.util.atomic import replace_bytes
from pbc.util.progress import report

EQUIVALENCE = 1e-4
# Where a network amplifies rounding, what a pass rounds in another way may be off by as many times
# what float32 itself is.
OWN_ROUNDING = 10.0


class PlanAgain(PbcError):
    """Levels were planned in a precision that is no faster as they will run: plan without it."""

    def __init__(self, precision: str, cost: float) -> None:
        super().__init__(f"{precision} takes {cost:.2f} of level 0's time as it will run")
        self.precision = precision


class Pass(Protocol):
    """A frozen dataclass whose fields are its options; entry point group `pbc.passes`.

    stage: one of STAGES. Within a stage, `after` and `before` name passes (both optional).
    default: False for a pass that runs only when it is asked for by name (optional, True).
    options: makes fields of what follows a colon in that name, as in `cluster-weights:4`, or raises
        UsageError (optional: without it nothing may follow).
    """

    stage: ClassVar[str]

    def __call__(self, program: Program) -> Program:
        """Return a new program; the given one stays as it is."""


@dataclass(frozen=True)
class PassPipeline:
    """Passes by name, in the order in which they run."""

    passes: tuple[tuple[str, Pass], ...]

    def run(self, program: Program, dump: Path | None = None, *, compared: bool = True) -> Program:
        """Run all; `dump` receives the program's text after each pass.

        compared: run level 0 after each, and compare its logits with the original's.
        A program that is not well formed after a pass is that pass's bug: RuntimeError names it.
        """
        for number, (name, step) in enumerate(self.passes):
            report(name, 0.0)
            before = program
            try:
                program = step(program)
                program.check()
                error = equivalence_error(program) if compared else 0.0
            except PbcError:
                raise
            except Exception as failure:
                raise RuntimeError(f"pass {name} failed: {failure}") from failure
            if not error <= EQUIVALENCE and not error <= OWN_ROUNDING * float32_error(before):
                raise RuntimeError(
                    f"pass {name} changed level 0: its logits differ from the original's by "
                    f"{error:.1e} (relative; at most {EQUIVALENCE:.0e})"
                )
            checks = {**program.checks, "level_0_error": error} if compared else program.checks
            program = replace(program, history=(*program.history, name), checks=checks)
            if dump is not None:
                text = program.text() + "\n"
                replace_bytes(dump / f"{number:02}-{name}.txt", text.encode(), mode=0o644)
            report(name, 1.0)
        return program


def equivalence_error(program: Program) -> float:
    """Return how far level 0's logits are from the original's, relative to the largest logit.

    Also holds every proxy to the shapes that the body reads; raises ValueError where one differs.
    """
    network = program.network
    with torch.no_grad():
        logits = program.logits(0, network.example)
        shapes = [_feature_shapes(level, network.example) for level in program.levels]
    for number, got in enumerate(shapes):
        if got != shapes[0]:
            raise ValueError(f"level {number} sends {got}; the trainable part reads {shapes[0]}")
    scale = max(1.0, float(network.reference.abs().max()))
    return float((logits - network.reference).abs().max()) / scale


def float32_error(program: Program) -> float:
    """Return how far level 0's logits are from those in float64, relative to the largest logit."""
    first, *others = program.levels or (None,)
    exact = replace(
        program,
        model=None if program.model is None else in_float64(program.model),
        parameters={name: value.double() for name, value in program.parameters.items()},
        levels=()
        if first is None
        else (
            replace(
                first,
                prefix=None if first.prefix is None else in_float64(first.prefix),
                body=in_float64(first.body),
            ),
            *others,
        ),
    )
    images = program.network.example
    with torch.no_grad():
        known = exact.logits(0, images.double())
        off = (program.logits(0, images) - known).abs().max()
    return float(off) / max(1.0, float(known.abs().max()))


def _feature_shapes(level: LevelGraphs, images: Tensor) -> list[torch.Size]:
    return [value.shape for value in level.features(images).values()]


def build(
    options: Mapping[str, Any], extra: Iterable[str] = (), without: Iterable[str] = ()
) -> PassPipeline:
    """The installed passes that run by default, and those asked for, in order.

    options: values for the passes' fields, by field name; a pass takes those it declares.
    extra: names, each with its own options behind a colon, if it takes any.
    """
    available = plugins.entries("pbc.passes")
    arguments = {name: argument for name, _, argument in (text.partition(":") for text in extra)}
    for name in (*arguments, *without):
        if name not in available:
            raise UsageError(suggest("pass", name, available))
    chosen: dict[str, Callable[..., Pass]] = {}
    for name, entry in available.items():
        kind = entry.load()
        if name not in without and (getattr(kind, "default", True) or name in arguments):
            chosen[name] = kind
    return PassPipeline(
        tuple(
            (name, _make(name, chosen[name], options, arguments.get(name, "")))
            for name in order(chosen)
        )
    )


def _make(name: str, kind: Callable[..., Pass], options: Mapping[str, Any], argument: str) -> Pass:
    declared = [f.name for f in fields(kind)] if hasattr(kind, "__dataclass_fields__") else []  # type: ignore[arg-type]
    given = {n: options[n] for n in declared if options.get(n, MISSING) not in (MISSING, None)}
    if argument:
        if not hasattr(kind, "options"):
            raise UsageError(f"pass {name!r} takes nothing behind a colon, got {argument!r}")
        given.update(kind.options(argument))
    return kind(**given)
