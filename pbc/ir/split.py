"""A model's graph in two: the frozen prefix, and the body from where the first parameter is read.

What crosses from one to the other, the features, is named `feature_0`, `feature_1`, …: after no
operator, so that a pass may change the one that computes it. A body without a prefix reads the
images, `x`.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from pbc.ir.graph import PARAMETER, name_outputs, output_nodes, placeholders
from pbc.ir.rewrite import extract, rename_input

LOGITS = "logits"
FEATURE = "feature_"
"""In front of the number of a feature."""

LEAST_SHARE = 0.05
"""Of the layers; with fewer before anything trainable, a prefix does not pay."""

_LAYERS = (
    "aten.conv1d.default",
    "aten.conv2d.default",
    "aten.conv3d.default",
    "aten.linear.default",
    "aten.scaled_dot_product_attention.default",
)


def split_at_parameters(
    model: GraphModule, least_share: float = LEAST_SHARE
) -> tuple[GraphModule | None, GraphModule]:
    """Return prefix and body of a graph whose trainable parameters are inputs.

    No prefix where less than `least_share` of the layers come before anything trainable.
    """
    in_body = _reached_by_parameters(model)
    if _share_before(model, in_body) < least_share:
        in_body = {node for node in model.graph.nodes if node.op == "call_function"}
    x = next(node for node in placeholders(model) if PARAMETER not in node.meta)
    in_prefix = _reached_from(x) - in_body
    cut = _border(model, in_prefix, in_body)
    while unfit := [node for node in cut if not _is_feature(node, x)]:
        in_body |= set(unfit)
        in_prefix -= set(unfit)
        cut = _border(model, in_prefix, in_body)
    body = extract(model, cut, in_body, output_nodes(model))
    name_outputs(body, [LOGITS])
    if not any(node.op == "call_function" for node in cut):
        return None, body
    prefix = extract(model, [x], in_prefix | {x}, cut)
    features = [f"{FEATURE}{number}" for number in range(len(cut))]
    name_outputs(prefix, features)
    received = [node for node in placeholders(body) if PARAMETER not in node.meta]
    for node, name in zip(received, features, strict=True):
        rename_input(body, node, name)
    return prefix, body


def _is_feature(node: Node, x: Node) -> bool:
    """Whether a tensor has one row per sample, and numbers of the images' type.

    What stacks the patches of all samples has not; nor has what an autocast region computes, and an
    index: features are kept and sent as float32.
    """
    value, images = node.meta["val"], x.meta["val"]
    rows = str(value.shape[0]) if value.dim() else ""
    return rows == str(images.shape[0]) and value.dtype == images.dtype


def _share_before(model: GraphModule, in_body: set[Node]) -> float:
    layers = [node for node in model.graph.nodes if str(node.target) in _LAYERS]
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
