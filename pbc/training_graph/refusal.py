"""Name the operator of a body that has no gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pbc.errors import PbcError
from pbc.ir.graph import op_name, origin, tensor_names
from pbc.training_graph.decompositions import DIFFERENTIABLE
from pbc.training_graph.trace import traced


def without_gradient(
    body: GraphModule,
    nodes: Sequence[Node],
    values: Sequence[Tensor],
    frozen: Sequence[Tensor],
    error: Exception,
) -> Exception:
    """Return the error that names the operator at fault: the first that fails on its own.

    nodes, values: the body's inputs and their fake tensors. frozen: of its tensors, in order.
    """
    tensors = dict(zip(tensor_names(body), frozen, strict=True))
    known: dict[Node, Any] = dict(zip(nodes, values, strict=True))
    for node in body.graph.nodes:
        if node.op == "get_attr":
            known[node] = tensors[str(node.target)]
        if node.op != "call_function":
            continue
        known[node] = node.meta.get("val")
        if isinstance(known[node], (int, torch.SymInt)):
            continue
        try:
            _alone(node, known)
        except (NotImplementedError, RuntimeError) as failure:
            reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
            return PbcError(
                f"operator {op_name(node)}{origin(node)} has no gradient that could be derived: "
                f"{reason}; replace it in the model, freeze everything before it, or add a "
                "decomposition to pbc/training_graph/decompositions"
            )
    return error


def _alone(node: Node, known: Mapping[Node, Any]) -> None:
    """Run one operator on fake tensors, and its gradient with respect to every real input."""
    leaves = []

    def leaf(source: Node) -> Any:
        value = _sized(known[source])
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]
        return value

    def run(inputs: list[Tensor]) -> Any:
        del inputs
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), leaf)
        result = DIFFERENTIABLE.get(node.target, node.target)(*args, **kwargs)  # type: ignore[operator]
        parts = result if isinstance(result, (list, tuple)) else [result]
        real = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
        if real:
            torch.autograd.grad([part.sum() for part in real], leaves, allow_unused=True)
        return result

    traced(lambda inputs: (run(inputs), 0)[1], [])


def _sized(value: Any) -> Any:
    """The fake tensor at the example's sizes: the program's own are no symbols of a trace."""
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
        sizes = [s.node.hint if isinstance(s, torch.SymInt) else s for s in value.shape]
        return torch.empty(sizes, dtype=value.dtype)
    return value
