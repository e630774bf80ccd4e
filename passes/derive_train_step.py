"""Derive the training step of every body ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from pbc import plugins
from pbc.ir.program import (
    Program,
    body,
    copy_graph,
    get_tensor,
    graph_text,
    step_forward,
    step_update,
    tensor_names,
)
from pbc.lower.lowering import Lowering
from pbc.training_graph.autodiff import Gradient, differentiate
from pbc.training_graph.optimizers import OPTIMIZERS, with_update
from pbc.training_graph.step_check import (
    TOLERANCE,
    GraphStep,
    in_float64,
    random_batches,
    starting_parameters,
    step_errors,
)
from pbc.util.progress import report

CHECK = "train_step"


@dataclass(frozen=True)
class DeriveTrainStep:
    """Turn each body into graphs that train it, for engines that only know inference.

    Before::

        graph body/0 takes %flatten, θ… does
          %linear: [b, 10] = linear(%flatten, θ[fc.weight], θ[fc.bias])

    After, beside it (pbc.training_graph.autodiff, pbc.training_graph.optimizers)::

        graph forward/0 takes %flatten, θ…, %labels, %label_smoothing …
          returns the mean loss, losses [b], logits, and what the backward needs
        graph update/0/sgd takes those, θ…, the optimizer's state, its learning rate …
          returns every new parameter and state

    and likewise update/0/adam and update/0/adamw. They are two graphs and not one so that a
    mini-batch that is not learnt from costs its forward alone. Batch and, where the head is open,
    class count are symbols.

    Every step is verified for five mini-batches of random images against autograd and torch.optim,
    levels of the same body once; `program.checks` has the errors. Does nothing for an
    engine that differentiates by itself.
    """

    stage: ClassVar[str] = "derive"

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        lowering: Lowering = plugins.load("pbc.lowerings", program.engine)()
        if not lowering.derives_steps:
            return program
        derived: list[tuple[GraphModule, Gradient, dict[str, GraphModule]]] = []
        errors: dict[str, dict[str, float]] = {}
        for level in program.levels:
            graph = program.graphs[body(level)]
            report("derive-train-step", level / len(program.levels), f"level {level}")
            known = next((d for d in derived if same(d[0], graph)), None)
            if known is None:
                gradient = differentiate(graph, open_axes(program))
                updates = {name: with_update(gradient.backward, name) for name in OPTIMIZERS}
                errors[str(level)] = self._verified(program, level, gradient, updates)
                known = (graph, gradient, updates)
                derived.append(known)
            _, gradient, updates = known
            program.graphs[step_forward(level)] = copy_graph(gradient.forward)
            for name, update in updates.items():
                program.graphs[step_update(level, name)] = copy_graph(update)
        return replace(program, checks={**program.checks, CHECK: errors})

    def _verified(
        self, program: Program, level: int, gradient: Gradient, updates: dict[str, GraphModule]
    ) -> dict[str, float]:
        graph = program.graphs[body(level)]
        theta = starting_parameters(program, level)
        batches = random_batches(program, level, len(theta[program.head.weight]))
        errors = step_errors(graph, theta, batches, GraphStep(gradient.forward, updates))
        if not all(error <= TOLERANCE for error in errors.values()):
            # One ReLU whose input is zero but for rounding does that. Or the derivation is wrong:
            # float64, which takes its time, knows.
            errors = step_errors(
                in_float64(graph),
                _in_float64(theta),
                [(_in_float64(features), labels) for features, labels in batches],
                GraphStep(
                    in_float64(gradient.forward), {n: in_float64(u) for n, u in updates.items()}
                ),
            )
        for name, error in errors.items():
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"the derived step of level {level} under {name} differs from torch's by "
                    f"{error:.1e} (relative; at most {TOLERANCE:.0e})"
                )
        return errors


def open_axes(program: Program) -> dict[str, int]:
    """By parameter name, the axis that counts classes, where the device decides how many."""
    if program.class_count is not None:
        return {}
    names = (program.head.weight, program.head.bias)
    return {name: 0 for name in names if name is not None}


def _in_float64(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def same(one: GraphModule, other: GraphModule) -> bool:
    """Whether two graphs compute the same: their text and their tensors are equal."""
    if graph_text("", one) != graph_text("", other):
        return False
    return all(
        get_tensor(one, name) is get_tensor(other, name)
        or torch.equal(get_tensor(one, name), get_tensor(other, name))
        for name in tensor_names(one)
    )
