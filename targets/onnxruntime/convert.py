"""Convert: one graph of a program becomes an ONNX model.

Frozen tensors become inputs of the model like everything else, so that it depends on the graph's
structure alone; `with_tensors` then gives them their values. This keeps their names, layouts and
bytes (what an exporter transposes or folds, no other graph could share), and graphs that differ
in their tensors' values only are converted once.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, ValueInfoProto, helper
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from pbc.errors import PbcError
from pbc.ir.graph import (
    get_tensor,
    graph_inputs,
    graph_outputs,
    output_names,
    placeholders,
    shape_of,
    tensor_names,
)
from pbc.lower.lowering import unsupported
from pbc.lower.weights import unused
from pbc.targets.onnxruntime.tail import append, cut

# The first with Gelu as one operator; onnxruntime 1.17 and everything after runs it.
OPSET = 20
_KEPT = 64
LOGITS, PROBABILITIES = "logits", "probabilities"

aten = torch.ops.aten

# What the exporter, onnx's checker and onnxruntime say to a graph that they cannot take.
REFUSALS: tuple[type[Exception], ...] = (
    torch.onnx.OnnxExporterError,
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    onnxruntime.capi.onnxruntime_pybind11_state.Fail,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph,
    onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented,
    onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException,
)


class Converter:
    """Converts graphs; those of one structure are exported once, whatever is in their tensors.

    Graphs that differ in the arithmetic of their optimizer at the end share the export of the rest.
    """

    def __init__(self) -> None:
        # The latest last: a compilation meets the graphs of a few levels again and again.
        self._exported: dict[str, ModelProto] = {}

    def __call__(
        self,
        kind: str,
        graph: GraphModule,
        tensors: Sequence[str] | None = None,
        head: Collection[str] = (),
        *,
        open_head: bool = False,
    ) -> ModelProto:
        """Return the model of a graph of this kind; its inputs and outputs keep their names.

        tensors: what to call the frozen tensors, in the order of `tensor_names(graph)`; None for
            their own names. They are the model's last inputs.
        head: the parameters whose first axis counts classes; open_head: leave that number open.

        Raises PbcError for an operator that ONNX or onnxruntime lacks.
        """
        axes = [
            [
                axis
                for axis, size in enumerate(node.meta["val"].shape)
                if isinstance(size, torch.SymInt) or (open_head and axis == 0 and given in head)
            ]
            for node, given in zip(placeholders(graph), graph_inputs(graph), strict=True)
        ]
        try:
            exported = self._whole(graph, axes)
        except REFUSALS as error:
            raise _cannot(kind, graph, error) from error
        model = ModelProto()
        model.CopyFrom(exported)
        frozen = tensor_names(graph) if tensors is None else tensors
        _rename(model, [*graph_inputs(graph), *frozen], graph_outputs(graph))
        _name_dimensions(model.graph, head)
        # Without the level: bodies that are the same have the same bytes, and are loaded once.
        model.graph.name = kind
        return model

    def _whole(self, graph: GraphModule, axes: Sequence[Sequence[int]]) -> ModelProto:
        """Export a graph, or the part of it that is not written here; valid, and it can run."""
        structure = _structure(graph, axes)
        model = self._exported.pop(structure, None)
        if model is None:
            parts = cut(graph)
            if parts is None:
                model = _exported(graph, axes)
            else:
                own = {node.name for node in placeholders(parts.head)}
                pairs = zip(placeholders(graph), axes, strict=True)
                head_axes = [open_axes for node, open_axes in pairs if node.name in own]
                model = append(self._whole(parts.head, head_axes), graph, parts)
            check(model)
        self._exported[structure] = model
        if len(self._exported) > _KEPT:
            del self._exported[next(iter(self._exported))]
        return model


def _structure(graph: GraphModule, axes: Sequence[Sequence[int]]) -> str:
    """All that decides the exported model, as text."""
    lines = [f"opset {OPSET}, open {axes}"]
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            lines.append(f"{node.name}: {value.dtype} {[str(size) for size in value.shape]}")
        elif node.op == "get_attr":
            value = get_tensor(graph, str(node.target))
            lines.append(f"{node.name}: {node.target} {value.dtype} {list(value.shape)}")
        elif node.op == "call_function":
            lines.append(f"{node.name} = {node.target} {node.args} {node.kwargs}")
    return "\n".join([*lines, str(output_names(graph))])


# ---- exporting -----------------------------------------------------------------------------


def _exported(graph: GraphModule, axes: Sequence[Sequence[int]]) -> ModelProto:
    """The model of the graph's inputs and then its frozen tensors, by the exporter's names."""
    module = _tensors_as_inputs(graph)
    multiply_once(module)
    merge_heads(module)
    inputs = placeholders(module)
    arguments = tuple(torch.empty(shape_of(node), dtype=node.meta["val"].dtype) for node in inputs)
    dynamic = [dict.fromkeys(open_axes, torch.export.Dim.DYNAMIC) for open_axes in axes]
    dynamic += [{} for _ in inputs[len(axes) :]]
    with _quiet(), torch.no_grad():
        program = torch.export.export(module, arguments, dynamic_shapes=tuple(dynamic))
    with _quiet(), _shortcuts(program):
        exported = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET)
    assert exported is not None
    model: ModelProto = exported.model_proto
    if len(model.graph.input) != len(inputs):
        raise RuntimeError(f"{len(inputs)} inputs became {len(model.graph.input)}")
    _strip(model)
    transpose_in_products(model.graph)
    retransposed: set[str] = set()
    for value in model.graph.output:
        if value.name in retransposed:
            _return_copy(model.graph, value)
        retransposed.add(value.name)
    return model


def check(model: ModelProto) -> None:
    """Raise onnx's or onnxruntime's own exception for a model that is not valid or cannot run."""
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Operators are looked up; nothing is computed ahead.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what torch.export and the exporter say about themselves."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@functools.cache
def _table() -> Any:
    """The exporter's table of operators; None where its inside is not as it was in torch 2.13."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        return ONNXRegistry.from_torchlib(opset_version=OPSET)
    except (ImportError, AttributeError, TypeError):
        return None


