"""Masks: weights of which some elements are zero, and stay so while the others train."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule

from pbc.ir.graph import get_tensor, put_tensor
from pbc.ir.rewrite import copy_graph

aten = torch.ops.aten

_KEPT = "_kept"


def with_masks(graph: GraphModule, kept: Mapping[str, Tensor]) -> GraphModule:
    """Return the graph with some weights multiplied by zero or one.

    kept: of each weight, which elements stay, like it.

    Before::

        %conv2d = conv2d(%x, @conv1.weight)

    After::

        %mul = mul(@conv1.weight, @conv1.weight_kept)
        %conv2d = conv2d(%x, %mul)
    """
    graph = copy_graph(graph)
    for name, mask in kept.items():
        put_tensor(graph, f"{name}{_KEPT}", mask.float())
        reads = [n for n in graph.graph.nodes if n.op == "get_attr" and n.target == name]
        with graph.graph.inserting_before(reads[0]):
            weight = graph.graph.get_attr(name)
            mul = graph.graph.call_function(
                aten.mul.Tensor, (weight, graph.graph.get_attr(f"{name}{_KEPT}"))
            )
        for read in reads:
            read.replace_all_uses_with(mul)
            graph.graph.erase_node(read)
    graph.recompile()
    return graph


def masked(graph: GraphModule, names: Collection[str]) -> dict[str, Tensor]:
    """Return the weights that a graph with masks stands for; their zeros are positive ones."""
    return {
        name: get_tensor(graph, name).detach().where(get_tensor(graph, f"{name}{_KEPT}") != 0, 0.0)
        for name in names
    }
