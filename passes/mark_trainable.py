"""Mark what trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from pbc.ir.program import Program
from pbc.ir.rewrite import tensors_to_inputs


@dataclass(frozen=True)
class MarkTrainable:
    """Turn every trainable parameter into an input of the graph.

    Before::

        %linear: [b, 10] = linear(%flatten, @fc.weight, @fc.bias)

    After, with `fc.weight` and `fc.bias` in `program.parameters`::

        %theta_fc_weight: [10, 512] = θ[fc.weight]
        %theta_fc_bias: [10] = θ[fc.bias]
        %linear: [b, 10] = linear(%flatten, %theta_fc_weight, %theta_fc_bias)

    Does nothing when no parameter of the graph trains, or when the model is split already.
    """

    stage: ClassVar[str] = "mark"

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        if program.model is None:
            return program
        return replace(program, parameters=tensors_to_inputs(program.model, program.trainable))
