"""Verify lowered prefixes and bodies against torch's graphs, on the example images."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from pbc.bundle.graph_name import BODY, PREFIX, GraphName
from pbc.bundle.ladder import BFLOAT16, FLOAT32, INT8
from pbc.ir.graph import graph_inputs, graph_outputs
from pbc.ir.levels import IMAGES, LevelGraphs
from pbc.ir.program import Program
from pbc.ir.rewrite import in_float64
from pbc.ir.runner import InFloat32, Runner, tensor
from pbc.proxies.fidelity import dtype_of, precision_of
from pbc.proxies.quantization import unrounded
from pbc.training_graph.step_check import doubled, starting_parameters

USUAL = {FLOAT32: 1e-4, BFLOAT16: 5e-2, INT8: 5e-2}
"""The error that rounding makes, by the precision that a graph computes in."""

MOST = 1e-2
"""The largest error of float32 that is not a wrong graph, or rounding that the network amplifies.

`graph_error_beside_float64` tells these two apart.
"""

# Who rounds the last bit otherwise, rounds some values to their other neighbour, and behind a few
# layers all: two such results are as far apart as two independent errors of this size, √2 times it.
_INDEPENDENT = 2.0


def bound(program: Program, level: LevelGraphs, role: GraphName) -> float:
    """Return the largest error that is not a wrong graph.

    In fewer bits than float32's that is what the level's own rounding makes: how far torch's
    results are from those of the same graph, with the same weights and ranges, unrounded.
    """
    precision = precision_of(program.levels[0], role, level.precision)
    if precision == FLOAT32:
        return MOST
    images, _ = _batches(program.network.example)
    values: dict[str, Tensor] = {IMAGES: images, **starting_parameters(program, level)}
    if role != PREFIX and level.prefix is not None:
        values |= _in_torch(program, level, PREFIX, values)
    own = _in_torch(program, level, role, values)
    exact = _run(unrounded(level.fused().graphs[role]), values, torch.float32)
    rounding = [_relative(value, exact[name], precision) for name, value in own.items()]
    return max(MOST, _INDEPENDENT * max(rounding))


def graph_errors(program: Program, level: LevelGraphs, runner: Runner) -> dict[GraphName, float]:
    """Return by role how far the lowered prefix and body are from torch's.

    Each reads what torch's would, in batches of two and of three. An output's error is its largest
    difference against its largest value. In fewer bits than float32's it is the root of the mean
    square of either: there, a few of thousands of values are rounded to their neighbours.
    """
    values = {IMAGES: program.network.example, **starting_parameters(program, level)}
    return _errors(program, level, runner, values)


def graph_error_beside_float64(
    program: Program, level: LevelGraphs, role: GraphName, runner: Runner
) -> float:
    """Return how far a lowered graph is from torch's in float64, as `graph_errors` counts it.

    role: of a graph that computes in float32.
    """
    exact = replace(level, body=in_float64(level.body))
    if level.prefix is not None and _is_float32(program, level, PREFIX):
        exact = replace(exact, prefix=in_float64(level.prefix))
    values = {IMAGES: program.network.example, **starting_parameters(program, level)}
    return _errors(program, exact, InFloat32(runner), doubled(values), [role])[role]


def _errors(
    program: Program,
    level: LevelGraphs,
    runner: Runner,
    given: Mapping[str, Tensor],
    roles: Collection[GraphName] = (PREFIX, BODY),
) -> dict[GraphName, float]:
    """The largest errors of some of the graphs, by role.

    level: with the graphs that say what is right. given: images and θ.
    """
    found: dict[GraphName, float] = {}
    for images in _batches(given[IMAGES]):
        values = {**given, IMAGES: images}
        for role in (PREFIX, BODY):
            if role not in level.graphs:
                continue
            expected = _in_torch(program, level, role, values)
            if role in roles:
                arrays = {name: value.detach().numpy() for name, value in values.items()}
                got = runner.run(role, arrays)
                precision = precision_of(program.levels[0], role, level.precision)
                errors = [found.get(role, 0.0)]
                errors += [_relative(tensor(got[n]), v, precision) for n, v in expected.items()]
                found[role] = max(errors, key=lambda error: (math.isnan(error), error))
            values |= expected
    return found


def _batches(images: Tensor) -> tuple[Tensor, Tensor]:
    """Two and three samples: no batch size is special."""
    two = images[:2] if len(images) > 1 else torch.cat([images, -images])
    return two, torch.cat([two, two.mean(0, keepdim=True)])


def _is_float32(program: Program, level: LevelGraphs, role: GraphName) -> bool:
    return precision_of(program.levels[0], role, level.precision) == FLOAT32


def _in_torch(
    program: Program, level: LevelGraphs, role: GraphName, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A graph's results; those of one in float32 are in the images' type, float32 or float64."""
    graph = level.graphs[role]
    if _is_float32(program, level, role):
        return _run(graph, values, values[IMAGES].dtype)
    dtype = dtype_of(precision_of(program.levels[0], role, level.precision))
    if dtype != torch.float32:  # what is rounded has batch norms fused already
        graph = copy.deepcopy(level.fused().graphs[role]).to(dtype)
    return _run(graph, values, dtype)


def _run(graph: GraphModule, values: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    with torch.no_grad():
        results = graph(*[values[name].to(dtype) for name in graph_inputs(graph)])
    kept = torch.promote_types(dtype, torch.float32)
    return {n: value.to(kept) for n, value in zip(graph_outputs(graph), results, strict=True)}


def _relative(value: Tensor, expected: Tensor, precision: str) -> float:
    if value.shape != expected.shape:
        return math.nan
    finite = expected.isfinite()
    order = math.inf if precision == FLOAT32 else 2
    value, expected = value[finite].double(), expected[finite].double()
    difference = torch.linalg.vector_norm(value - expected, order)
    return float(difference / torch.linalg.vector_norm(expected, order).clamp_min(1e-6))
