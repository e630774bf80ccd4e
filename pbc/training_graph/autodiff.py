"""Differentiate a body ahead of time: its graph in, the graphs of a training step out.

The gradient is torch's own, traced once: autograd runs on stand-ins whose batch axis is a symbol,
and every operator that it calls is written down. What it calls and no inference engine has is
taken apart by `pbc.training_graph.decompositions`.
"""

from __future__ import annotations

import contextlib
import math
import operator
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.traceback import preserve_node_meta, set_current_meta

from pbc.errors import PbcError
from pbc.frontend.capture import EXAMPLE_BATCH
from pbc.ir.graph import (
    GRADIENT,
    NAME,
    PARAMETER,
    get_tensor,
    op_name,
    origin,
    output_node,
    placeholders,
    put_tensor,
    shape_of,
    tensor_names,
)
from pbc.ir.rewrite import ancestors, copy_graph
from pbc.training_graph import decompositions
from pbc.training_graph.traced import ONLY_FOR_AUTOGRAD, simplify

aten = torch.ops.aten

LABELS = "labels"
SMOOTHING = "label_smoothing"
LOSS, LOSSES, LOGITS = "loss", "losses", "logits"
SAVED = "saved/"

# A saved tensor that one of these makes of another is made again instead of kept: engines do it
# for nothing, or for less than the memory traffic.
_REMADE = frozenset(
    (
        aten.detach.default,
        aten.expand.default,
        aten.permute.default,
        aten.reshape.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
    )
)
# Images per mini-batch where a choice depends on it.
_BATCH = 8


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
    joint, names = _joint(body, open_axes)
    titles = _name_inputs(joint, body)
    simplify(joint)
    return _cut(joint, names, titles)


# ---- tracing -------------------------------------------------------------------------------


def _norms_joined(body: GraphModule) -> GraphModule:
    """A copy in which norms scale the trained kernels before them instead of what those put out.

    Only where that is less: beside large kernels over small pictures it is not.
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
                joined = graph.graph.call_function(
                    decompositions.normed_convolution, (layer.args, norm.args[1:])
                )
            joined.meta = dict(layer.meta)
            norm.replace_all_uses_with(joined)
            graph.graph.erase_node(norm)
            graph.graph.erase_node(layer)
    graph.recompile()
    return graph


class _Forward(Interpreter):
    """Runs a body on stand-ins, its frozen tensors given, some operators taken apart.

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
            self._parts[source, axis] = decompositions.unbind(self.env[source], axis)
        return self._parts[source, axis][index]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return decompositions.DIFFERENTIABLE.get(target, target)(*args, **kwargs)


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


def _joint(body: GraphModule, open_axes: Mapping[str, int]) -> tuple[GraphModule, list[str]]:
    """One graph from all inputs to loss, losses, logits and gradients; whose gradients they are."""
    nodes, tensors = placeholders(body), tensor_names(body)
    parameters = [node.meta[PARAMETER] for node in nodes if PARAMETER in node.meta]
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    batch = _symbol(mode, EXAMPLE_BATCH)
    values = _stand_ins(mode, nodes, batch, open_axes)
    reached: list[str] = []
    joined = _norms_joined(body)

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
    with mode, enable_python_dispatcher(), _quiet():
        frozen = [
            mode.from_tensor(get_tensor(body, name).detach(), static_shapes=True)
            for name in tensors
        ]
        labels = torch.empty(batch, dtype=torch.int64)
        try:
            with decompositions.frozen(frozen):
                joint = _traced(step, values, frozen, labels, torch.empty(()))
        except (NotImplementedError, RuntimeError) as error:
            raise _without_gradient(body, nodes, values, frozen, error) from error
    return joint, reached


def _traced(function: Callable[..., Any], *arguments: Any) -> GraphModule:
    """Every operator that the function calls; NotImplementedError for one that is not a function.

    Results that are written to, or read by strides, mean something in torch's memory alone.
    """
    with preserve_node_meta():
        trace = make_fx(function, decomposition_table=decompositions.table())(*arguments)
    for node in trace.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or node.target in ONLY_FOR_AUTOGRAD:
            continue
        if schema.is_mutable or "strided" in schema.name:
            raise NotImplementedError(f"torch takes it apart into {op_name(node)}")
    return trace


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
    """Per-sample losses f32 [b] (Szegedy et al., CVPR 2016, §7), as torch's cross_entropy."""
    scores = torch.log_softmax(logits, 1)
    # Not a gather: its gradient is a scatter, which few engines run in parallel.
    is_label = labels.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)
    of_label = torch.where(is_label, scores, 0.0).sum(1)
    return (smoothing - 1) * of_label - smoothing * scores.mean(1)


