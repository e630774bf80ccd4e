"""Graph edits: each is written once, here, for all passes, proxies and lowerings.

Graphs share tensors. So an edit never changes a tensor in place, and what changes nodes works on
the graph that it is given: whoever still needs that one hands in a copy.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from pbc.ir.graph import (
    PARAMETER,
    get_tensor,
    graph_outputs,
    name_outputs,
    op_name,
    output_node,
    output_nodes,
    placeholders,
    put_tensor,
    tensor_names,
)

FUSIBLE = ("aten.conv2d.default", "aten.linear.default")


def copy_graph(graph: GraphModule) -> GraphModule:
    """Return a graph module of its own that shares the tensors of the given one."""
    memo: dict[int, Any] = {id(t): t for t in (*graph.parameters(), *graph.buffers())}
    root = nn.Module()
    for name, tensor in (*graph.named_parameters(), *graph.named_buffers()):
        put_tensor(root, name, tensor)
    return GraphModule(copy.deepcopy(root, memo), copy.deepcopy(graph.graph))


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """The nodes, and all that they are computed from."""
    found: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def with_tensor_names(graph: GraphModule, names: Mapping[str, str]) -> GraphModule:
    """Return a copy whose tensors go by other names, which are given by their own."""
    renamed, root = copy.deepcopy(graph.graph), nn.Module()
    for node in renamed.nodes:
        if node.op == "get_attr":
            own, node.target = str(node.target), names[str(node.target)]
            put_tensor(root, node.target, get_tensor(graph, own))
    return GraphModule(root, renamed)


def in_sequence(first: GraphModule, second: GraphModule) -> GraphModule:
    """Return two graphs as one: what the first returns, the second takes by the same names.

    A tensor of a name that both have is one tensor.
    """
    graph, root = Graph(), nn.Module()
    values: dict[Node, Node] = {}
    made: dict[str, Node] = {}
    for part in (first, second):
        for node in part.graph.nodes:
            if node.op == "placeholder" and node.name in made:
                values[node] = made[node.name]
            elif node.op != "output":
                values[node] = graph.node_copy(node, lambda old: values[old])
                values[node].meta = dict(node.meta)
            if node.op == "get_attr":
                put_tensor(root, str(node.target), get_tensor(part, str(node.target)))
        results = [values[node] for node in output_nodes(part)]
        made = dict(zip(graph_outputs(part), results, strict=True))
    # Placeholders come first, as in any graph.
    front = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if node.op == "placeholder":
            front.prepend(node)
    graph.output(tuple(results))
    whole = GraphModule(root, graph)
    name_outputs(whole, graph_outputs(second))
    return whole


def replace_tensor(graph: GraphModule, name: str, tensor: Tensor) -> None:
    """Put a tensor in another's place, as a parameter or buffer like it."""
    if isinstance(get_tensor(graph, name), nn.Parameter):
        tensor = nn.Parameter(tensor.detach(), requires_grad=False)
    _delete_tensor(graph, name)
    put_tensor(graph, name, tensor)


def to_buffer(graph: GraphModule, name: str) -> None:
    """Make a parameter of a graph a buffer, which nobody trains."""
    tensor = get_tensor(graph, name).detach()
    _delete_tensor(graph, name)
    put_tensor(graph, name, tensor)


def drop_unused(graph: GraphModule) -> None:
    """Drop nodes and tensors that nothing reads, in place."""
    graph.graph.eliminate_dead_code()
    read = set(tensor_names(graph))
    for name in [n for n, _ in (*graph.named_parameters(), *graph.named_buffers())]:
        if name not in read:
            _delete_tensor(graph, name)
    graph.recompile()


def cut_at(
    graph: GraphModule, names: Sequence[str], titles: Sequence[str] | None = None
) -> GraphModule:
    """Return a copy that returns the named nodes, and computes no more than they need.

    titles: what the outputs are called, by default as the nodes. The inputs stay, all but the
    trainable parameters that are not read any more.
    """
    cut = copy_graph(graph)
    by_name = {node.name: node for node in cut.graph.nodes}
    output_node(cut).args = (tuple(by_name[name] for name in names),)
    name_outputs(cut, names if titles is None else titles)
    cut.graph.eliminate_dead_code()
    for node in placeholders(cut):
        if PARAMETER in node.meta and not node.users:
            cut.graph.erase_node(node)
    drop_unused(cut)
    return cut