@contextmanager
def _shortcuts(program: torch.export.ExportedProgram) -> Iterator[None]:
    """Spare the exporter two things that take over half of its time, and change no result.

    It makes its table of operators anew for each graph. And it traces the graph once more to take
    apart the operators that the table lacks, also where it lacks none.
    """
    table = _table()
    if table is None:
        yield
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    made = ONNXRegistry.from_torchlib
    ONNXRegistry.from_torchlib = staticmethod(lambda opset_version: table)  # type: ignore
    operators = {
        n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)
    }
    if all(table.is_registered(operator) for operator in operators):
        program.run_decompositions = lambda decompositions: program
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = made  # type: ignore[method-assign]


def _tensors_as_inputs(graph: GraphModule) -> GraphModule:
    """A copy that takes its frozen tensors as further inputs, in the order of `tensor_names`."""
    new = Graph()
    values: dict[Node, Node] = {}
    for node in placeholders(graph):
        values[node] = new.node_copy(node)
    taken: dict[str, Node] = {}
    for name in tensor_names(graph):
        tensor = get_tensor(graph, name)
        taken[name] = new.placeholder(f"frozen_{len(taken)}")
        taken[name].meta = {"val": tensor}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            values[node] = taken[str(node.target)]
        elif node.op != "placeholder":
            values[node] = new.node_copy(node, lambda old: values[old])
    return GraphModule(nn.Module(), new)


def multiply_once(graph: GraphModule) -> None:
    """Multiply by a matrix instead of by a copy of it for each sample, in place.

    Before::

        %expand = expand(%weight, [b, 192, 64])
        %bmm = bmm(%x, %expand)

    After::

        %matmul = matmul(%x, %weight)

    The same holds with the matrix transposed before or after it is expanded, and on the left.
    Derivation writes products like this where a linear layer reads what is not contiguous; an
    engine would make the copies, at each step or, worse, once and for good when it loads.
    """
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target != aten.bmm.default:
            continue
        for place in (1, 0):
            with graph.graph.inserting_before(node):
                matrix = _matrix(graph.graph, node.args[place])
            if matrix is not None:
                node.target = aten.matmul.default
                node.args = (node.args[0], matrix) if place else (matrix, node.args[1])
                break
    graph.graph.eliminate_dead_code()
    graph.recompile()


