"""Make the proxies by slicing along independent dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pbc.ir.dim_rules import dims_of
from pbc.ir.dims import Dims, atoms
from pbc.ir.graph import get_tensor, tensor_names
from pbc.ir.levels import Keep, LevelGraphs, LevelPlan
from pbc.ir.program import Program
from pbc.ir.slice_graph import slice_graph
from pbc.proxies.resolution import reduced


@dataclass(frozen=True)
class PruneDims:
    """Make the level of every plan, from the graphs of level 0.

    Before, at level 0::

        %conv2d: [b, 64, 8, 8] = conv2d(%x, @conv1.weight)

    After, at a level whose plan keeps 32 of the 64 channels (conv1.weight is sliced)::

        %conv2d: [b, 32, 8, 8] = conv2d(%x, @conv1.weight)

    The indices of a level are among those of the level before it, so that a proxy can start from
    its aligned neighbour. Node names, inputs and outputs stay as they are at level 0; a level of a
    lower resolution begins with a node that reduces the images. Does nothing when only level 0 is
    planned.
    """

    stage: ClassVar[str] = "prune"

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        if not program.plans:
            return program
        dims, levels = dims_of(program), list(program.levels)
        scores = magnitude(levels[0], dims)
        for plan in program.plans:
            levels.append(proxy(levels[0], plan, dims, nested(plan, levels[-1].keep, scores)))
        return replace(program, levels=tuple(levels), plans=())


def nested(plan: LevelPlan, above: Keep, scores: Mapping[str, Tensor]) -> Keep:
    """Return the best indices of a plan's size, among those that the level above keeps."""
    return {name: largest(scores[name], size, above.get(name)) for name, size in plan.sizes.items()}


def proxy(original: LevelGraphs, plan: LevelPlan, dims: Dims, keep: Keep) -> LevelGraphs:
    """Return the level that keeps these indices."""
    prefix = None if original.prefix is None else slice_graph(original.prefix, dims, keep)
    if prefix is not None and plan.resolution is not None:
        prefix = reduced(prefix, plan.resolution)
    return LevelGraphs(
        body=slice_graph(original.body, dims, keep),
        prefix=prefix,
        keep=keep,
        cost=plan.cost,
        macs=plan.macs,
        precision=plan.precision,
        resolution=plan.resolution,
    )


def magnitude(original: LevelGraphs, dims: Dims) -> dict[str, Tensor]:
    """Importance of every index of every independent dimension, float32 [size].

    The squared norm of the weights that belong to an index, summed over the matrices and kernels
    that share the dimension, each tensor's norms first divided by their mean (DepGraph, Fang et
    al., CVPR 2023, «group-level importance»; Torch-Pruning's GroupMagnitudeImportance).
    """
    tensors = {
        name: get_tensor(graph, name) for graph in original.frozen for name in tensor_names(graph)
    }
    scores = {}
    for dimension in dims.independent():
        score = torch.zeros(dimension.size)
        for slot in dimension.slots:
            tensor = tensors[slot.tensor]
            if tensor.dim() < 2:
                continue
            parts = [variable.size for variable in atoms(dims.tensors[slot.tensor][slot.axis])]
            by_index = tensor.detach().float().square().movedim(slot.axis, 0)
            by_index = by_index.reshape(*parts, -1).movedim(slot.part, 0)
            norms = by_index.reshape(dimension.size, -1).sum(1)
            score += norms / norms.mean().clamp_min(1e-12)
        scores[dimension.name] = score
    return scores


def largest(score: Tensor, count: int, among: list[int] | None) -> list[int]:
    """The `count` indices of the largest scores, ascending, chosen among the given ones."""
    candidates = torch.arange(len(score)) if among is None else torch.tensor(among)
    best = score[candidates].topk(count).indices
    return sorted(int(index) for index in candidates[best])
