"""Split the frozen prefix from the body."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from pbc.bundle.ladder import ORIGINAL
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.split import LEAST_SHARE, split_at_parameters


@dataclass(frozen=True)
class SplitPrefix:
    """Cut the model where the first trainable parameter is read, into level 0.

    Before::

        graph model takes x, θ… does
          %relu = relu(%conv2d)
          %linear = linear(%relu, θ[fc.weight])

    After::

        graph prefix/0 takes x … returns %relu as feature_0
        graph body/0 takes %feature_0, θ… does
          %linear = linear(%feature_0, θ[fc.weight])

    Makes no prefix (the body then takes x) when fewer than `least_share` of the layers come before
    anything trainable: sending what a stem puts out costs more than computing it again. Does
    nothing when the model is split already.
    """

    least_share: float = LEAST_SHARE
    stage: ClassVar[str] = "mark"
    after: ClassVar[tuple[str, ...]] = ("mark-trainable",)

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        if program.model is None:
            return program
        prefix, body = split_at_parameters(program.model, self.least_share)
        level = LevelGraphs(body, prefix, fidelity=1.0, status=ORIGINAL)
        return replace(program, model=None, levels=(level,))
