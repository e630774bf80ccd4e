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
_PERMUTE = torch.ops.aten.permute.default


def reduced(graph: GraphModule, size: Size) -> GraphModule:
    """Return the graph behind a bilinear reduction of its images to `size` (height, width).

    An output that keeps spatial axes is brought back to its height and width, wherever among its
    axes these are: what reads it need not know. Raises RuntimeError (torch's own) where a layer is
    built for one resolution, and ValueError where an output changes in another way.
    """
    full = graph
    graph = _on_smaller_images(full, size)
    outputs = []
    for number, (title, node, whole) in enumerate(
        zip(graph_outputs(graph), output_nodes(graph), output_nodes(full), strict=True)
    ):
        goal = shape_of(whole)
        if shape_of(node) != goal:
            height, width = _spatial_axes(full, number, size)
            with graph.graph.inserting_before(output_node(graph)):
                node = _brought_back(graph, title, node, goal, (height, width))
        outputs.append(node)
    output_node(graph).args = (tuple(outputs),)
    graph.recompile()
    refresh_shapes(graph)
    return graph


def _on_smaller_images(graph: GraphModule, size: Size) -> GraphModule:
    graph = copy_graph(graph)
    (image,) = placeholders(graph)
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    with graph.graph.inserting_before(first):
        small = _resize(graph, image, size)
    small.name = "reduced"
    image.replace_all_uses_with(small, delete_user_cb=lambda user: user is not small)
    graph.recompile()
    refresh_shapes(graph)
    return graph


def _spatial_axes(graph: GraphModule, output: int, size: Size) -> tuple[set[int], set[int]]:
    """The axes of an output that shrink with the height of the images, and with their width.

    Seen, not assumed: a feature map may have its channels in front or behind, and an axis of tokens
    shrinks with both.
    """
    (image,) = placeholders(graph)
    _, _, height, width = shape_of(image)
    whole = shape_of(output_nodes(graph)[output])
    found = []
    for one in ((size[0], width), (height, size[1])):
        shape = shape_of(output_nodes(_on_smaller_images(graph, one))[output])
        pairs = zip(shape, whole, strict=True)
        found.append({axis for axis, (now, before) in enumerate(pairs) if now != before})
    return found[0], found[1]


def _brought_back(
    graph: GraphModule,
    title: str,
    node: Node,
    goal: tuple[int, ...],
    axes: tuple[set[int], set[int]],
) -> Node:
    """Resize an output to the height and width that it had, its axes in the order they had."""
    height, width = axes
    # An axis that stays as it is may go for the one that is missing: it is resized to its own size.
    others = [axis for axis in reversed(range(1, len(goal))) if axis not in height | width]
    if len(goal) != 4 or height & width or len(height) > 1 or len(width) > 1:
        small = list(shape_of(node))
        raise ValueError(f"{title} is {small} at lower resolution, not {list(goal)}")
    along_width = next(iter(width), None) or others.pop(0)
    along_height = next(iter(height), None) or others.pop(0)
    order = [0, *others, along_height, along_width]
    if order != [0, 1, 2, 3]:
        node = graph.graph.call_function(_PERMUTE, (node, order))
    node = _resize(graph, node, (goal[along_height], goal[along_width]))
    if order != [0, 1, 2, 3]:
        back = [order.index(axis) for axis in range(4)]
        node = graph.graph.call_function(_PERMUTE, (node, back))
    return node


def macs(graph: GraphModule, size: Size | None = None) -> float:
    """Multiply-accumulates of one sample, whose image has this size; None for the graph's own.

    Raises RuntimeError (torch's own) where a layer is built for another resolution.
    """
    shapes = [[*shape_of(node)] for node in placeholders(graph)]
    if size is not None:
        shapes[0][2:] = size
    # On fake tensors of its own: counting would make the program's symbolic batch a constant.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, FlopCounterMode(display=False) as counter, torch.no_grad():
        graph(*[torch.empty(shape) for shape in shapes])
    return float(counter.get_total_flops()) / 2 / shapes[0][0]


def _resize(graph: GraphModule, node: Node, size: Size) -> Node:
    return graph.graph.call_function(_RESIZE, (node, list(size), False, None))
