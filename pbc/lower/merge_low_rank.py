"""Merge a low-rank branch into the layer that it corrects, for whoever trains it no further."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from pbc.ir.graph import PARAMETER
from pbc.ir.rewrite import copy_graph, drop_unused

aten = torch.ops.aten

_LAYERS = (aten.conv2d.default, aten.linear.default)


def merge_low_rank(graph: GraphModule) -> GraphModule:
    """Return a graph in which y = W x + up(down(x)), up and down trained, is (W + up·down) x.

    The sum is of weights alone, so that whatever runs the graph works it out once. Without such a
    branch it is the graph itself.
    """
    merged = copy_graph(graph)
    found = [node for node in merged.graph.nodes if _merge(merged, node)]
    drop_unused(merged)
    return merged if found else graph


def _merge(graph: GraphModule, total: Node) -> bool:
    """Merge the branch that this sum adds to a layer, if it is one."""
    if total.target != aten.add.Tensor or total.kwargs:
        return False
    for layer, up in (total.args, total.args[::-1]):
        if not isinstance(layer, Node) or not isinstance(up, Node) or not _is_alone(layer):
            continue
        if not _is_trained(up, layer):
            continue
        down = up.args[0]
        if not isinstance(down, Node) or not _is_trained(down, layer):
            continue
        if down.args[0] is not layer.args[0]:
            continue
        with graph.graph.inserting_before(layer):
            weight = _merged(graph, layer.args[1], up.args[1], down.args[1])
        layer.update_arg(1, weight)
        total.replace_all_uses_with(layer)
        return True
    return False


def _is_alone(node: Node) -> bool:
    return node.target in _LAYERS and len(node.users) == 1


def _is_trained(node: Node, layer: Node) -> bool:
    """Whether it is a layer of the same kind without a bias, whose weight trains."""
    if not _is_alone(node) or node.target != layer.target or any(node.args[2:3]):
        return False
    weight = node.args[1]
    return isinstance(weight, Node) and PARAMETER in weight.meta


def _merged(graph: GraphModule, weight: Any, up: Any, down: Any) -> Node:
    def emit(op: Any, *args: Any) -> Node:
        node = graph.graph.call_function(op, args)
        values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
        with weight.meta["val"].fake_mode:
            node.meta["val"] = op(*values)
        return node

    rows, rank = up.meta["val"].shape[:2]
    flat = emit(
        aten.mm.default,
        emit(aten.reshape.default, up, [rows, rank]),
        emit(aten.reshape.default, down, [rank, down.meta["val"].shape[1]]),
    )
    shape = list(weight.meta["val"].shape)
    return emit(aten.add.Tensor, weight, emit(aten.reshape.default, flat, shape))
