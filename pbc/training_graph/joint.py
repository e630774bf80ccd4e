"""Trace a body, its loss and the gradient of that as one graph.

The gradient is torch's own, traced once: autograd runs on fake tensors whose batch axis is a
symbol, and every operator that it calls is written down.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.traceback import set_current_meta

from pbc.frontend.capture import EXAMPLE_BATCH
from pbc.ir.graph import PARAMETER, get_tensor, placeholders, put_tensor, shape_of, tensor_names
from pbc.training_graph.decompositions import DIFFERENTIABLE
from pbc.training_graph.decompositions.constants import frozen as constants
from pbc.training_graph.decompositions.slices import unbind
from pbc.training_graph.fuse_norms import fuse_norms
from pbc.training_graph.names import LABELS, SMOOTHING
from pbc.training_graph.refusal import without_gradient
from pbc.training_graph.select_channels import select_channels
from pbc.training_graph.trace import traced

aten = torch.ops.aten


class _Forward(Interpreter):
    """Runs a body on fake tensors, its frozen ones given, some operators taken apart.

    What autograd then does for an operator is written down as coming from where that came from.
    """

    def __init__(self, graph: GraphModule, frozen: Mapping[str, Tensor]) -> None:
        super().__init__(graph)
        self._frozen = frozen
        self._parts: dict[tuple[Node, int], tuple[Tensor, ...]] = {}
        self._known: set[Any] = set()

    def run_node(self, node: Node) -> Any:
        result = self._value(node)
        parts = result if isinstance(result, (list, tuple)) else [result]
        waiting = [part.grad_fn for part in parts if isinstance(part, Tensor)]
        while waiting:
            function = waiting.pop()
            if function is not None and function not in self._known:
                self._known.add(function)
                _attribute(function, node)
                waiting += [source for source, _ in function.next_functions]
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._frozen[target]

    def _value(self, node: Node) -> Any:
        place = _part_of_all(node)
        if place is None:
            return super().run_node(node)
        source, axis, index = place
        if (source, axis) not in self._parts:
            self._parts[source, axis] = unbind(self.env[source], axis)
        return self._parts[source, axis][index]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return DIFFERENTIABLE.get(target, target)(*args, **kwargs)


def _attribute(function: Any, node: Node) -> None:
    """Let what a step of autograd writes down carry the origin of `node`."""
    running = contextlib.ExitStack()

    def enter(gradients: Any) -> None:
        running.enter_context(set_current_meta(node))

    def leave(given: Any, made: Any) -> None:
        running.close()

    function.register_prehook(enter)
    function.register_hook(leave)


def _part_of_all(node: Node) -> tuple[Node, int, int] | None:
    """Tensor, axis and index if this selects, and others select all else along that axis."""
    if node.target != aten.select.int:
        return None
    source, axis, index = node.args
    assert isinstance(source, Node)
    assert isinstance(axis, int)
    assert isinstance(index, int)
    size = source.meta["val"].shape[axis]
    taken = {
        user.args[2] for user in source.users if user.target == node.target and user.args[1] == axis
    }
    return (source, axis, index) if taken == set(range(size)) else None


@dataclass(frozen=True)
class Joint:
    """A step's forward and backward as one graph, `simplify` and `partition` to come.

    graph: from all inputs to loss, losses, logits, and the gradients of `parameters`.
    names: of its inputs.
    """

    graph: GraphModule
    parameters: tuple[str, ...]
    names: Mapping[Node, str]


def trace_joint(body: GraphModule, open_axes: Mapping[str, int]) -> Joint:
    """Trace cross-entropy on the body's logits and its gradient.

    open_axes: by parameter name, the axis whose size the device decides. Raises PbcError for an
    operator without a gradient.
    """
    nodes, tensors = placeholders(body), tensor_names(body)
    parameters = [node.meta[PARAMETER] for node in nodes if PARAMETER in node.meta]
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    batch = _symbol(mode, EXAMPLE_BATCH)
    values = _fake_inputs(mode, nodes, batch, open_axes)
    reached: list[str] = []
    joined = select_channels(fuse_norms(body))

    def step(inputs: list[Tensor], frozen: list[Tensor], labels: Tensor, smoothing: Tensor) -> Any:
        leaves = [
            value.detach().requires_grad_() if PARAMETER in node.meta else value
            for node, value in zip(nodes, inputs, strict=True)
        ]
        theta = [leaf for leaf in leaves if leaf.requires_grad]
        (logits,) = _Forward(joined, dict(zip(tensors, frozen, strict=True))).run(*leaves)
        losses = cross_entropy(logits, labels, smoothing)
        loss = losses.mean()
        # Of the mean, without the mean: its own gradient would read it, and it would be saved.
        share = aten.div.Scalar(aten.full.default([batch], 1.0, dtype=losses.dtype), batch)
        gradients = torch.autograd.grad(losses, theta, share, allow_unused=True)
        found = [
            (name, gradient)
            for name, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
        ]
        reached.extend(name for name, _ in found)
        return loss.detach(), losses.detach(), logits.detach(), *(grad for _, grad in found)

    # The dispatcher keeps symbolic sizes symbolic in operators that torch composes of others.
    with mode, enable_python_dispatcher():
        frozen = [
            mode.from_tensor(get_tensor(body, name).detach(), static_shapes=True)
            for name in tensors
        ]
        labels = torch.empty(batch, dtype=torch.int64)
        try:
            with constants(frozen):
                joint = traced(step, values, frozen, labels, torch.empty(()))
        except (NotImplementedError, RuntimeError) as error:
            raise without_gradient(body, nodes, values, frozen, error) from error
    return Joint(joint, tuple(reached), _name_inputs(joint, body))


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
    """Per-sample losses f32 [b] (Szegedy et al., CVPR 2016, §7), as torch's cross_entropy."""
    scores = torch.log_softmax(logits, 1)
    # Not a gather: its gradient is a scatter, which few engines run in parallel.
    is_label = labels.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)
    of_label = torch.where(is_label, scores, 0.0).sum(1)
    return (smoothing - 1) * of_label - smoothing * scores.mean(1)