def merge_heads(graph: GraphModule) -> None:
    """Have attention take whatever axes are between batch and tokens for heads, in place.

    Before::

        %attention = scaled_dot_product_attention(%q, %k, %v)  # [b, 4, 16, 49, 24] each

    After, since the exporter knows attention of four axes alone::

        %attention = scaled_dot_product_attention(%q4, %k4, %v4)  # [b, 64, 49, 24] each
        %reshape = reshape(%attention, [-1, 4, 16, 49, 24])

    Does nothing where the axes differ or a mask has them.
    """
    for node in list(graph.graph.nodes):
        if node.target != aten.scaled_dot_product_attention.default:
            continue
        shapes = [source.meta["val"].shape for source in node.args[:3]]
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        alike = len({shape[1:-2] for shape in shapes}) == 1
        if (
            len(shapes[0]) == 4
            or not alike
            or (mask is not None and len(mask.meta["val"].shape) > 2)
        ):
            continue
        with graph.graph.inserting_before(node):
            merged = [
                graph.graph.call_function(
                    aten.reshape.default, (source, [-1, math.prod(shape[1:-2]), *shape[-2:]])
                )
                for source, shape in zip(node.args[:3], shapes, strict=True)
            ]
        node.args = (*merged, *node.args[3:])
        with graph.graph.inserting_after(node):
            whole = graph.graph.call_function(
                aten.reshape.default, (node, [-1, *shapes[0][1:-1], shapes[2][-1]])
            )
        node.replace_all_uses_with(whole, delete_user_cb=lambda user, own=whole: user is not own)
        whole.meta = dict(node.meta)
    graph.recompile()


def _matrix(graph: Graph, node: Node) -> Node | None:
    """The matrix that a three-dimensional tensor repeats along its first axis, if it does that."""
    if node.op != "call_function":
        return None
    source = node.all_input_nodes[0]
    before, after = _sizes(source), _sizes(node)
    if node.target == aten.expand.default:
        if before == after[1:]:
            return source
        if len(before) == 3 and before[0] == "1" and before[1:] == after[1:]:
            squeezed = graph.call_function(aten.squeeze.dim, (source, 0))
            squeezed.meta = {"val": source.meta["val"][0]}
            return squeezed
        return _matrix(graph, source) if before == after else None
    if node.target in (aten.view.default, aten.reshape.default, aten.clone.default):
        return _matrix(graph, source) if before == after else None
    swaps = node.target == aten.permute.default and list(node.args[1]) == [0, 2, 1]  # type: ignore[arg-type]
    if node.target == aten.transpose.int:
        swaps = {int(axis) % 3 for axis in node.args[1:]} == {1, 2}  # type: ignore[arg-type]
    matrix = _matrix(graph, source) if swaps else None
    if matrix is None:
        return None
    transposed = graph.call_function(aten.permute.default, (matrix, [1, 0]))
    transposed.meta = {"val": matrix.meta["val"].t()}
    return transposed


def transpose_in_products(graph: GraphProto) -> None:
    """Have each Gemm transpose its second matrix itself, in place.

    Else an engine transposes frozen ones once and for good, into copies that no other graph shares.
    """
    transposed = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "Transpose"
        and any(list(entry.ints) == [1, 0] for entry in node.attribute if entry.name == "perm")
    }
    for node in graph.node:
        if node.op_type != "Gemm" or node.input[1] not in transposed:
            continue
        node.input[1] = transposed[node.input[1]].input[0]
        flags = [entry for entry in node.attribute if entry.name == "transB"]
        if flags:
            flags[0].i = 1 - flags[0].i
        else:
            node.attribute.append(helper.make_attribute("transB", 1))
    read = {name for inner in _graphs(graph) for node in inner.node for name in node.input}
    read |= {value.name for value in graph.output}
    for name, node in transposed.items():
        if name not in read:
            graph.node.remove(node)


