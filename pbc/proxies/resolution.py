"""Reduced resolution: a proxy that looks at fewer pixels with the same layers.

Where the frozen prefix pools its activations away, no trainable layer sees their height and width:
they are trainable-independent dimensions like channels are, only that no weight shrinks with them.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode

from pbc.ir.graph import graph_outputs, output_node, output_nodes, placeholders, shape_of
from pbc.ir.levels import Size
from pbc.ir.rewrite import copy_graph
from pbc.ir.slice_graph import refresh_shapes

_RESIZE = torch.ops.aten.upsample_bilinear2d.vec


def reduced(graph: GraphModule, size: Size) -> GraphModule:
    """Return the graph behind a bilinear reduction of its images to `size` (height, width).

    An output that keeps spatial axes is brought back to its height and width: what reads it need
    not know. Raises RuntimeError (torch's own) where a layer is built for one
    resolution, and ValueError where an output changes in another way.
    """
    graph = copy_graph(graph)
    (image,) = placeholders(graph)
    before = [shape_of(node) for node in output_nodes(graph)]
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    with graph.graph.inserting_before(first):
        small = _resize(graph, image, size)
    small.name = "reduced"
    image.replace_all_uses_with(small, delete_user_cb=lambda user: user is not small)
    refresh_shapes(graph)
    outputs = []
    titles = graph_outputs(graph)
    for title, node, goal in zip(titles, output_nodes(graph), before, strict=True):
        shape = shape_of(node)
        if shape != goal and len(shape) == 4:
            with graph.graph.inserting_before(output_node(graph)):
                node = _resize(graph, node, (goal[2], goal[3]))
        elif shape != goal:
            raise ValueError(f"{title} is {list(shape)} at {size[0]}x{size[1]}, not {list(goal)}")
        outputs.append(node)
    output_node(graph).args = (tuple(outputs),)
    graph.recompile()
    refresh_shapes(graph)
    return graph


def reducible(graph: GraphModule, size: Size) -> bool:
    """Whether the graph takes images of this size and puts out as many channels as before."""
    try:
        reduced(graph, size)
    except (RuntimeError, ValueError):
        return False
    return True


def macs(graph: GraphModule) -> float:
    """Multiply-accumulates of one sample, by the shapes on the nodes."""
    (image,) = placeholders(graph)
    shape = shape_of(image)
    # On fake tensors of its own: counting would make the program's symbolic batch a constant.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, FlopCounterMode(display=False) as counter, torch.no_grad():
        graph(torch.empty(shape))
    return float(counter.get_total_flops()) / 2 / shape[0]


def _resize(graph: GraphModule, node: Node, size: Size) -> Node:
    return graph.graph.call_function(_RESIZE, (node, list(size), False, None))
