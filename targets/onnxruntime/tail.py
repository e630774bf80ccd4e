"""The end of a graph of updates, written as ONNX nodes: what is before it is exported once for all.

Behind the backward that all optimizers share stands the arithmetic of one: many small nodes, which
the exporter takes as long for as for anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pbc.ir.graph import get_tensor, output_nodes, placeholders, put_tensor, tensor_names

aten = torch.ops.aten

_OPERATORS: Mapping[Any, str] = MappingProxyType(
    {
        aten.add.Tensor: "Add",
        aten.div.Tensor: "Div",
        aten.mul.Tensor: "Mul",
        aten.reshape.default: "Reshape",
        aten.sqrt.default: "Sqrt",
        aten.sub.Tensor: "Sub",
    }
)


@dataclass(frozen=True)
class Cut:
    """A graph in two. head: a graph of its own; returns what the tail reads, `read`, in order."""

    head: GraphModule
    read: tuple[Node, ...]
    tail: tuple[Node, ...]


def cut(graph: GraphModule) -> Cut | None:
    """Cut off the arithmetic at the end of a graph; None where a result comes from before it."""
    tail: set[Node] = set()
    for node in reversed(graph.graph.nodes):
        if all(user.op == "output" or user in tail for user in node.users) and _is_simple(node):
            tail.add(node)
    results = output_nodes(graph)
    if not tail.issuperset(results) or len(set(results)) < len(results):
        return None
    before = [node for node in graph.graph.nodes if node not in tail and node.op != "output"]
    of_tail = {source for node in tail for source in node.all_input_nodes}
    read = tuple(node for node in before if node in of_tail and node.op != "placeholder")
    ordered = tuple(node for node in graph.graph.nodes if node in tail)
    return Cut(_head(graph, before, read), read, ordered) if read else None


def _is_simple(node: Node) -> bool:
    """Whether it computes float32 of float32 by an operator that ONNX has under another name."""
    if node.target not in _OPERATORS or node.kwargs or not _is_real(node):
        return False
    tensors = [a for a in node.args if isinstance(a, Node)]
    if any(source.op == "get_attr" or not _is_real(source) for source in tensors):
        return False
    if node.target == aten.reshape.default:
        shape = node.args[1]
        return isinstance(shape, (list, tuple)) and all(isinstance(size, int) for size in shape)
    return all(isinstance(a, (Node, int, float)) for a in node.args)


def _is_real(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _head(graph: GraphModule, before: Sequence[Node], read: Sequence[Node]) -> GraphModule:
    """The nodes before the tail as a graph, with the inputs that these read."""
    head, root = Graph(), torch.nn.Module()
    for name in tensor_names(graph):
        put_tensor(root, name, get_tensor(graph, name))
    needed = {source for node in before for source in node.all_input_nodes}
    values: dict[Node, Node] = {}
    for node in before:
        if node.op != "placeholder" or node in needed:
            values[node] = head.node_copy(node, lambda old: values[old])
            values[node].meta = dict(node.meta)
    head.output(tuple(values[node] for node in read))
    return GraphModule(root, head)


def append(exported: ModelProto, graph: GraphModule, parts: Cut) -> ModelProto:
    """Return the model of the whole graph: that of the head, and a node for each of the tail.

    Its inputs are the graph's, then the frozen tensors, by names that mean nothing.
    """
    model = ModelProto()
    model.CopyFrom(exported)
    inside, given = model.graph, list(model.graph.input)
    known = {node.name: value for node, value in zip(placeholders(parts.head), given, strict=False)}
    frozen = given[len(known) :]
    sizes = {
        str(size): dimension.dim_param
        for node in placeholders(parts.head)
        for size, dimension in zip(
            node.meta["val"].shape, known[node.name].type.tensor_type.shape.dim, strict=True
        )
        if isinstance(size, torch.SymInt)
    }

    def described(node: Node, name: str) -> Any:
        shape = [
            sizes.get(str(size), f"size_{size}") if isinstance(size, torch.SymInt) else size
            for size in node.meta["val"].shape
        ]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    values = {node: out.name for node, out in zip(parts.read, inside.output, strict=True)}
    inputs = []
    for node in placeholders(graph):
        inputs.append(known.get(node.name) or described(node, f"tail/{node.name}"))
        values[node] = inputs[-1].name
    for node in parts.tail:
        values[node] = f"tail/{node.name}"
        names = []
        for place, argument in enumerate(node.args):
            if isinstance(argument, Node):
                names.append(values[argument])
                continue
            names.append(f"{values[node]}/{place}")
            dtype = np.int64 if node.target == aten.reshape.default else np.float32
            inside.initializer.append(numpy_helper.from_array(np.array(argument, dtype), names[-1]))
        inside.node.append(
            helper.make_node(_OPERATORS[node.target], names, [values[node]], name=values[node])
        )
    for field in ("input", "output"):
        inside.ClearField(field)
    inside.input.extend([*inputs, *frozen])
    inside.output.extend(described(node, values[node]) for node in output_nodes(graph))
    return model
