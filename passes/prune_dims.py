"""Make the proxies by slicing along independent dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pbc.ir.dim_rules import dims_of
from pbc.ir.dims import Dims
from pbc.ir.levels import Keep, LevelGraphs, LevelPlan
from pbc.ir.program import Program
from pbc.ir.slice_graph import slice_graph
from pbc.proxies import importance
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

    importance: the criterion that says which indices stay, of `pbc.proxies.importance.CRITERIA`.
    """

    importance: str = importance.MAGNITUDE
    stage: ClassVar[str] = "prune"

    def __post_init__(self) -> None:
        """Refuse a criterion that there is not."""
        importance.require(self.importance)

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        if not program.plans:
            return program
        dims, levels = dims_of(program), list(program.levels)
        scores = importance.scores(program, dims, self.importance)
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


def largest(score: Tensor, count: int, among: list[int] | None) -> list[int]:
    """The `count` indices of the largest scores, ascending, chosen among the given ones."""
    candidates = torch.arange(len(score)) if among is None else torch.tensor(among)
    best = score[candidates].topk(count).indices
    return sorted(int(index) for index in candidates[best])
