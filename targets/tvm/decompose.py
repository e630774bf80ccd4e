"""Decompose an operator that has no conversion into those that torch itself makes it of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pbc.ir.graph import placeholders
from pbc.training_graph.decompositions.grid_samples import grid_sampler
from pbc.training_graph.decompositions.pooling import avg_pool3d
from pbc.training_graph.decompositions.selected_channels import index_copy

aten = torch.ops.aten


def decomposed(node: Node, converted: Container[Any]) -> GraphModule | None:
    """Return a graph from the node's input tensors, in their order, to its result; None if none is.

    converted: the operators that stay whole.
    """
    operator = node.target
    if not isinstance(operator, torch._ops.OpOverload):
        return None  # Python's own, of sizes
    sources = [source for source in node.all_input_nodes if isinstance(source.meta["val"], Tensor)]
    values = [source.meta["val"] for source in sources]
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    mode = modes[0] if modes else FakeTensorMode()
    fakes = [v if isinstance(v, FakeTensor) else mode.from_tensor(v) for v in values]

    def run(*tensors: Tensor) -> Any:
        known = dict(zip(sources, tensors, strict=True))
        args, kwargs = torch.fx.map_arg(
            (node.args, node.kwargs), lambda source: known.get(source, source.meta["val"])
        )
        return operator(*args, **kwargs)

    table = {op: parts for op, parts in _table().items() if op not in converted}
    with mode, enable_python_dispatcher(), torch.no_grad():
        try:
            graph: GraphModule = make_fx(run, decomposition_table=table)(*fakes)
        except (NotImplementedError, RuntimeError):  # by values, which a graph does not have
            return None
    graph.graph.eliminate_dead_code()
    called = [part for part in graph.graph.nodes if part.op == "call_function"]
    if any(part.target == operator for part in called):
        return None
    assert len(placeholders(graph)) == len(sources)
    return graph


@functools.cache
def _table() -> dict[Any, Callable[..., Any]]:
    return {
        **core_aten_decompositions(),
        aten.avg_pool3d.default: avg_pool3d,
        aten.index_copy.default: index_copy,
        aten.grid_sampler_2d.default: grid_sampler,
        aten.grid_sampler_3d.default: grid_sampler,
    }
