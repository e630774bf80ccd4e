"""Capture: an eager module becomes one flat graph of functional operators, for any batch."""

from __future__ import annotations

import inspect
import io
import logging
import operator
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import OutputKind
from torch.fx import Graph, GraphModule, Node

from pbc.errors import PbcError, reason_of
from pbc.frontend import decompositions
from pbc.frontend.gradient_stops import as_nodes, spelt_out
from pbc.frontend.open_batch import OpenBatch
from pbc.frontend.user_code import where_raised
from pbc.ir.graph import get_tensor, op_name, origin, output_node, put_tensor, tensor_names
from pbc.ir.rewrite import ancestors
from pbc.lower.weights import DTYPES
from pbc.runtime.engines.pytorch.ops import OPS

aten = torch.ops.aten

# torch.export infers sizes by dividing; a prime batch that is no model's channel, head or window
# count keeps the batch axis recognisable in every product.
EXAMPLE_BATCH = 13

# What avg_pool2d takes where it is not given.
_POOL: tuple[Any, ...] = (None, None, [], [0, 0], False, True, None)

# What torch.export says, and what a model does to hear it.
_MEANINGS = {
    "data-dependent expression": "its forward decides by the values of a tensor, which no graph "
    "does; torch.where chooses between two results",
    "fake_quantize_per": "its forward rounds as in quantisation-aware training (fake_quantize); "
    "take the float model, which pbc rounds where an engine gains by it",
    ".numpy() is not supported": "its forward computes outside of torch (.numpy())",
}

_RETURNED = (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT)


def capture(
    module: nn.Module,
    shape: tuple[int, int, int],
    trainable: Collection[str] | None = None,
    operators: Collection[str] = OPS,
) -> GraphModule:
    """Export `module` in eval mode for inputs float32 [batch, *shape], any batch.

    The result takes `x`, returns a one-tuple, holds every tensor of the module under the module's
    own name, and contains functional operators only: in-place operators, dropout and copies are
    gone, `view` is `reshape` and a batch norm is one node. Where the model stops a gradient on its
    way to a parameter of `trainable` (None: to any), a `detach` node does.

    An operator that is not among `operators` is taken apart by torch's own decompositions into
    ones of core ATen, until it is.

    Raises PbcError when the model cannot be exported, with torch's own first line and the line of
    the model; when it draws random numbers, reads a tensor's value or keeps state between calls.
    """
    name = type(module).__name__
    with _quiet():
        try:
            exported = _decomposed(functional(module, shape), trainable, operators)
        except PbcError:
            raise
        except Exception as error:
            raise PbcError(
                f"{name} cannot be captured for inputs of shape {shape}: "
                f"{_reason(error)}{where_raised(error)}"
            ) from error
    graph = _unlift(name, exported, _shared(module, trainable or ()))
    _refuse_what_no_file_holds(name, graph)
    _normalise(graph, trainable)
    return _renumber(graph)


def _refuse_what_no_file_holds(name: str, graph: GraphModule) -> None:
    for title in tensor_names(graph):
        dtype = get_tensor(graph, title).dtype
        if dtype not in DTYPES:
            remedy = "; keep real and imaginary parts on a last axis of two, and take "
            raise PbcError(
                f"{name} has {title} in {str(dtype).removeprefix('torch.')}, which a bundle does "
                f"not hold{remedy + 'torch.view_as_complex of it' if dtype.is_complex else ''}"
            )


def _reason(error: Exception) -> str:
    reason = reason_of(error)
    if reason.startswith("Constraints violated"):  # of the batch: no other size is open
        return (
            "its forward is made for one number of images, such as by a loop over them; let it "
            "take any"
        )
    for words, meaning in _MEANINGS.items():
        if words in reason:
            return meaning
    return reason


