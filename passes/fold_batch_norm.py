"""Fold frozen batch norms into the layer before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pbc.ir.program import POLICY, Program, get_tensor, op_name, put_tensor

FOLDABLE = ("aten.conv2d.default", "aten.linear.default")


@dataclass(frozen=True)
class FoldBatchNorm:
    """Turn a frozen convolution or linear layer and its frozen batch norm into one layer.

    Before::

        %conv2d = conv2d(%x, @conv1.weight)
        %batch_norm = batch_norm(%conv2d, @bn1.weight, @bn1.bias, @bn1.running_mean, …)

    After, with other weights::

        %batch_norm = conv2d(%x, @conv1.weight_folded, @conv1.weight_folded_bias)

    Does nothing where the layer's output is read elsewhere too, or where a weight, bias, scale or
    shift is trained.
    """

    stage: ClassVar[str] = "fold"

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        for name, graph in program.graphs.items():
            if name != POLICY:
                fold(graph)
        return program


def fold(graph: GraphModule) -> None:
    """Fold in place; tensors that are shared with other graphs are left alone."""
    for norm in list(graph.graph.nodes):
        if norm.op != "call_function" or op_name(norm) != "aten.batch_norm.default":
            continue
        layer = norm.args[0]
        assert isinstance(layer, Node)
        if layer.op != "call_function" or op_name(layer) not in FOLDABLE or len(layer.users) > 1:
            continue
        sources = [*layer.args[1:3], *norm.args[1:5]]
        if any(isinstance(s, Node) and s.op != "get_attr" for s in sources):
            continue
        _fold_pair(graph, layer, norm)
    graph.graph.eliminate_dead_code()
    for name in set(_tensors(graph)) - {
        str(n.target) for n in graph.graph.nodes if n.op == "get_attr"
    }:
        owner, _, leaf = name.rpartition(".")
        delattr(graph.get_submodule(owner), leaf)
    graph.recompile()


def _tensors(graph: GraphModule) -> list[str]:
    return [name for name, _ in (*graph.named_parameters(), *graph.named_buffers())]


def _fold_pair(graph: GraphModule, layer: Node, norm: Node) -> None:
    def read(node: object) -> Tensor | None:
        return get_tensor(graph, str(node.target)).double() if isinstance(node, Node) else None

    weight, bias = read(layer.args[1]), read(layer.args[2]) if len(layer.args) > 2 else None
    scale, shift, mean, variance = (read(node) for node in norm.args[1:5])
    assert weight is not None
    assert mean is not None
    assert variance is not None
    epsilon = norm.args[7]
    assert isinstance(epsilon, float)
    factor = (variance + epsilon).rsqrt() * (1.0 if scale is None else scale)
    folded_bias = ((0.0 if bias is None else bias) - mean) * factor
    folded_bias = folded_bias + (0.0 if shift is None else shift)
    weight = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    assert isinstance(layer.args[1], Node)
    name = str(layer.args[1].target)
    with graph.graph.inserting_before(layer):
        reads = []
        for suffix, tensor, like in (
            ("", weight, layer.args[1]),
            ("_bias", folded_bias, norm.args[3]),
        ):
            put_tensor(graph, f"{name}_folded{suffix}", nn.Parameter(tensor.float(), False))
            reads.append(graph.graph.get_attr(f"{name}_folded{suffix}"))
            assert isinstance(like, Node)
            reads[-1].meta = {"val": like.meta["val"]}
    layer.args = (layer.args[0], *reads, *layer.args[3:])
    norm.replace_all_uses_with(layer)
    graph.graph.erase_node(norm)
    # Others know the result by the norm's name: a body's input is called after it.
    layer.name = norm.name
