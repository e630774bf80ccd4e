"""Derive the training step of every body ahead of time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import GraphModule

from pbc.bundle.optimizers import OPTIMIZERS
from pbc.ir.graph import get_tensor, graph_text, tensor_names
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.rewrite import in_float64
from pbc.ir.runner import TorchRunner
from pbc.lower.backend import backend
from pbc.training_graph.autodiff import differentiate
from pbc.training_graph.decompositions.activations import selecting
from pbc.training_graph.optimizers import with_update
from pbc.training_graph.step_check import (
    TOLERANCE,
    doubled,
    random_batches,
    starting_parameters,
    step_errors,
    worst,
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

    trials: False leaves the step unverified.
    """

    trials: bool = True
    stage: ClassVar[str] = "derive"

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        if not backend(program.request.engine).derives_steps:
            return program
        levels: list[LevelGraphs] = []
        errors: dict[str, dict[str, float]] = {}
        for number, level in enumerate(program.levels):
            report("derive-train-step", number / len(program.levels), f"level {number}")
            known = next((done for done in levels if same(done.body, level.body)), None)
            if known is None:
                known = self._derived(program, level)
                if self.trials:
                    known, errors[str(number)] = self._verified(program, number, known)
            levels.append(replace(level, forward=known.forward, updates=known.updates).copy())
        checks = {**program.checks, CHECK: errors}
        return replace(program, levels=tuple(levels), checks=checks)

    def _derived(self, program: Program, level: LevelGraphs) -> LevelGraphs:
        """Return the level with its step."""
        gradient = differentiate(level.body, program.open_axes)
        updates = {name: with_update(gradient.backward, name) for name in OPTIMIZERS}
        return replace(level, forward=gradient.forward, updates=updates)

    def _verified(
        self, program: Program, number: int, level: LevelGraphs
    ) -> tuple[LevelGraphs, dict[str, float]]:
        """Return the level with a step that is right, and its errors by optimizer."""
        errors = _errors(program, level)
        if any(math.isnan(error) for error in errors.values()):
            with selecting():
                level = self._derived(program, level)
            errors = _errors(program, level)
        for name, error in errors.items():
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"the derived step of level {number} under {name} differs from torch's by "
                    f"{error:.1e} (relative; at most {TOLERANCE:.0e})"
                )
        return level, errors


def _errors(program: Program, level: LevelGraphs) -> dict[str, float]:
    """How far a level's step is from torch's, by optimizer."""
    theta = starting_parameters(program, level)
    batches = random_batches(program, level, program.network.head.classes_in(theta))
    errors = worst(step_errors(level.body, theta, batches, TorchRunner(level)))
    if not all(error <= TOLERANCE for error in errors.values()):
        # One ReLU whose input is zero but for rounding does that. Or the derivation is wrong:
        # float64, which takes its time, knows.
        exact = _step_in_float64(level)
        exact_batches = [(doubled(features), labels) for features, labels in batches]
        errors = worst(step_errors(exact.body, doubled(theta), exact_batches, TorchRunner(exact)))
    return errors


def _step_in_float64(level: LevelGraphs) -> LevelGraphs:
    assert level.forward is not None
    return LevelGraphs(
        in_float64(level.body),
        forward=in_float64(level.forward),
        updates={name: in_float64(graph) for name, graph in level.updates.items()},
    )


def same(one: GraphModule, other: GraphModule) -> bool:
    """Whether two graphs compute the same: their text and their tensors are equal."""
    if graph_text("", one) != graph_text("", other):
        return False
    return all(
        get_tensor(one, name) is get_tensor(other, name)
        or torch.equal(get_tensor(one, name), get_tensor(other, name))
        for name in tensor_names(one)
    )
