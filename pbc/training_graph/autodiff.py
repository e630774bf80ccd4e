"""Differentiate a body ahead of time: its graph in, the graphs of a training step out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import GraphModule

from pbc.training_graph.joint import trace_joint
from pbc.training_graph.partition import partition
from pbc.training_graph.simplify import simplify


@dataclass(frozen=True)
class Gradient:
    """A body's training step without its optimizer, cut in two.

    forward: takes features, θ, labels int64 [b] and the label smoothing; returns mean loss,
        per-sample losses [b], logits [b, classes], and what the backward needs beside the inputs.
    backward: returns the gradients of `parameters` (those that the loss depends on), in order.
    """

    forward: GraphModule
    backward: GraphModule
    parameters: tuple[str, ...]


def differentiate(body: GraphModule, open_axes: Mapping[str, int] = {}) -> Gradient:
    """Derive the gradient of cross-entropy (with label smoothing) on the body's logits.

    open_axes: by parameter name, the axis whose size the device decides. Raises PbcError for an
    operator without a gradient, naming it, the module and the source line it came from.
    """
    joint = trace_joint(body, open_axes)
    simplify(joint.graph)
    forward, backward = partition(joint.graph, joint.parameters, joint.names)
    return Gradient(forward, backward, joint.parameters)