def extract(
    graph: GraphModule, inputs: Sequence[Node], inside: Collection[Node], outputs: Sequence[Node]
) -> GraphModule:
    """Return the nodes `inside` as a graph, `inputs` and the parameters they read as placeholders.

    Nodes that depend on nothing but frozen tensors or the batch size are copied to where they are
    used.
    """
    new = Graph()
    values: dict[Node, Node] = {}

    def take(node: Node) -> Node:
        """The copy of a node, made now (in an order that respects its inputs) if need be."""
        if node not in values:
            if node.target is torch.ops.aten.sym_size.int and node not in inside:
                # The batch axis of an input that this graph does not have: any feature's will do.
                values[node] = new.call_function(node.target, (values[inputs[0]], node.args[1]))
            else:
                values[node] = new.node_copy(node, take)
            values[node].meta = dict(node.meta)
        return values[node]

    for node in inputs:
        values[node] = new.placeholder(node.name)
        values[node].name = node.name
        values[node].meta = {"val": node.meta["val"]}
    for node in graph.graph.nodes:
        if PARAMETER in node.meta and any(user in inside for user in node.users):
            take(node)
    for node in graph.graph.nodes:
        if node in inside:
            take(node)
    new.output(tuple(take(node) for node in outputs))
    root = nn.Module()
    for name in dict.fromkeys(str(node.target) for node in new.nodes if node.op == "get_attr"):
        put_tensor(root, name, get_tensor(graph, name))
    return GraphModule(root, new)


def rename_input(graph: GraphModule, node: Node, name: str) -> None:
    """Call a placeholder otherwise; a node of a user's tensor that has this name gives it up."""
    for other in graph.graph.nodes:
        if other.name == name and other is not node:
            other.name = f"own_{name}"
    node.name = node.target = name
    graph.recompile()


def tensors_to_inputs(graph: GraphModule, names: Collection[str]) -> dict[str, Tensor]:
    """Turn the named tensors of a graph into inputs, in place; return their values.

    The new placeholders follow the others, in the order in which the graph reads the tensors;
    meta[PARAMETER] has the tensor's name.
    """
    values: dict[str, Tensor] = {}
    last = placeholders(graph)[-1]
    for node in list(graph.graph.nodes):
        if node.op != "get_attr" or node.target not in names:
            continue
        if node.target not in values:
            values[node.target] = get_tensor(graph, node.target).detach().clone()
        with graph.graph.inserting_after(last):
            last = theta = graph.graph.placeholder("theta_" + re.sub(r"\W", "_", node.target))
        theta.target = theta.name  # `a.b` and `a_b` are two arguments
        theta.meta = {**node.meta, PARAMETER: node.target}
        node.replace_all_uses_with(theta)
        graph.graph.erase_node(node)
    for name in values:
        _delete_tensor(graph, name)
    graph.recompile()
    return values


def fuse_batch_norms(graph: GraphModule) -> None:
    """Make a layer and the frozen batch norm that alone reads it one layer, in place."""
    for norm in list(graph.graph.nodes):
        if norm.op != "call_function" or op_name(norm) != "aten.batch_norm.default":
            continue
        layer = norm.args[0]
        assert isinstance(layer, Node)
        if layer.op != "call_function" or op_name(layer) not in FUSIBLE or len(layer.users) > 1:
            continue
        sources = [*layer.args[1:3], *norm.args[1:5]]
        if any(isinstance(s, Node) and s.op != "get_attr" for s in sources):
            continue
        _fuse(graph, layer, norm)
    drop_unused(graph)


def fused(graph: GraphModule) -> GraphModule:
    """Return a copy as a device runs it: batch norms are part of the layers before them."""
    graph = copy_graph(graph)
    fuse_batch_norms(graph)
    return graph


def _fuse(graph: GraphModule, layer: Node, norm: Node) -> None:
    def read(node: object) -> Tensor | None:
        return get_tensor(graph, str(node.target)).double() if isinstance(node, Node) else None

    weight, bias = read(layer.args[1]), read(layer.args[2]) if len(layer.args) > 2 else None
    scale, shift, mean, variance = (read(node) for node in norm.args[1:5])
    assert weight is not None
    assert mean is not None
    assert variance is not None
    epsilon = norm.args[7]
    assert isinstance(epsilon, float)
    factor = (variance + epsilon).rsqrt() * (1.0 if scale is None else scale)
    folded_bias = ((0.0 if bias is None else bias) - mean) * factor
    folded_bias = folded_bias + (0.0 if shift is None else shift)
    weight = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    assert isinstance(layer.args[1], Node)
    name = str(layer.args[1].target)
    with graph.graph.inserting_before(layer):
        reads = []
        for suffix, tensor, like in (
            ("", weight, layer.args[1]),
            ("_bias", folded_bias, norm.args[3]),
        ):
            put_tensor(graph, f"{name}_folded{suffix}", nn.Parameter(tensor.float(), False))
            reads.append(graph.graph.get_attr(f"{name}_folded{suffix}"))
            assert isinstance(like, Node)
            reads[-1].meta = {"val": like.meta["val"]}
    layer.args = (layer.args[0], *reads, *layer.args[3:])
    norm.replace_all_uses_with(layer)
    graph.graph.erase_node(norm)


def _delete_tensor(graph: GraphModule, name: str) -> None:
    owner, _, leaf = name.rpartition(".")
    delattr(graph.get_submodule(owner), leaf)


def in_float64(graph: GraphModule) -> GraphModule:
    """Return a copy that computes in float64, with the constants that it makes."""
    graph = copy.deepcopy(graph).double()
    for node in graph.graph.nodes:
        if node.kwargs.get("dtype") == torch.float32:
            node.kwargs = {**node.kwargs, "dtype": torch.float64}
    graph.recompile()
    return graph
