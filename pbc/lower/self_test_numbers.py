"""Numbers that the self-test must find on the device: torch's, from the graphs of the program.

The engine's own results would do on a machine of the target's architecture only, and would agree
with themselves where the lowering is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbc.bundle.ladder import ALIGNED, FLOAT32
from pbc.data import InputSpec
from pbc.ir.graph import graph_inputs
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Policy, Program
from pbc.runtime import self_test
from pbc.runtime.parameters import with_head

# Of what one step changes. A neighbouring level's files in the place of the right ones are off by
# several times these; docs/deploy.md has the measurements.
TOLERANCE = 0.02
# Rounding to few bits falls to one side on one CPU and to the other on another.
ROUNDED_TOLERANCE = 0.15
_POLICY_TOLERANCE = 2e-3
# The share of the loss that a step takes away, to first order.
_DROP = 0.2
# A number that depends on the order of a sum is no reason for other bytes of the bundle.
_DIGITS = 6


def numbers(program: Program, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest's `self_test`: level 0 and the cheapest level that is used."""
    spec = InputSpec.from_json(manifest["input"])
    stored = {name: value.detach().numpy() for name, value in program.parameters.items()}
    classes = self_test.classes_of(manifest)
    theta = with_head(manifest, stored, classes, self_test.SEED)
    images = torch.from_numpy(np.ascontiguousarray(self_test.images(spec)))
    labels = torch.from_numpy(self_test.labels(classes))
    costs = {n: level.cost for n, level in enumerate(program.levels) if level.status == ALIGNED}
    cheapest = min(costs, key=lambda number: costs[number]) if costs else 0
    levels = {
        str(number): _level(program.levels[number], images, theta, labels)
        for number in sorted({0, cheapest})
    }
    return {"levels": levels, "policy": _policy(program.policy, manifest)}


def _level(
    level: LevelGraphs,
    images: Tensor,
    parameters: Mapping[str, np.ndarray],
    labels: Tensor,
) -> dict[str, Any]:
    graph = level.body
    with torch.no_grad():
        features = level.features(images)
    names = [name for name in graph_inputs(graph) if name not in features]
    theta = {name: torch.tensor(parameters[name], requires_grad=True) for name in names}

    def losses() -> Tensor:
        inputs = {**features, **theta}
        (logits,) = graph(*[inputs[name] for name in graph_inputs(graph)])
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    before = losses()
    gradients = torch.autograd.grad(before.mean(), list(theta.values()), allow_unused=True)
    square = sum(float(g.square().sum()) for g in gradients if g is not None)
    rate = _rounded(_DROP * float(before.mean().detach()) / square)
    with torch.no_grad():
        for value, gradient in zip(theta.values(), gradients, strict=True):
            if gradient is not None:
                value -= rate * gradient
        after = losses()
    rounded = level.precision != FLOAT32
    return {
        "learning_rate": rate,
        "before": [_rounded(loss) for loss in before.tolist()],
        "after": [_rounded(loss) for loss in after.tolist()],
        "tolerance": ROUNDED_TOLERANCE if rounded else TOLERANCE,
    }


def _policy(policy: Policy | None, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    if policy is None:
        return None
    views = torch.from_numpy(self_test.views(manifest["policy"]["view"]))
    with torch.no_grad():
        (fidelity,) = policy.graph(views)
    rows = [[_rounded(value) for value in row] for row in fidelity.tolist()]
    return {"fidelity": rows, "tolerance": _POLICY_TOLERANCE}


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
