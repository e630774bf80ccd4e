"""Partition a traced training step where its loss is known: a forward, and a backward.

Between them lies what the backward reads of the forward's values. It is saved, unless recomputing
it costs less than the memory traffic, or unless what is read of it is smaller: of a ReLU that no
trained weight meets, the mask alone.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from math import inf, prod

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pbc.ir.graph import GRADIENT, NAME, PARAMETER, get_tensor, output_node, put_tensor, shape_of
from pbc.ir.rewrite import ancestors
from pbc.training_graph.names import LOGITS, LOSS, LOSSES, SAVED

aten = torch.ops.aten

# A tensor that one of these makes of another is recomputed instead of kept: engines do it
# for nothing, or for less than the memory traffic.
_RECOMPUTED = frozenset(
    (
        aten.detach.default,
        aten.expand.default,
        aten.permute.default,
        aten.reshape.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
    )
)


def partition(
    joint: GraphModule, parameters: Sequence[str], names: Mapping[Node, str]
) -> tuple[GraphModule, GraphModule]:
    """Split into what the loss needs, and what only the gradients need.

    joint: returns loss, losses, logits, and the gradients of `parameters`. names: of its inputs.
    """
    results: list[Node] = list(output_node(joint).args[0])  # type: ignore[arg-type]
    answers, gradients = results[:3], results[3:]
    first = ancestors(answers)
    # Whoever computes several results computes those, too, that the backward alone reads.
    first |= {n for n in joint.graph.nodes if n.target is operator.getitem and n.args[0] in first}
    second = ancestors(gradients) - first
    smaller = _smaller(second, first)
    first, second = first | smaller, second - smaller
    saved = _saved(second, first)
    names = {**names} | {node: node.name for node in saved}
    forward = _part(joint, first, [], answers + saved, names)
    output_node(forward).meta[NAME] = [LOSS, LOSSES, LOGITS] + [SAVED + n.name for n in saved]
    for node in second:
        node.meta[GRADIENT] = True
    recomputed = _recomputed(second, first)
    backward = _part(joint, second | recomputed, saved, gradients, names, late=recomputed)
    output_node(backward).meta[NAME] = list(parameters)
    return forward, backward


def _smaller(second: set[Node], first: set[Node]) -> set[Node]:
    """Nodes of the backward that are saved in place of the larger tensor that they alone read."""
    smaller: set[Node] = set()
    recomputed = _recomputed(second, first)
    for source in _saved(second, first):
        readers = [user for user in source.users if user in second or user in recomputed]
        early = all(n in second and first.issuperset(n.all_input_nodes) for n in readers)
        if early and sum(map(_bytes, readers)) < _bytes(source):
            smaller.update(readers)
    return smaller


def _bytes(node: Node) -> float:
    """Size of a tensor for the example batch; no bound for what is no tensor."""
    value = node.meta["val"]
    return prod(shape_of(node)) * value.dtype.itemsize if isinstance(value, Tensor) else inf


def _recomputed(second: set[Node], first: set[Node]) -> set[Node]:
    """Nodes of the forward that the backward recomputes, from what is saved or given."""
    recomputed: set[Node] = set()
    waiting = [source for node in second for source in node.all_input_nodes if source in first]
    while waiting:
        node = waiting.pop()
        if node not in recomputed and _is_recomputed(node):
            recomputed.add(node)
            waiting += node.all_input_nodes
    return recomputed


def _is_recomputed(node: Node) -> bool:
    """Whether keeping it would take more than making it again."""
    if node.op != "call_function":
        return False
    if isinstance(node.meta["val"], (int, torch.SymInt)):
        return True
    if node.target in _RECOMPUTED:
        return True
    given = [source for source in ancestors([node]) if source.op == "placeholder"]
    # What θ alone decides and is larger than it, such as a weight of which a part trains.
    return all(PARAMETER in n.meta for n in given) and _bytes(node) > sum(map(_bytes, given))


def _saved(second: set[Node], first: set[Node]) -> list[Node]:
    """Values of the forward that the backward reads, inputs and frozen tensors aside."""
    readers = second | _recomputed(second, first)
    read = {source for node in readers for source in node.all_input_nodes} - readers
    return [
        node
        for node in next(iter(second)).graph.nodes
        if node in read and node.op == "call_function"
    ]


def _part(
    joint: GraphModule,
    inside: set[Node],
    saved: Sequence[Node],
    results: Sequence[Node],
    names: Mapping[Node, str],
    late: Collection[Node] = (),
) -> GraphModule:
    """The nodes `inside` as a graph of their own, with the inputs they read and what was saved.

    Those in `late` come right before whoever reads them first: nothing lies around until then.
    """
    graph, root = Graph(), torch.nn.Module()
    values: dict[Node, Node] = {}
    read = {source for node in inside for source in node.all_input_nodes} | set(results)
    for node in joint.graph.nodes:
        if node in read and (node.op == "placeholder" or node in saved):
            # First of all, so that it is the others whose names give way.
            values[node] = graph.placeholder(names[node])
            # A feature and a saved tensor may have one name: the argument is called otherwise.
            values[node].target = values[node].name
            values[node].meta = {k: node.meta[k] for k in ("val", PARAMETER) if k in node.meta}
            values[node].meta[NAME] = (SAVED if node in saved else "") + names[node]

    def place(node: Node) -> None:
        for source in node.all_input_nodes:
            if source in late and source not in values:
                place(source)
        values[node] = graph.node_copy(node, lambda old: values[old])
        kept = ("val", "stack_trace", "nn_module_stack", GRADIENT)
        values[node].meta = {key: node.meta[key] for key in kept if key in node.meta}

    for node in joint.graph.nodes:
        frozen = node.op == "get_attr" and node in read
        if frozen:
            put_tensor(root, str(node.target), get_tensor(joint, str(node.target)))
        if frozen or (node.op == "call_function" and node in inside and node not in late):
            place(node)
    graph.output(tuple(values[node] for node in results))
    return GraphModule(root, graph)
