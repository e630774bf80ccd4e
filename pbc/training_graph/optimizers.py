"""Optimizers as operators: what a graph of gradients needs to become one that trains.

Each rule is that of torch.optim (SGD with momentum, Adam, AdamW; Kingma and Ba, ICLR 2015;
Loshchilov and Hutter, ICLR 2019). Everything that may differ from run to run is an input. Bias
corrections too: `1 - 0.999**t` in float32 loses four digits at the first steps, so the runtime
computes them in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pbc.bundle.optimizers import BETA_MEAN, BETA_SQUARE, NEW, OPTIMIZERS
from pbc.ir.graph import (
    NAME,
    PARAMETER,
    get_tensor,
    output_node,
    output_nodes,
    put_tensor,
    tensor_names,
)

aten = torch.ops.aten

Emit = Callable[..., Node]


Rule = Callable[[Emit, Node, Node, list[Node], Mapping[str, Node]], tuple[Node, list[Node]]]
"""Emit, parameter, gradient, state and scalars to the new parameter and the new state."""


def _sgd(
    emit: Emit, parameter: Node, gradient: Node, state: list[Node], scalars: Mapping[str, Node]
) -> tuple[Node, list[Node]]:
    decayed = _decayed(emit, parameter, gradient, scalars)
    momentum = emit(aten.add.Tensor, emit(aten.mul.Tensor, state[0], scalars["momentum"]), decayed)
    step = emit(aten.mul.Tensor, momentum, scalars["learning_rate"])
    return emit(aten.sub.Tensor, parameter, step), [momentum]


def _adam(
    emit: Emit, parameter: Node, gradient: Node, state: list[Node], scalars: Mapping[str, Node]
) -> tuple[Node, list[Node]]:
    decayed = _decayed(emit, parameter, gradient, scalars)
    return _adaptive(emit, parameter, decayed, state, scalars)


def _adamw(
    emit: Emit, parameter: Node, gradient: Node, state: list[Node], scalars: Mapping[str, Node]
) -> tuple[Node, list[Node]]:
    rate = emit(aten.mul.Tensor, scalars["learning_rate"], scalars["weight_decay"])
    shrunk = emit(aten.sub.Tensor, parameter, emit(aten.mul.Tensor, parameter, rate))
    return _adaptive(emit, shrunk, gradient, state, scalars)


def _decayed(emit: Emit, parameter: Node, gradient: Node, scalars: Mapping[str, Node]) -> Node:
    pull = emit(aten.mul.Tensor, parameter, scalars["weight_decay"])
    return emit(aten.add.Tensor, gradient, pull)


def _adaptive(
    emit: Emit, parameter: Node, gradient: Node, state: list[Node], scalars: Mapping[str, Node]
) -> tuple[Node, list[Node]]:
    mean = _towards(emit, state[0], gradient, 1 - BETA_MEAN)
    square = _towards(emit, state[1], emit(aten.mul.Tensor, gradient, gradient), 1 - BETA_SQUARE)
    unbiased = emit(aten.div.Tensor, square, scalars["square_correction"])
    scale = emit(aten.add.Tensor, emit(aten.sqrt.default, unbiased), scalars["epsilon"])
    rate = emit(aten.div.Tensor, scalars["learning_rate"], scalars["mean_correction"])
    step = emit(aten.mul.Tensor, emit(aten.div.Tensor, mean, scale), rate)
    return emit(aten.sub.Tensor, parameter, step), [mean, square]


def _towards(emit: Emit, average: Node, value: Node, share: float) -> Node:
    difference = emit(aten.sub.Tensor, value, average)
    return emit(aten.add.Tensor, average, emit(aten.mul.Tensor, difference, share))


RULES: Mapping[str, Rule] = MappingProxyType({"sgd": _sgd, "adam": _adam, "adamw": _adamw})


def with_update(gradients: GraphModule, name: str) -> GraphModule:
    """Append an optimizer to a graph that returns gradients under their parameters' names.

    The result takes what the graph took, the parameters, the optimizer's state (`momentum/fc.bias`)
    and its scalars; it returns `new/…` of every parameter and state.
    """
    optimizer, rule = OPTIMIZERS[name], RULES[name]
    parameters: list[str] = list(output_node(gradients).meta[NAME])
    graph, root = Graph(), torch.nn.Module()
    for tensor in tensor_names(gradients):
        put_tensor(root, tensor, get_tensor(gradients, tensor))
    results = output_nodes(gradients)
    values: dict[Node, Node] = {}
    theta: dict[str, Node] = {}
    for node in gradients.graph.nodes:
        if node.op == "placeholder":
            values[node] = graph.node_copy(node)
            values[node].meta = dict(node.meta)
            if PARAMETER in node.meta:
                theta[node.meta[PARAMETER]] = values[node]

    def take(title: str, like: Any, meta: dict[str, Any]) -> Node:
        node = graph.placeholder(title.replace("/", "_").replace(".", "_"))
        node.meta = {"val": like, **meta}
        return node

    for parameter, result in zip(parameters, results, strict=True):
        if parameter not in theta:
            meta = {PARAMETER: parameter}
            theta[parameter] = take(f"theta_{parameter}", result.meta["val"], meta)
    state = {
        parameter: [
            take(f"{part}/{parameter}", result.meta["val"], {NAME: f"{part}/{parameter}"})
            for part in optimizer.state
        ]
        for parameter, result in zip(parameters, results, strict=True)
    }
    mode = results[0].meta["val"].fake_mode
    with mode:
        scalar: Tensor = torch.empty(())
    scalars = {title: take(title, scalar, {NAME: title}) for title in optimizer.scalars}
    for node in gradients.graph.nodes:
        if node.op in ("get_attr", "call_function"):
            values[node] = graph.node_copy(node, lambda old: values[old])
            values[node].meta = dict(node.meta)

    def emit(op: Any, *args: Any) -> Node:
        node = graph.call_function(op, args)
        with mode:
            node.meta["val"] = op(*(a.meta["val"] if isinstance(a, Node) else a for a in args))
        return node

    @functools.cache
    def of_rank(rank: int) -> Mapping[str, Node]:
        # onnxruntime takes value by value what has axes of one where the scalar has none.
        return {
            name: emit(aten.reshape.default, node, [1] * rank) for name, node in scalars.items()
        }

    outputs, titles = [], []
    for parameter, result in zip(parameters, results, strict=True):
        moved, kept = rule(
            emit,
            theta[parameter],
            values[result],
            state[parameter],
            of_rank(result.meta["val"].dim()),
        )
        outputs += [moved, *kept]
        titles += [NEW + parameter, *(f"{NEW}{part}/{parameter}" for part in optimizer.state)]
    graph.output(tuple(outputs)).meta[NAME] = titles
    return GraphModule(root, graph)
