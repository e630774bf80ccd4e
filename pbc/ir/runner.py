"""Running a level's graphs by name, whatever runs them: torch here, or an engine as on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.fx import Interpreter

from pbc.bundle.graph_name import GraphName
from pbc.ir.graph import graph_inputs, graph_outputs
from pbc.ir.levels import LevelGraphs

Values = Mapping[str, Any]
"""Arrays, or an engine's own tensors, by the names that graphs have for them."""


class Runner(Protocol):
    """Runs the graphs of one level by their roles."""

    def inputs(self, role: GraphName) -> Sequence[str]:
        """Return the names of the graph's inputs."""

    def run(self, role: GraphName, values: Values) -> dict[str, Any]:
        """Feed a graph what it reads of these values; return what it computes, by name.

        What it returns may be fed to another graph of the level; `tensor` reads it.
        """


class _Interpreter(Interpreter):
    """Gives a kernel of torch's alone the copy that it needs and that no graph has."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.native_group_norm.default:
            args = (args[0].contiguous(), *args[1:])
        return super().call_function(target, args, kwargs)


class TorchRunner:
    """Runs the graphs themselves, in torch, without gradients."""

    def __init__(self, level: LevelGraphs) -> None:
        self._graphs = level.graphs

    def inputs(self, role: GraphName) -> list[str]:
        return graph_inputs(self._graphs[role])

    def run(self, role: GraphName, values: Values) -> dict[str, Any]:
        graph = self._graphs[role]
        with torch.no_grad():
            results = _Interpreter(graph).run(*[tensor(values[n]) for n in graph_inputs(graph)])
        return dict(zip(graph_outputs(graph), results, strict=True))


class InFloat32:
    """Has a runner compute in float32 what is given and wanted in float64."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def inputs(self, role: GraphName) -> Sequence[str]:
        return self._runner.inputs(role)

    def run(self, role: GraphName, values: Values) -> dict[str, Any]:
        single = {
            name: value.astype(np.float32) if value.dtype == np.float64 else value
            for name, value in values.items()
        }
        found = {name: tensor(value) for name, value in self._runner.run(role, single).items()}
        return {n: v.double() if v.dtype == torch.float32 else v for n, v in found.items()}


def tensor(value: Any) -> Tensor:
    """Return an array, or an engine's tensor, as torch's, in the same memory where that can be."""
    if isinstance(value, Tensor):
        return value.detach()
    return torch.as_tensor(value if isinstance(value, np.ndarray) else value.numpy())
