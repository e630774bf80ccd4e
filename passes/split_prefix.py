"""Split the frozen prefix from the body."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from pbc.ir.program import (
    MODEL,
    PARAMETER,
    Program,
    body,
    get_tensor,
    output_nodes,
    prefix,
    put_tensor,
    tensor_names,
)

PARAMETRIC = (
    "aten.conv2d.default",
    "aten.linear.default",
    "aten.scaled_dot_product_attention.default",
)


@dataclass(frozen=True)
class SplitPrefix:
    """Cut the model where the first trainable parameter is read.

    Before::

        graph model takes x, θ… does
          %relu = relu(%conv2d)
          %linear = linear(%relu, θ[fc.weight])

    After::

        graph prefix/0 takes x … returns %relu
        graph body/0 takes %relu, θ… does
          %linear = linear(%relu, θ[fc.weight])

    Makes no prefix (the body then takes x) when fewer than `least_share` of the layers come before
    anything trainable: sending what a stem puts out costs more than computing it again.
    """

    least_share: float = 0.05
    stage: ClassVar[str] = "mark"
    after: ClassVar[tuple[str, ...]] = ("mark-trainable",)

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        model = program.graphs.pop(MODEL)
        in_body = _reached_by_parameters(model)
        if self._share_before(model, in_body) < self.least_share:
            in_body = {node for node in model.graph.nodes if node.op == "call_function"}
        x = next(n for n in model.graph.nodes if n.op == "placeholder" and PARAMETER not in n.meta)
        in_prefix = _reached_from(x) - in_body
        cut = _border(model, in_prefix, in_body)
        # A feature has one row per sample, and what stacks the patches of all samples has not.
        batch = str(x.meta["val"].shape[0])
        while stacked := [n for n in cut if str(n.meta["val"].shape[0]) != batch]:
            in_body |= set(stacked)
            in_prefix -= set(stacked)
            cut = _border(model, in_prefix, in_body)
        graphs = dict(program.graphs)
        if any(node.op == "call_function" for node in cut):
            graphs[prefix(0)] = _subgraph(model, [x], in_prefix | {x}, cut)
        graphs[body(0)] = _subgraph(model, cut, in_body, output_nodes(model))
        return replace(program, graphs=graphs)

    def _share_before(self, model: GraphModule, in_body: set[Node]) -> float:
        layers = [n for n in model.graph.nodes if str(n.target) in PARAMETRIC]
        return sum(node not in in_body for node in layers) / max(len(layers), 1)


def _border(model: GraphModule, in_prefix: set[Node], in_body: set[Node]) -> list[Node]:
    """The tensors of the prefix that the body reads."""
    return [
        node
        for node in model.graph.nodes
        if node in in_prefix
        and isinstance(node.meta.get("val"), torch.Tensor)
        and any(user in in_body for user in node.users)
    ]


def _reached_by_parameters(model: GraphModule) -> set[Node]:
    reached: set[Node] = set()
    for node in model.graph.nodes:
        if node.op == "call_function" and any(
            PARAMETER in source.meta or source in reached for source in node.all_input_nodes
        ):
            reached.add(node)
    return reached


def _reached_from(x: Node) -> set[Node]:
    reached = {x}
    for node in x.graph.nodes:
        if node.op == "call_function" and any(s in reached for s in node.all_input_nodes):
            reached.add(node)
    return reached


def _subgraph(
    model: GraphModule, inputs: list[Node], inside: set[Node], outputs: list[Node]
) -> GraphModule:
    """The nodes `inside`, with `inputs` and the trainable parameters they read as placeholders.

    Nodes that depend on nothing but frozen tensors or the batch size are copied where they are
    used.
    """
    graph = Graph()
    values: dict[Node, Node] = {}

    def take(node: Node) -> Node:
        """The copy of a node, made now (in an order that respects its inputs) if need be."""
        if node not in values:
            if node.target is torch.ops.aten.sym_size.int and node not in inside:
                # The batch axis of an input that this graph does not have: any feature's will do.
                values[node] = graph.call_function(node.target, (values[inputs[0]], node.args[1]))
            else:
                values[node] = graph.node_copy(node, take)
            values[node].meta = dict(node.meta)
        return values[node]

    for node in inputs:
        values[node] = graph.placeholder(node.name)
        values[node].name = node.name
        values[node].meta = {"val": node.meta["val"]}
    for node in model.graph.nodes:
        if PARAMETER in node.meta and any(user in inside for user in node.users):
            take(node)
    for node in model.graph.nodes:
        if node in inside:
            take(node)
    graph.output(tuple(take(node) for node in outputs))
    root = torch.nn.Module()
    for name in tensor_names(model):
        if any(node.op == "get_attr" and node.target == name for node in graph.nodes):
            put_tensor(root, name, get_tensor(model, name))
    return GraphModule(root, graph)
