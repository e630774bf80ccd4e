"""Emit the proxies by slicing along independent dimensions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pbc.ir.program import Program, body, prefix
from pbc.ir.slice_graph import emit
from pbc.proxies import importance
from pbc.proxies.resolution import reduced


@dataclass(frozen=True)
class PruneDims:
    """Add `prefix/k` and `body/k` of every planned level k.

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
        dims = program.dims
        assert dims is not None
        program = program.copy()
        scores = importance.scores(program, dims, self.importance)
        graphs = dict(program.graphs)
        plans: list[dict[str, list[int]]] = [{}]
        for level in range(1, len(program.sizes)):
            keep = {
                name: largest(scores[name], size, plans[-1].get(name))
                for name, size in program.sizes[level].items()
            }
            plans.append(keep)
            for kind in (prefix, body):
                if kind(0) in graphs:
                    graphs[kind(level)] = emit(graphs[kind(0)], dims, keep)
            resolution = program.ladder.resolution(level)
            if resolution is not None:
                graphs[prefix(level)] = reduced(graphs[prefix(level)], resolution)
        return replace(program, graphs=graphs, plan=tuple(plans))


def largest(score: Tensor, count: int, among: list[int] | None) -> list[int]:
    """The `count` indices of the largest scores, ascending, chosen among the given ones."""
    candidates = torch.arange(len(score)) if among is None else torch.tensor(among)
    best = score[candidates].topk(count).indices
    return sorted(int(index) for index in candidates[best])