def _fake_inputs(
    mode: FakeTensorMode, nodes: Sequence[Node], batch: torch.SymInt, open_axes: Mapping[str, int]
) -> list[Tensor]:
    """The inputs while tracing: the batch a symbol, open axes one symbol together.

    They share nothing with the program's own fake tensors, whose batch any pass may have pinned.
    """
    opened = _symbol(mode, _OPEN_EXAMPLE)
    values = []
    for node in nodes:
        sizes: list[Any] = list(shape_of(node))
        if PARAMETER not in node.meta:
            sizes[0] = batch
        elif node.meta[PARAMETER] in open_axes:
            sizes[open_axes[node.meta[PARAMETER]]] = opened
        with mode:
            values.append(torch.empty(sizes, dtype=node.meta["val"].dtype))
    return values


def _symbol(mode: FakeTensorMode, size: int) -> torch.SymInt:
    """A size that is only known on the device, and `size` here."""
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC], constraint_sizes=[None]
    )
    symbol = mode.from_tensor(torch.empty(size), symbolic_context=context).shape[0]
    assert isinstance(symbol, torch.SymInt)
    return symbol


# No channel, head or batch count of a model, so that the open axis keeps a symbol of its own.
_OPEN_EXAMPLE = 1013


def _name_inputs(joint: GraphModule, body: GraphModule) -> dict[Node, str]:
    """Put frozen inputs of the trace back into its module; return what the others are called."""
    nodes, tensors, inputs = placeholders(body), tensor_names(body), placeholders(joint)
    names = dict(zip(inputs[-2:], (LABELS, SMOOTHING), strict=True))
    for node, of_body in zip(inputs, nodes, strict=False):
        names[node] = of_body.name
        if PARAMETER in of_body.meta:
            node.meta[PARAMETER] = of_body.meta[PARAMETER]
    for node, name in zip(inputs[len(nodes) : -2], tensors, strict=True):
        put_tensor(joint, name, get_tensor(body, name))
        with joint.graph.inserting_before(node):
            read = joint.graph.get_attr(name)
        read.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(read)
        joint.graph.erase_node(node)
    return names
