"""Select channels: a layer whose weight trains in part becomes one operator with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from pbc.ir.rewrite import copy_graph
from pbc.training_graph.decompositions.selected_channels import selected_conv2d, selected_linear

aten = torch.ops.aten

_LAYERS = {aten.conv2d.default: selected_conv2d, aten.linear.default: selected_linear}


def select_channels(body: GraphModule) -> GraphModule:
    """Return a copy in which layers take the parts of such a weight, before it is differentiated.

    Before::

        %index_copy = index_copy(@frozen, 1, @index, θ[…])
        %conv2d = conv2d(%x, %index_copy, %bias, …)

    After::

        %conv2d = selected_conv2d([@frozen, 1, @index, θ[…]], %x, %bias, …)

    Only along input channels and, of a depthwise convolution, along its channels: elsewhere the
    whole weight has a gradient, of which θ's is read.
    """
    graph = copy_graph(body)
    for node in list(graph.graph.nodes):
        if node.target in _LAYERS and _is_selected(node):
            x, weight, *rest = node.args
            with graph.graph.inserting_before(node):
                layer = graph.graph.call_function(
                    _LAYERS[node.target], (weight.args, x, *rest), node.kwargs
                )
            layer.meta = dict(node.meta)
            node.replace_all_uses_with(layer)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _is_selected(layer: Node) -> bool:
    weight: Any = layer.args[1]
    if weight.op != "call_function" or weight.target != aten.index_copy.default:
        return False
    groups = layer.args[6] if len(layer.args) > 6 else layer.kwargs.get("groups", 1)
    depthwise = groups == weight.meta["val"].shape[0] and weight.meta["val"].shape[1] == 1
    return bool(weight.args[1] == 1 if groups == 1 else weight.args[1] == 0 and depthwise)