def _sizes(node: Node) -> list[str]:
    value = node.meta.get("val")
    return [str(size) for size in value.shape] if isinstance(value, Tensor) else []


def _strip(model: ModelProto) -> None:
    """Drop what is of no use on a device: shapes it infers, and traces of where code lay here."""
    model.producer_name = "pbc"
    for field in ("producer_version", "doc_string", "metadata_props"):
        model.ClearField(field)
    del model.graph.value_info[:]
    for graph in _graphs(model.graph):
        for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
            part.ClearField("doc_string")
            part.ClearField("metadata_props")


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and those within its operators."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


# ---- names ---------------------------------------------------------------------------------


def _rename(model: ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Call the inputs and outputs, in order, by these names, and nothing else by one of them."""
    graph = model.graph
    names = dict(zip((value.name for value in graph.input), inputs, strict=True))
    constants = {tensor.name for tensor in graph.initializer}
    for value, name in zip(graph.output, outputs, strict=True):
        if name in inputs:
            # Handed through under its own name: one value then, which the exporter copies.
            (made,) = (node for node in graph.node if value.name in node.output)
            assert (made.op_type, names[made.input[0]]) == ("Identity", name)
            value.name = made.input[0]
            graph.node.remove(made)
            continue
        if value.name in names or value.name in constants:
            _return_copy(graph, value)
        names[value.name] = name
    taken = {*inputs, *outputs}
    for name in _value_names(graph):
        if name not in names:
            names[name] = unused(name, taken)
            taken.add(names[name])
    _apply(graph, names)


def _return_copy(graph: GraphProto, output: ValueInfoProto) -> None:
    """Have an output be a value of its own, where it is an input, a constant or another output."""
    copied = unused(f"{output.name}_retransposed", _value_names(graph))
    graph.node.append(helper.make_node("Identity", [output.name], [copied]))
    output.name = copied


def _value_names(graph: GraphProto) -> dict[str, None]:
    """Every value of the graph, in order."""
    names = dict.fromkeys(value.name for value in (*graph.input, *graph.initializer))
    for inner in _graphs(graph):
        for node in inner.node:
            names.update(dict.fromkeys(name for name in node.output if name))
    return names


def _apply(graph: GraphProto, names: Mapping[str, str]) -> None:
    for inner in _graphs(graph):
        for value in (*inner.input, *inner.output, *inner.initializer):
            value.name = names.get(value.name, value.name)
        for node in inner.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]


def _name_dimensions(graph: GraphProto, head: Collection[str]) -> None:
    """Call the open axes `batch`, `classes` and, where there are others, `size`."""
    names: dict[str, str] = {}
    for value in graph.input:
        # The optimizer's state is called after its parameter: momentum/fc.weight.
        first = "classes" if value.name.rpartition("/")[2] in head else "batch"
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            if dimension.dim_param and dimension.dim_param not in names:
                name = unused("size" if axis else first, set(names.values()))
                names[dimension.dim_param] = name
    for value in (*graph.input, *graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = re.sub(
                    r"[A-Za-z_]\w*",
                    lambda found: names.get(found[0], found[0]),
                    dimension.dim_param,
                )


# ---- what cannot be converted --------------------------------------------------------------


def _cannot(name: str, graph: GraphModule, error: Exception) -> PbcError:
    """The error for a graph that could not be converted: the operator at fault, if it is one."""
    remedy = "replace it in the model, or compile with another --engine"
    seen = set()
    for node in graph.graph.nodes:
        alone = _alone(node) if node.op == "call_function" else None
        if alone is None or (structure := _structure(alone, [])) in seen:
            continue
        seen.add(structure)
        try:
            check(_exported(alone, [[] for _ in placeholders(alone)]))
        except REFUSALS:
            return unsupported(node, "onnxruntime", remedy)
    reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
    return PbcError(f"graph {name} cannot be converted to ONNX: {reason}; {remedy}")


def _alone(node: Node) -> GraphModule | None:
    """A graph of nothing but this node, of fixed sizes; None where it returns no tensor."""
    value: Any = node.meta.get("val")
    many = isinstance(value, (tuple, list))
    first = value[0] if many else value
    sources = {source: source.meta.get("val") for source in node.all_input_nodes}
    fixed = (Tensor, torch.SymInt, int)
    if not isinstance(first, Tensor) or not all(isinstance(v, fixed) for v in sources.values()):
        return None
    graph = Graph()
    known: dict[Node, Any] = {}
    for source, given in sources.items():
        if isinstance(given, Tensor):
            known[source] = graph.placeholder(f"given_{len(known)}")
            known[source].meta = {"val": torch.empty(shape_of(source), dtype=given.dtype)}
        else:
            known[source] = given.node.hint if isinstance(given, torch.SymInt) else given
    arguments = torch.fx.map_arg((node.args, node.kwargs), lambda old: known[old])
    copied = graph.create_node("call_function", node.target, *arguments)
    graph.output((graph.call_function(operator.getitem, (copied, 0)) if many else copied,))
    return GraphModule(nn.Module(), graph)


# ---- tensors -------------------------------------------------------------------------------


def inline(name: str, tensor: Tensor) -> TensorProto:
    """An initializer that holds its own bytes."""
    proto = _described(name, tensor)
    proto.raw_data = tensor.detach().contiguous().numpy().tobytes()
    return proto


def external(name: str, tensor: Tensor, location: str, offset: int, length: int) -> TensorProto:
    """An initializer whose bytes lie in a file of the model's folder."""
    proto = _described(name, tensor)
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(value))
    return proto


