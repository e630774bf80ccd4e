"""Convert: one graph of a program becomes a TVM module.

Everything that a graph reads is an argument of the module: its inputs, in their order, and then its
frozen tensors. So a module depends on the graph's structure alone, and graphs that differ in their
tensors' values only share one. What a graph computes of frozen tensors alone, such as a kernel that
is flipped for a gradient, becomes a function of its own, `setup`, which a device calls once,
when it loads the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import tvm
from torch import Tensor
from torch.fx import GraphModule, Node
from tvm import relax

from pbc.bundle.graph_name import GraphName
from pbc.ir.graph import get_tensor, graph_inputs, output_nodes, placeholders, tensor_names
from pbc.ir.rewrite import ancestors
from pbc.targets.tvm.operators import TABLE
from pbc.targets.tvm.scope import Scope


@dataclass(frozen=True)
class Reads:
    """The frozen tensors that a graph's functions take, by name.

    Its function takes the graph's inputs, `tensors`, and what its setup returns.
    The setup, of the tensors named `setup`, is there where any are.
    """

    tensors: tuple[str, ...]
    setup: tuple[str, ...]


def function_of(graph: GraphName) -> str:
    """Return the name of a graph's function: `prefix`, `forward`, `update_sgd`; never its level."""
    return graph.kind if graph.optimizer is None else f"{graph.kind}_{graph.optimizer}"


def setup_of(function: str) -> str:
    """Return the name of the function to call once, when this function's graph is loaded."""
    return f"{function}_setup"


def convert(
    graphs: Mapping[str, GraphModule], head: Collection[str] = (), *, open_head: bool = False
) -> tuple[tvm.IRModule, dict[str, Reads]]:
    """Convert graphs to one module, in which they share what is the same; every open axis stays so.

    graphs: by the names of their functions.
    head: the parameters whose first axis counts classes; open_head: leave that number open.

    Raises PbcError for an operator that has no conversion.
    """
    builder = relax.BlockBuilder()
    reads = {
        name: _convert(builder, name, graph, head if open_head else ())
        for name, graph in graphs.items()
    }
    return builder.get(), reads


def _convert(
    builder: relax.BlockBuilder, function: str, graph: GraphModule, opened: Collection[str]
) -> Reads:
    early = _early(graph)
    read_late = dict.fromkeys(
        source
        for node in graph.graph.nodes
        if node not in early
        for source in node.all_input_nodes
        if source in early
    )
    frozen = {
        name: [n for n in early if n.op == "get_attr" and str(n.target) == name]
        for name in tensor_names(graph)
    }
    tensors = [name for name, nodes in frozen.items() if any(n in read_late for n in nodes)]
    made = [node for node in read_late if node.op != "get_attr"]
    needed = ancestors(made)
    setup = [name for name, nodes in frozen.items() if any(n in needed for n in nodes)]
    if made:
        scope = Scope(builder, "frozen", TABLE)
        arguments = [scope.argument(get_tensor(graph, name)) for name in setup]
        for name, argument in zip(setup, arguments, strict=True):
            scope.values.update(dict.fromkeys(frozen[name], argument))
        steps = [node for node in graph.graph.nodes if node in needed and node.op != "get_attr"]
        scope.function(setup_of(function), arguments, steps, made)
    scope = Scope(builder, "value", TABLE)
    arguments = []
    for node, name in zip(placeholders(graph), graph_inputs(graph), strict=True):
        scope.values[node] = scope.argument(node.meta["val"], {0} if name in opened else ())
        arguments.append(scope.values[node])
    for name in tensors:
        arguments.append(scope.argument(get_tensor(graph, name)))
        scope.values.update(dict.fromkeys(frozen[name], arguments[-1]))
    for node in made:
        arguments.append(scope.argument(node.meta["val"]))
        scope.values[node] = arguments[-1]
    steps = [n for n in graph.graph.nodes if n.op == "call_function" and n not in early]
    scope.function(function, arguments, steps, output_nodes(graph))
    return Reads(tuple(tensors), tuple(setup))


def _early(graph: GraphModule) -> dict[Node, None]:
    """The nodes that depend on frozen tensors alone, in order."""
    early: dict[Node, None] = {}
    for node in graph.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (
            node.op == "call_function"
            and sources
            and isinstance(node.meta.get("val"), Tensor)
            and all(source in early for source in sources)
        ):
            early[node] = None
    return early
