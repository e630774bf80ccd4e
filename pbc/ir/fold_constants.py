"""Constants fold: what depends on frozen tensors alone is computed once, at compile time.

Before::

    %mul = mul(@conv.parametrizations.weight.original1, %norm)
    %conv2d = conv2d(%x, %mul)

After, with the product in `folded.mul`::

    %conv2d = conv2d(%x, @folded.mul)
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node

from pbc.ir.graph import get_tensor, put_tensor, tensor_names

FOLDED = "folded"
"""The module that folded tensors are put into, each under the name of its operator."""

# A tensor may grow to this, or to twice what it was made of: a table of positions that is looked
# up, yes; a bias repeated for every pixel, no.
LARGEST_BYTES = 4 * 2**20

aten = torch.ops.aten

# Other views of a tensor; they cost nothing, and without them it would lose its name.
_VIEWS = frozenset(
    (
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.detach.default,
        operator.getitem,
    )
)
# Precisions are the engine's business, level by level.
_KEPT = _VIEWS | {aten._to_copy.default, aten.to.dtype}


def fold_constants(graph: GraphModule, trainable: Collection[str]) -> GraphModule:
    """Compute what depends on neither the image nor a parameter of `trainable`.

    Tensors that are equal are stored once. Views and casts of a frozen tensor stay, and so does
    what would be much larger than what it is made of (LARGEST_BYTES). Returns the graph itself
    where nothing folds.
    """
    constants = _constants(graph, trainable)
    ends = [node for node in constants if _ends(node, constants)]
    if not ends:
        return graph
    values = _Values(graph, constants)
    values.compute()
    stored: dict[str, str] = {}
    folded: dict[str, Tensor] = {}
    new = Graph()
    copies: dict[Node, Node] = {}
    for node in graph.graph.nodes:
        if node in ends:
            value = values.env[node].contiguous()
            title = stored.setdefault(_digest(value), f"{FOLDED}.{node.name}")
            folded.setdefault(title, value)
            copies[node] = new.get_attr(title)
            copies[node].meta = dict(node.meta)
        else:
            copies[node] = new.node_copy(node, lambda old: copies[old])
            copies[node].meta = dict(node.meta)
    return _with_tensors(graph, new, folded)


def _constants(graph: GraphModule, trainable: Collection[str]) -> dict[Node, int]:
    """Nodes that can be computed now, each with the bytes of the tensors that it is made of."""
    trained = {get_tensor(graph, n).data_ptr() for n in tensor_names(graph) if n in trainable}
    found: dict[Node, int] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            tensor = get_tensor(graph, str(node.target))
            if node.target not in trainable and tensor.data_ptr() not in trained:
                found[node] = tensor.nbytes
        elif (
            node.op == "call_function"
            and all(n in found for n in node.all_input_nodes)
            and not _is_complex(node)
        ):
            made_of_bytes = sum(found[source] for source in set(node.all_input_nodes))
            if _bytes(node) <= max(2 * made_of_bytes, LARGEST_BYTES):
                found[node] = made_of_bytes
    return found


def _is_complex(node: Node) -> bool:
    """Whether it makes complex numbers, which no file of tensors holds."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _bytes(node: Node) -> float:
    values = node.meta.get("val")
    parts = values if isinstance(values, (tuple, list)) else [values]
    total = 0.0
    for part in parts:
        if not isinstance(part, Tensor) or any(isinstance(n, torch.SymInt) for n in part.shape):
            return float("inf")
        total += part.numel() * part.element_size()
    return total


def _ends(node: Node, constants: Collection[Node]) -> bool:
    """Whether a constant is computed, and read by something that is none."""
    if node.op != "call_function" or not isinstance(node.meta["val"], Tensor):
        return False
    if node.target is aten.expand.default or _is_view(node):
        return False
    return any(user not in constants or user.target is aten.expand.default for user in node.users)


def _is_view(node: Node) -> bool:
    """Whether nothing but views and casts leads here from one frozen tensor."""
    while node.op == "call_function" and node.target in _KEPT:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


class _Values(Interpreter):
    """Computes the constants of a graph and keeps them."""

    def __init__(self, graph: GraphModule, constants: Collection[Node]) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self._constants = constants

    def compute(self) -> None:
        with torch.no_grad():
            for node in self._constants:
                self.env[node] = self.run_node(node)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().get_attr(target, args, kwargs).detach()


def _digest(value: Tensor) -> str:
    content = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else b""
    described = f"{value.dtype} {tuple(value.shape)} ".encode()
    return hashlib.sha256(described + bytes(content)).hexdigest()


def _with_tensors(graph: GraphModule, new: Graph, folded: dict[str, Tensor]) -> GraphModule:
    """A module of the new graph and the tensors that it reads."""
    root = nn.Module()
    for node in reversed(list(new.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            new.erase_node(node)
    for node in new.nodes:
        if node.op == "get_attr":
            title = str(node.target)
            put_tensor(root, title, folded[title] if title in folded else get_tensor(graph, title))
    return GraphModule(root, new)
