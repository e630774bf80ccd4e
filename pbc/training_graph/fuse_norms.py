"""Fuse frozen batch norms into trained convolutions, before a body is differentiated."""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule

from pbc.ir.graph import PARAMETER, shape_of
from pbc.ir.rewrite import copy_graph
from pbc.training_graph.decompositions.convolutions import normed_convolution

aten = torch.ops.aten

# Images per mini-batch where a choice depends on it.
_BATCH = 8


def fuse_norms(body: GraphModule) -> GraphModule:
    """Return a copy in which norms scale the trained kernels before them instead of their results.

    Only where that is less work: beside large kernels over small feature maps it is not. Such a
    pair becomes one `normed_convolution`, which is differentiated as what it calls.
    """
    graph = copy_graph(body)
    for norm in list(graph.graph.nodes):
        if norm.target != aten.batch_norm.default or norm.args[5]:
            continue
        layer = norm.args[0]
        if layer.target != aten.conv2d.default or len(layer.users) > 1:
            continue
        weight = layer.args[1]
        if PARAMETER not in weight.meta:
            continue
        if _BATCH * math.prod(shape_of(layer)[1:]) > math.prod(shape_of(weight)):
            with graph.graph.inserting_before(norm):
                joined = graph.graph.call_function(normed_convolution, (layer.args, norm.args[1:]))
            joined.meta = dict(layer.meta)
            norm.replace_all_uses_with(joined)
            graph.graph.erase_node(norm)
            graph.graph.erase_node(layer)
    graph.recompile()
    return graph
