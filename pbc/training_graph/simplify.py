"""Simplify: a traced gradient loses what means something to torch alone, and needless copies."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pbc.ir.graph import placeholders

aten = torch.ops.aten

ONLY_FOR_AUTOGRAD = frozenset(
    (aten.alias.default, aten.detach.default, aten.detach_.default, aten.clone.default)
)
"""Operators whose result is their argument."""


def simplify(joint: GraphModule) -> None:
    """Rewrite the graph in place; what it computes stays."""
    for rewrite in (_tidy, _take_sizes_from_inputs, _leave_broadcasts_to_operators):
        rewrite(joint)
        joint.graph.eliminate_dead_code()
        joint.recompile()


def _tidy(joint: GraphModule) -> None:
    """Drop what only means something to autograd, and let every view be a reshape."""
    for node in list(joint.graph.nodes):
        if node.target in ONLY_FOR_AUTOGRAD:
            node.replace_all_uses_with(node.args[0])
            joint.graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def _take_sizes_from_inputs(joint: GraphModule) -> None:
    """Let no tensor be kept for its size, and no size be computed that a reshape can do without."""
    sizes: dict[Any, Node] = {}
    inputs = placeholders(joint)
    with joint.graph.inserting_after(inputs[-1]):
        for node in inputs:
            for axis, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr not in sizes:
                    read = joint.graph.call_function(aten.sym_size.int, (node, axis))
                    read.meta["val"] = size
                    sizes[size.node.expr] = read
    for node in list(joint.graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and node not in sizes.values():
            count, symbol = value.node.expr.as_coeff_Mul()
            if symbol not in sizes:
                continue
            if count == 1:
                node.replace_all_uses_with(sizes[symbol])
            else:
                node.target, node.args, node.kwargs = operator.mul, (sizes[symbol], int(count)), {}
        elif node.target == aten.reshape.default:
            shape = list(node.args[1])
            if sum(isinstance(size, Node) for size in shape) == 1 and -1 not in shape:
                shape = [-1 if isinstance(size, Node) else size for size in shape]
                node.args = (node.args[0], shape)


# Operators that repeat what is smaller by themselves.
_BROADCASTING = frozenset(
    (aten.add.Tensor, aten.div.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Scalar)
)


def _leave_broadcasts_to_operators(joint: GraphModule) -> None:
    """Let no copies be made for an operator that would read one value several times as well."""
    waiting = [node for node in joint.graph.nodes if node.target == aten.expand.default]
    while waiting:
        wide = waiting.pop()
        small, size = wide.args[0], wide.meta["val"].shape
        for user in list(wide.users):
            if user.target not in _BROADCASTING or user.meta["val"].shape != size:
                continue
            others = [a for a in user.args if a is not wide and isinstance(a, Node)]
            if any(_shape(other) == size for other in others):
                user.replace_input_with(wide, small)
            elif not any(_shape(other) for other in others):
                # By a number: it can be done before.
                with joint.graph.inserting_before(user):
                    swapped = [small if argument is wide else argument for argument in user.args]
                    early = joint.graph.call_function(user.target, tuple(swapped), user.kwargs)
                    early.meta["val"] = _value(early)
                    late = joint.graph.call_function(aten.expand.default, (early, wide.args[1]))
                late.meta = dict(user.meta)
                user.replace_all_uses_with(late)
                joint.graph.erase_node(user)
                waiting.append(late)


def _shape(node: Node) -> Any:
    """The shape of a tensor; empty for a number."""
    value = node.meta["val"]
    return value.shape if isinstance(value, Tensor) else ()


def _value(node: Node) -> Any:
    """The result of a node, as a fake tensor."""
    args = torch.fx.map_arg(node.args, lambda source: source.meta["val"])
    kwargs = torch.fx.map_arg(node.kwargs, lambda source: source.meta["val"])
    with next(a.fake_mode for a in args if isinstance(a, Tensor)):  # type: ignore[attr-defined]
        return node.target(*args, **kwargs)  # type: ignore[operator]
