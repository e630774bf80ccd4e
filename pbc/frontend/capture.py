"""Capture: an eager module becomes one flat graph of functional operators, for any batch."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from pbc.errors import PbcError
from pbc.ir.graph import op_name, output_node, put_tensor

aten = torch.ops.aten

# torch.export infers sizes by dividing; a prime batch that is no model's channel, head or window
# count keeps the batch axis recognisable in every product.
EXAMPLE_BATCH = 13


def capture(module: nn.Module, shape: tuple[int, int, int]) -> GraphModule:
    """Export `module` in eval mode for inputs float32 [batch, *shape], any batch.

    The result takes `x`, returns a one-tuple, holds every tensor of the module under the module's
    own name, and contains functional operators only: in-place operators, dropout and copies are
    gone, `view` is `reshape` and a batch norm is one node.

    Raises PbcError when the model cannot be exported, with torch's own first line.
    """
    example = torch.zeros(EXAMPLE_BATCH, *shape)
    with _quiet():
        try:
            exported = torch.export.export(
                module.eval(), (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
            ).run_decompositions({})
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise PbcError(
                f"{type(module).__name__} cannot be captured for inputs of shape {shape}: "
                f"{reason[0] if reason else type(error).__name__}"
            ) from error
    graph = _unlift(exported)
    _normalise(graph)
    return _renumber(graph)


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop the deprecation notices that torch.export raises about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def _unlift(exported: torch.export.ExportedProgram) -> GraphModule:
    """Turn the exported program's lifted tensors back into get_attr nodes of a graph module."""
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
    images = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name not in lifted]
    if len(images) != 1:
        raise PbcError(f"the model takes {len(images)} inputs; pbc trains models that take one")
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node in images:
                copied = graph.placeholder("x")
            else:
                name = lifted[node.name]
                tensor = tensors[name].detach()
                if name in signature.parameters:
                    tensor = nn.Parameter(tensor, requires_grad=False)
                put_tensor(root, name, tensor)
                copied = graph.get_attr(name)
        elif node.op == "output":
            outputs = node.args[0]
            if len(outputs) != 1 or not isinstance(outputs[0].meta["val"], Tensor):
                raise PbcError(
                    f"the model returns {len(outputs)} values; pbc trains one logits tensor"
                )
            copied = graph.output((values[outputs[0]],))
        else:
            copied = graph.node_copy(node, lambda old: values[old])
        copied.meta = {
            k: node.meta[k] for k in ("val", "stack_trace", "nn_module_stack") if k in node.meta
        }
        values[node] = copied
    return GraphModule(root, graph)


def _normalise(graph: GraphModule) -> None:
    """Bring equivalent spellings of one operation into the one that has dimension rules."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (
            aten.clone.default,
            aten.alias.default,
            aten.lift_fresh_copy.default,
            aten.detach.default,
            aten.detach_.default,
        ):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            # The copies that made a view legal are gone, so let reshape make its own.
            node.target = aten.reshape.default
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            _single_batch_norm(graph, node)
        elif node.target is aten._to_copy.default and _is_float32(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    for node in reversed(list(graph.graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    assert isinstance(output_node(graph).args[0], (tuple, list))


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


def _is_float32(node: Node) -> bool:
    source = node.args[0]
    return isinstance(source, Node) and source.meta["val"].dtype == node.meta["val"].dtype
