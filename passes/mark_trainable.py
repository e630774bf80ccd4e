"""Mark what trains."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

from pbc.ir.program import MODEL, PARAMETER, Program, get_tensor, placeholders


@dataclass(frozen=True)
class MarkTrainable:
    """Turn every trainable parameter into an input of the graph.

    Before::

        %linear: [b, 10] = linear(%flatten, @fc.weight, @fc.bias)

    After, with `fc.weight` and `fc.bias` in `program.parameters`::

        %theta_fc_weight: [10, 512] = θ[fc.weight]
        %theta_fc_bias: [10] = θ[fc.bias]
        %linear: [b, 10] = linear(%flatten, %theta_fc_weight, %theta_fc_bias)

    Does nothing when no parameter of the graph trains.
    """

    stage: ClassVar[str] = "mark"

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        graph = program.graphs[MODEL]
        parameters = {}
        last_input = placeholders(graph)[-1]
        for node in list(graph.graph.nodes):
            if node.op != "get_attr" or node.target not in program.trainable:
                continue
            if node.target not in parameters:
                parameters[node.target] = get_tensor(graph, node.target).detach().clone()
            with graph.graph.inserting_after(last_input):
                last_input = theta = graph.graph.placeholder(
                    "theta_" + re.sub(r"\W", "_", node.target)
                )
            theta.target = theta.name  # `a.b` and `a_b` are two arguments
            theta.meta = {**node.meta, PARAMETER: node.target}
            node.replace_all_uses_with(theta)
            graph.graph.erase_node(node)
        for name in parameters:
            owner, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(owner), leaf)
        graph.recompile()
        return replace(program, parameters=parameters)