def functional(module: nn.Module, shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """Export `module` whole, in functional operators, its stops of gradients as nodes.

    Raises PbcError where its logits are more than a function of the image, and whatever torch does.
    """
    example = torch.zeros(EXAMPLE_BATCH, *shape)
    batch: Any = {0: torch.export.Dim.DYNAMIC}
    first = next(iter(inspect.signature(module.forward).parameters.values()), None)
    if first is not None and first.kind is inspect.Parameter.VAR_POSITIONAL:
        batch = (batch,)  # forward(self, *images)
    with spelt_out(), OpenBatch():
        exported = torch.export.export(module.eval(), (example,), dynamic_shapes=(batch,))
    _refuse_what_is_no_function(type(module).__name__, exported)
    as_nodes(exported.graph_module)
    made: torch.export.ExportedProgram = exported.run_decompositions({})
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what torch.export says while it works.

    That is deprecation notices about itself, and, ahead of an error, the graph so far.
    """
    log = logging.getLogger("torch")
    level = log.level
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)


def _refuse_what_is_no_function(name: str, exported: torch.export.ExportedProgram) -> None:
    """Raise PbcError where the logits are more than a function of the image."""
    for graph in exported.graph_module.modules():
        if not isinstance(graph, GraphModule):
            continue
        for node in graph.graph.nodes:
            if not isinstance(node.target, torch._ops.OpOverload) or not node.users:
                continue
            if torch.Tag.nondeterministic_seeded in node.target.tags and _draws(node):
                raise PbcError(
                    f"{name} draws random numbers in forward ({op_name(node)}{origin(node)}); "
                    "pbc runs models in eval mode, where there must be none: pass "
                    "training=self.training to what drops values"
                )
            if node.target is aten.item.default:
                raise PbcError(
                    f"{name} reads a tensor's value in forward (item{origin(node)}), which no "
                    "graph keeps; keep it a tensor, detached if no gradient should pass"
                )


def _draws(node: Node) -> bool:
    """Whether an operator that can be random is, by its arguments."""
    given = {
        argument.name: node.args[at]
        if at < len(node.args)
        else node.kwargs.get(argument.name, argument.default_value)
        for at, argument in enumerate(node.target._schema.arguments)  # type: ignore[union-attr]
    }
    trains = given.get("train", given.get("training", True))
    return bool(trains) and 0.0 not in (given.get("p"), given.get("dropout_p"))


def _decomposed(
    exported: torch.export.ExportedProgram,
    trainable: Collection[str] | None,
    operators: Collection[str],
) -> torch.export.ExportedProgram:
    """Take apart what is not among `operators`.

    What is made of frozen tensors alone stays whole: it is computed here, and no engine meets it.
    """
    parts = decompositions.table()
    done: set[Any] = set()
    while True:
        unknown = {
            node.target
            for node in _at_run_time(exported, trainable)
            if isinstance(node.target, torch._ops.OpOverload)
            and node.users
            and op_name(node) not in operators
            and node.target in parts
        } - done
        if not unknown:
            return exported
        exported = exported.run_decompositions({op: parts[op] for op in unknown})
        done |= unknown


def _at_run_time(
    exported: torch.export.ExportedProgram, trainable: Collection[str] | None
) -> set[Node]:
    """Nodes that depend on the image or on a trainable parameter (None: on any)."""
    signature = exported.graph_signature
    names = signature.parameters if trainable is None else trainable
    frozen = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    reached: set[Node] = set()
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name not in frozen or frozen[node.name] in names:
                reached.add(node)
        elif not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def _shared(module: nn.Module, trainable: Collection[str]) -> dict[str, str]:
    """Of a trainable parameter that layers share, its other names, each with the trainable one."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    titles: dict[int, str] = {}
    for name, parameter in parameters.items():
        if name in trainable:
            titles.setdefault(id(parameter), name)
    return {
        name: titles[id(parameter)]
        for name, parameter in parameters.items()
        if id(parameter) in titles
    }


def _unlift(
    name: str, exported: torch.export.ExportedProgram, shared: Mapping[str, str]
) -> GraphModule:
    """Turn the exported program's lifted tensors back into get_attr nodes of a graph module.

    shared: names of parameters that go by another.
    """
    root = nn.Module()
    graph = Graph()
    values: dict[Node, Node] = {}
    signature = exported.graph_signature
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**exported.state_dict, **exported.constants}
    images = [n for n in exported.graph.nodes if n.name in signature.user_inputs]
    if len(images) != 1:
        raise PbcError(f"the model takes {len(images)} inputs; pbc trains models that take one")
    logits = _logits(name, exported)
    needed = ancestors([logits])
    for node in exported.graph.nodes:
        if node.op == "call_function" and node not in needed:
            continue  # what is written to, and checks for which the program takes a token
        if node.op == "placeholder":
            if node in images:
                copied = graph.placeholder("x")
            elif node.name not in lifted:
                continue
            else:
                own = lifted[node.name]
                title = shared.get(own, own)
                tensor = tensors[own].detach()
                if own in signature.parameters:
                    tensor = nn.Parameter(tensor, requires_grad=False)
                put_tensor(root, title, tensor)
                copied = graph.get_attr(title)
        elif node.op == "output":
            copied = graph.output((values[logits],))
        else:
            copied = graph.node_copy(node, lambda old: values[old])
        copied.meta = {
            k: node.meta[k] for k in ("val", "stack_trace", "nn_module_stack") if k in node.meta
        }
        values[node] = copied
    return GraphModule(root, graph)


