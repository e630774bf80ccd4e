"""Reduced resolution: a proxy that looks at fewer pixels with the same layers.

Where the frozen prefix pools its activations away, no trainable layer sees their height and width:
they are trainable-independent dimensions like channels are, only that no weight shrinks with them.
So are they for a trainable layer that does the same at every position (a norm, a bias, an adapter,
a 1x1 convolution): its θ has the same shapes at any resolution, and its gradient costs less too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode

from pbc.bundle.graph_name import BODY, PREFIX, GraphName
from pbc.ir.graph import (
    PARAMETER,
    graph_outputs,
    op_name,
    output_node,
    output_nodes,
    placeholders,
    shape_of,
)
from pbc.ir.levels import LevelGraphs, Size
from pbc.ir.rewrite import copy_graph
from pbc.ir.slice_graph import refresh_shapes

# A shape, and which of its axes are height and width.
_Resized = tuple[tuple[int, ...], tuple[set[int], set[int]]]

_RESIZE = torch.ops.aten.upsample_bilinear2d.vec
_PERMUTE = torch.ops.aten.permute.default


def reduced_role(original: LevelGraphs) -> GraphName:
    """Return which graph of level 0 runs at a lower resolution: the one that computes more."""
    prefix = original.prefix
    if prefix is None or layer_macs(prefix) < layer_macs(original.body):
        return BODY
    return PREFIX


def reduced(graph: GraphModule, size: Size, sender: GraphModule | None = None) -> GraphModule:
    """Return the graph behind a bilinear reduction of its inputs, as if of images of `size`.

    size: height and width of images. sender: the prefix that sends what the graph reads; None where
    it reads images. An output that keeps spatial axes is brought back to its height and width, see
    `brought_back`. Raises RuntimeError where a layer is built for one resolution.
    """
    return brought_back(_on_smaller_inputs(graph, size, sender), graph, size, sender)


def brought_back(
    small: GraphModule, full: GraphModule, size: Size, sender: GraphModule | None = None
) -> GraphModule:
    """Return a copy whose outputs have the height and width of `full`'s, wherever these axes are.

    What reads them need not know. small: a graph of reduced inputs, with the outputs of `full`,
    which has whole ones. Raises ValueError where an output changes in another way.
    """
    graph = copy_graph(small)
    outputs = []
    for number, (title, node, whole) in enumerate(
        zip(graph_outputs(graph), output_nodes(graph), output_nodes(full), strict=True)
    ):
        goal = shape_of(whole)
        if shape_of(node) != goal:
            axes = _spatial_axes(full, number, size, sender)
            with graph.graph.inserting_before(output_node(graph)):
                node = _brought_back(graph, title, node, goal, axes)
        outputs.append(node)
    output_node(graph).args = (tuple(outputs),)
    graph.recompile()
    refresh_shapes(graph)
    return graph


def _inputs(graph: GraphModule, size: Size, sender: GraphModule | None) -> Mapping[Node, _Resized]:
    """What the graph's inputs become where images have this size; parameters do not."""
    inputs = [node for node in placeholders(graph) if PARAMETER not in node.meta]
    if sender is None:
        (image,) = inputs
        return {image: ((*shape_of(image)[:2], *size), ({2}, {3}))}
    sent = dict(zip(graph_outputs(sender), range(len(output_nodes(sender))), strict=True))
    small = output_nodes(_on_smaller_inputs(sender, size, None))
    return {
        node: (shape_of(small[number]), _spatial_axes(sender, number, size, None))
        for node in inputs
        for number in (sent[node.name],)
    }


def _on_smaller_inputs(graph: GraphModule, size: Size, sender: GraphModule | None) -> GraphModule:
    graph = copy_graph(graph)
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    for node, (goal, axes) in _inputs(graph, size, sender).items():
        if goal == shape_of(node):
            continue
        before = set(graph.graph.nodes)
        with graph.graph.inserting_before(first):
            small = _brought_back(graph, node.name, node, goal, axes)
        small.name = "reduced" if sender is None else f"{node.name}_reduced"
        node.replace_all_uses_with(small, delete_user_cb=before.__contains__)
    graph.recompile()
    try:
        refresh_shapes(graph)
    except RuntimeError as error:  # torch's own, of a shape that no user has written
        raise RuntimeError("a layer is built for the resolution of whole images") from error
    return graph


def _spatial_axes(
    graph: GraphModule, output: int, size: Size, sender: GraphModule | None
) -> tuple[set[int], set[int]]:
    """The axes of an output that shrink with the height of the images, and with their width.

    Seen, not assumed: a feature map may have its channels in front or behind, and an axis of tokens
    shrinks with both.
    """
    (image,) = placeholders(graph if sender is None else sender)[:1]
    _, _, height, width = shape_of(image)
    whole = shape_of(output_nodes(graph)[output])
    found = []
    for one in ((size[0], width), (height, size[1])):
        shape = shape_of(output_nodes(_on_smaller_inputs(graph, one, sender))[output])
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


def macs(graph: GraphModule, size: Size | None = None, sender: GraphModule | None = None) -> float:
    """Multiply-accumulates of one sample, whose image has this size; None for the graph's own.

    sender: as `reduced` has it. Raises RuntimeError (torch's own) where a layer is built for
    another resolution.
    """
    shapes = {node: shape_of(node) for node in placeholders(graph)}
    if size is not None:
        shapes |= {node: goal for node, (goal, _) in _inputs(graph, size, sender).items()}
    # On fake tensors of its own: counting would make the program's symbolic batch a constant.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, FlopCounterMode(display=False) as counter, torch.no_grad():
        graph(*[torch.empty(shape) for shape in shapes.values()])
    return float(counter.get_total_flops()) / 2 / next(iter(shapes.values()))[0]


def layer_macs(graph: GraphModule) -> float:
    """Multiply-accumulates of one sample in convolutions and linear layers, by their shapes."""
    total = 0.0
    for node in graph.graph.nodes:
        if op_name(node) in ("aten.conv2d.default", "aten.linear.default"):
            total += math.prod(shape_of(node)[1:]) * math.prod(shape_of(node.args[1])[1:])
    return total


def _resize(graph: GraphModule, node: Node, size: Size) -> Node:
    return graph.graph.call_function(_RESIZE, (node, list(size), False, None))
