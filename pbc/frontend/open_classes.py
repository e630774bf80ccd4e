"""Open classes: a captured graph computes for any number of classes, as training will have it."""

from __future__ import annotations

import torch
from torch.func import functional_call
from torch.fx import GraphModule, Node

from pbc.errors import PbcError
from pbc.ir.graph import get_tensor, placeholders, shape_of, tensor_names
from pbc.ir.program import Head

aten = torch.ops.aten

_SIZED = (aten.reshape.default, aten.view.default, aten.expand.default)


def open_classes(graph: GraphModule, head: Head) -> None:
    """Replace the class count by -1 in the sizes that the scores are brought to, in place.

    Flattening a convolution's scores and normalising a head's weight name the count that the model
    was captured with. Raises PbcError where a size is also another axis's, or a frozen tensor has
    the count (as spectral_norm's), so that only a known count can be compiled.
    """
    derived: set[Node] = set()
    count = 0
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.target in head.parameters:
            derived.add(node)
            count = shape_of(node)[0]
        elif node.op == "call_function" and derived & set(node.all_input_nodes):
            derived.add(node)
            if node.target in _SIZED:
                _open(node, count)
    graph.recompile()
    if count:
        _confirm(graph, head, derived, count)


def _confirm(graph: GraphModule, head: Head, derived: set[Node], count: int) -> None:
    """Run the graph with one class more."""
    more = {
        name: torch.randn(count + 1, *get_tensor(graph, name).shape[1:])
        for name in tensor_names(graph)
        if name in head.parameters
    }
    (images,) = placeholders(graph)
    try:
        with torch.no_grad():
            (scores,) = functional_call(graph, more, (torch.zeros(shape_of(images)),))
    except RuntimeError:  # torch's own, of sizes that do not fit
        opened = False
    else:
        opened = scores.shape[1] == count + 1
    if opened:
        return
    beside = {source for node in derived for source in node.all_input_nodes} - derived
    fixed = [
        str(node.target)
        for node in graph.graph.nodes
        if node in beside and node.op == "get_attr" and count in shape_of(node)
    ]
    raise PbcError(
        f"the number of classes, {count}, is that of {fixed[0] if fixed else 'a frozen tensor'}, "
        "which the head reads and no training changes, so that it cannot be left open (--classes, "
        "or --data to count them, says how many there are going to be)"
    )


def _open(node: Node, count: int) -> None:
    source, sizes = node.all_input_nodes[0], list(node.args[1])  # type: ignore[arg-type]
    equal = [axis for axis, size in enumerate(sizes) if size == count]
    if not equal:
        return
    if len(equal) == 1 and (node.target is aten.expand.default or -1 not in sizes):
        shape = shape_of(source)
        before = ((None,) * (len(sizes) - len(shape)) + shape)[equal[0]]
        if node.target is not aten.expand.default or before == count:
            sizes[equal[0]] = -1
            node.args = (source, sizes, *node.args[2:])
            return
    raise PbcError(
        f"the number of classes, {count}, is written into `{node.name}` "
        f"({[str(size) for size in sizes]}) in a way that it cannot be left open (--classes, or "
        "--data to count them, says how many there are going to be)"
    )