def _logits(name: str, exported: torch.export.ExportedProgram) -> Node:
    """The one value that the model returns; what else it writes must be nothing that it reads."""
    outputs: Sequence[Node] = exported.graph.output_node().args[0]
    specs = exported.graph_signature.output_specs
    returned = [n for n, spec in zip(outputs, specs, strict=True) if spec.kind in _RETURNED]
    if len(returned) != 1 or not isinstance(returned[0].meta["val"], Tensor):
        raise PbcError(f"the model returns {len(returned)} values; pbc trains one logits tensor")
    needed = ancestors(returned)
    signature = exported.graph_signature
    titles = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    read = {titles[node.name] for node in needed if node.name in titles}
    for node, spec in zip(outputs, specs, strict=True):
        if spec.kind not in _RETURNED and spec.target in read:
            raise PbcError(
                f"{name} changes its {spec.target} in forward{origin(node)} and reads it; the "
                "graphs of a bundle keep no state from one batch to the next"
            )
    return returned[0]


def _normalise(graph: GraphModule, trainable: Collection[str] | None) -> None:
    """Bring equivalent spellings of one operation into the one that has dimension rules."""
    carries = _gradient_carriers(graph, trainable)
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.detach.default and node.args[0] in carries:
            continue
        if node.target in (
            aten.clone.default,
            aten.alias.default,
            aten.lift_fresh_copy.default,
            aten.detach.default,
        ):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            # The copies that made a view legal are gone, so let reshape make its own.
            node.target = aten.reshape.default
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            _single_batch_norm(graph, node)
        elif node.target is aten.avg_pool2d.default:
            _mean_of_windows(graph, node)
        elif node.target is aten.clamp.default and node.meta["val"].is_floating_point():
            # Exporters give each bound its own type, and 0 beside 0.5 is two of them.
            node.args = (node.args[0], *(_as_float(bound) for bound in node.args[1:]))
        elif node.target is aten.split.Tensor and isinstance(node.args[1], Node):
            _parts_of_the_batch(graph, node)
        elif node.target is aten.copy.default:
            _written_value(graph, node)
        elif node.target is aten._to_copy.default and _is_float32(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    for node in reversed(list(graph.graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    assert isinstance(output_node(graph).args[0], (tuple, list))


def _as_float(bound: Any) -> Any:
    return float(bound) if isinstance(bound, int) else bound


def _gradient_carriers(graph: GraphModule, trainable: Collection[str] | None) -> set[Node]:
    """Nodes through which a gradient reaches a trainable parameter (None: any parameter)."""
    names = dict(graph.named_parameters()) if trainable is None else trainable
    carriers: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            if node.target in names:
                carriers.add(node)
        elif node.target is not aten.detach.default and not carriers.isdisjoint(
            node.all_input_nodes
        ):
            carriers.add(node)
    return carriers


def _renumber(graph: GraphModule) -> GraphModule:
    """Name every node after its operator, `relu`, `relu_1` and so on, from the input."""
    new = Graph()
    values: dict[Node, Node] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function":
            arguments = torch.fx.map_arg((node.args, node.kwargs), lambda old: values[old])
            word = op_name(node).removeprefix("aten.").removeprefix("operator.").partition(".")[0]
            copied = new.create_node("call_function", node.target, *arguments, name=word)
        else:
            copied = new.node_copy(node, lambda old: values[old])
        copied.meta = dict(node.meta)
        values[node] = copied
    return GraphModule(graph, new)


def _single_batch_norm(graph: GraphModule, node: Node) -> None:
    x, weight, bias, mean, variance, momentum, epsilon = node.args
    with graph.graph.inserting_before(node):
        single = graph.graph.call_function(
            aten.batch_norm.default,
            (x, weight, bias, mean, variance, False, momentum, epsilon, False),
        )
    single.meta = dict(node.meta)
    for user in list(node.users):
        if user.target is not operator.getitem or user.args[1] != 0:
            raise PbcError(
                "a batch norm's saved statistics are read by the model; that is not supported"
            )
        single.meta["val"] = user.meta["val"]
        user.replace_all_uses_with(single)
        graph.graph.erase_node(user)
    graph.graph.erase_node(node)


def _mean_of_windows(graph: GraphModule, node: Node) -> None:
    """Let a pool with a divisor of its own be a mean and a factor: the ONNX exporter drops it."""
    given: tuple[Any, ...] = (*node.args, *_POOL[len(node.args) :])
    x, size, stride, padding, ceil_mode, _, divisor = given
    if divisor is None or ceil_mode:
        return
    height, width = (*size, *size)[:2]
    with graph.graph.inserting_before(node):
        mean = graph.graph.call_function(
            aten.avg_pool2d.default, (x, size, stride, padding, False, True)
        )
        total = graph.graph.call_function(aten.mul.Tensor, (mean, height * width / divisor))
    mean.meta, total.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(total)
    graph.graph.erase_node(node)


def _parts_of_the_batch(graph: GraphModule, node: Node) -> None:
    """Let parts that are as long as the batch be slices, which every engine has for any batch."""
    size: Any
    source, size, *axis = node.args
    for part in list(node.users):
        number: Any = part.args[1]
        with graph.graph.inserting_before(part):
            start, end = (_times(graph, size, factor) for factor in (number, number + 1))
            taken = graph.graph.call_function(
                aten.slice.Tensor, (source, *(axis or [0]), start, end)
            )
        taken.meta = dict(part.meta)
        part.replace_all_uses_with(taken)
        graph.graph.erase_node(part)
    graph.graph.erase_node(node)


def _times(graph: GraphModule, size: Node, factor: int) -> Node | int:
    if factor < 2:
        return size if factor else 0
    product = graph.graph.call_function(operator.mul, (size, factor))
    product.meta["val"] = size.meta["val"] * factor
    return product


def _written_value(graph: GraphModule, node: Node) -> None:
    """Let what is written over a tensor be itself, in that size and type; copies lack gradients."""
    target, source = node.args[:2]
    assert isinstance(target, Node)
    assert isinstance(source, Node)
    value, given = node.meta["val"], source.meta["val"]
    written = source
    with graph.graph.inserting_before(node):
        if given.dtype != value.dtype:
            written = graph.graph.call_function(
                aten._to_copy.default, (written,), {"dtype": value.dtype}
            )
            written.meta = {**node.meta, "val": given.to(value.dtype)}
        if given.shape != value.shape:
            written = graph.graph.call_function(aten.expand_as.default, (written, target))
            written.meta = dict(node.meta)
    node.replace_all_uses_with(written)
    graph.graph.erase_node(node)


def _is_float32(node: Node) -> bool:
    source = node.args[0]
    return isinstance(source, Node) and source.meta["val"].dtype == node.meta["val"].dtype