def _stand_ins(
    mode: FakeTensorMode, nodes: Sequence[Node], batch: torch.SymInt, open_axes: Mapping[str, int]
) -> list[Tensor]:
    """What the inputs are while tracing: the batch a symbol, open axes one symbol together.

    They share nothing with the program's own stand-ins, whose batch any pass may have pinned.
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _without_gradient(
    body: GraphModule,
    nodes: Sequence[Node],
    values: Sequence[Tensor],
    frozen: Sequence[Tensor],
    error: Exception,
) -> Exception:
    """The error that names the operator at fault: the first that fails on its own."""
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
                "decomposition to pbc/training_graph/decompositions.py"
            )
    return error


def _alone(node: Node, known: Mapping[Node, Any]) -> None:
    """Run one operator on stand-ins, and its gradient with respect to every real input."""
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
        result = decompositions.DIFFERENTIABLE.get(node.target, node.target)(*args, **kwargs)  # type: ignore[operator]
        parts = result if isinstance(result, (list, tuple)) else [result]
        real = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
        if real:
            torch.autograd.grad([part.sum() for part in real], leaves, allow_unused=True)
        return result

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _traced(lambda inputs: (run(inputs), 0)[1], [])


def _sized(value: Any) -> Any:
    """The stand-in at the example's sizes: those that the program has are no symbols of a trace."""
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
        sizes = [s.node.hint if isinstance(s, torch.SymInt) else s for s in value.shape]
        return torch.empty(sizes, dtype=value.dtype)
    return value


# ---- from the trace to two graphs ----------------------------------------------------------


def _name_inputs(joint: GraphModule, body: GraphModule) -> dict[Node, str]:
    """Put frozen inputs of the trace back into its module; return what the others are called."""
    nodes, tensors, traced = placeholders(body), tensor_names(body), placeholders(joint)
    titles = dict(zip(traced[-2:], (LABELS, SMOOTHING), strict=True))
    for node, of_body in zip(traced, nodes, strict=False):
        titles[node] = of_body.name
        if PARAMETER in of_body.meta:
            node.meta[PARAMETER] = of_body.meta[PARAMETER]
    for node, name in zip(traced[len(nodes) : -2], tensors, strict=True):
        put_tensor(joint, name, get_tensor(body, name))
        with joint.graph.inserting_before(node):
            read = joint.graph.get_attr(name)
        read.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(read)
        joint.graph.erase_node(node)
    return titles


def _cut(joint: GraphModule, parameters: Sequence[str], titles: dict[Node, str]) -> Gradient:
    """Split where the loss is known: what it needs, and what only the gradients need."""
    results: list[Node] = list(output_node(joint).args[0])  # type: ignore[arg-type]
    answers, gradients = results[:3], results[3:]
    first = ancestors(answers)
    # Whoever computes several results computes those, too, that the backward alone reads.
    first |= {n for n in joint.graph.nodes if n.target is operator.getitem and n.args[0] in first}
    second = ancestors(gradients) - first
    saved = _saved(second, first)
    titles = titles | {node: node.name for node in saved}
    forward = _part(joint, first, [], answers + saved, titles)
    output_node(forward).meta[NAME] = [LOSS, LOSSES, LOGITS] + [SAVED + n.name for n in saved]
    for node in second:
        node.meta[GRADIENT] = True
    again = _remade(second, first)
    backward = _part(joint, second | again, saved, gradients, titles, late=again)
    output_node(backward).meta[NAME] = list(parameters)
    return Gradient(forward, backward, tuple(parameters))


def _remade(second: set[Node], first: set[Node]) -> set[Node]:
    """Nodes of the forward that the backward makes again, from what is saved or given."""
    again: set[Node] = set()
    waiting = [source for node in second for source in node.all_input_nodes if source in first]
    while waiting:
        node = waiting.pop()
        if node not in again and _is_remade(node):
            again.add(node)
            waiting += node.all_input_nodes
    return again


def _is_remade(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.meta["val"], (int, torch.SymInt)):
        return True
    return node.target in _REMADE or all(n.op != "placeholder" for n in ancestors([node]))


def _saved(second: set[Node], first: set[Node]) -> list[Node]:
    """What the backward reads of the forward, inputs and frozen tensors aside."""
    readers = second | _remade(second, first)
    read = {source for node in readers for source in node.all_input_nodes} - readers
    return [
        node
        for node in next(iter(second)).graph.nodes
        if node in read and node.op == "call_function"
    ]


def _part(
    joint: GraphModule,
    inside: set[Node],
    saved: Sequence[Node],
    results: Sequence[Node],
    titles: Mapping[Node, str],
    late: Collection[Node] = (),
) -> GraphModule:
    """The nodes `inside` as a graph of their own, with the inputs they read and what was saved.

    Those in `late` come right before whoever reads them first: nothing lies around until then.
    """
    graph, root = Graph(), torch.nn.Module()
    values: dict[Node, Node] = {}
    read = {source for node in inside for source in node.all_input_nodes} | set(results)
    for node in joint.graph.nodes:
        if node in read and (node.op == "placeholder" or node in saved):
            # First of all, so that it is the others whose names give way.
            values[node] = graph.placeholder(titles[node])
            # A feature and a saved tensor may have one title: the argument is called otherwise.
            values[node].target = values[node].name
            values[node].meta = {k: node.meta[k] for k in ("val", PARAMETER) if k in node.meta}
            values[node].meta[NAME] = (SAVED if node in saved else "") + titles[node]

    def place(node: Node) -> None:
        for source in node.all_input_nodes:
            if source in late and source not in values:
                place(source)
        values[node] = graph.node_copy(node, lambda old: values[old])
        kept = ("val", "stack_trace", "nn_module_stack", GRADIENT)
        values[node].meta = {key: node.meta[key] for key in kept if key in node.meta}

    for node in joint.graph.nodes:
        frozen = node.op == "get_attr" and node in read
        if frozen:
            put_tensor(root, str(node.target), get_tensor(joint, str(node.target)))
        if frozen or (node.op == "call_function" and node in inside and node not in late):
            place(node)
    graph.output(tuple(values[node] for node in results))
    return GraphModule(root, graph)