def source(tensor: TensorProto) -> tuple[str, int] | None:
    """The file that an initializer's bytes lie in, and where they start there; None if in none."""
    facts = {entry.key: entry.value for entry in tensor.external_data}
    return (facts["location"], int(facts["offset"])) if facts else None


def _described(name: str, tensor: Tensor) -> TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(tensor.detach().numpy().dtype)
    return TensorProto(name=name, data_type=kind, dims=tensor.shape)


def with_tensors(model: ModelProto, tensors: Iterable[TensorProto]) -> ModelProto:
    """The model with these of its inputs given once and for all."""
    complete = ModelProto()
    complete.CopyFrom(model)
    complete.graph.initializer.extend(tensors)
    given = {tensor.name for tensor in complete.graph.initializer}
    left = [value for value in model.graph.input if value.name not in given]
    del complete.graph.input[:]
    complete.graph.input.extend(left)
    return complete


# ---- joining -------------------------------------------------------------------------------


def joined(
    prefix: ModelProto | None, body: ModelProto, tensors: Iterable[TensorProto]
) -> ModelProto:
    """Prefix and body as one model from images to `logits` and `probabilities`.

    tensors: those of its initializers that it holds. The others, and what trains, it only names:
    ModelProto(graph=GraphProto(initializer=…)), serialized and appended, gives it their values,
    since protobuf messages merge when they are put one after the other.
    """
    parts = {"body": body} if prefix is None else {"prefix": prefix, "body": body}
    model = ModelProto()
    model.CopyFrom(body)
    graph = model.graph
    for field in ("node", "input", "initializer"):
        graph.ClearField(field)
    graph.input.extend((body if prefix is None else prefix).graph.input[:1])
    for kind, part in parts.items():
        own = GraphProto()
        own.CopyFrom(part.graph)
        outside = {value.name for value in (*own.input, *own.output)}
        _apply(own, {n: f"{kind}/{n}" for n in _value_names(own) if n not in outside})
        for node in own.node:
            node.name = f"{kind}/{node.name}"
        graph.node.extend(own.node)
        graph.initializer.extend(own.initializer)
    graph.initializer.extend(tensors)
    graph.node.append(helper.make_node("Softmax", [LOGITS], [PROBABILITIES], axis=-1))
    (logits,) = graph.output
    probabilities = graph.output.add()
    probabilities.CopyFrom(logits)
    probabilities.name = PROBABILITIES
    return model


def unresolved(graph: GraphProto) -> list[str]:
    """The values that are read and come from nowhere, in order."""
    read = dict.fromkeys(name for inner in _graphs(graph) for n in inner.node for name in n.input)
    known = _value_names(graph)
    return [name for name in read if name and name not in known]
