"""Trace: a function of tensors becomes the graph of the operators that it calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from pbc.ir.graph import op_name
from pbc.training_graph.decompositions import table
from pbc.training_graph.simplify import ONLY_FOR_AUTOGRAD


def traced(function: Callable[..., Any], *arguments: Any) -> GraphModule:
    """Return every operator that the function calls; NotImplementedError for one that is impure.

    Results that are written to, or read by strides, mean something in torch's memory alone.
    """
    with preserve_node_meta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = make_fx(function, decomposition_table=table())(*arguments)
    for node in trace.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or node.target in ONLY_FOR_AUTOGRAD:
            continue
        if schema.is_mutable or "strided" in schema.name:
            raise NotImplementedError(f"torch takes it apart into {op_name(node)}")
    return trace
