"""Dimension rules: what each operator says about the sizes of its inputs and outputs.

Each rule joins the variables that the operator ties together, fixes those that it needs whole, and
returns the axes of the result. A reshape splits a variable: fused qkv becomes [3, heads, head
size]. An operator without a rule fixes everything it touches, so an unknown model is never pruned
wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from pbc.ir.dims import (
    CHANNELS,
    HEAD_SIZE,
    HEADS,
    WINDOW,
    Axis,
    Cost,
    Dims,
    Variable,
    atoms,
    fix,
    join,
    size,
    split,
)
from pbc.ir.graph import PARAMETER, op_name, output_nodes, placeholders, shape_of
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program

Rule = Callable[["Analysis", Node, list[Any]], Any]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of one or more operators."""

    def register(function: Rule) -> Rule:
        _RULES.update({f"aten.{name}": function for name in names})
        return function

    return register


class Analysis:
    """Walks the graphs of level 0 and fills a `Dims`.

    pieces: by the name of a node that gives several tensors, the axes of each.
    """

    def __init__(self, original: LevelGraphs) -> None:
        first = placeholders(original.frozen[0])[0]
        self.dims = Dims(Variable(shape_of(first)[0], "the batch", WINDOW))
        self.pieces: dict[str, list[list[Axis]]] = {}
        sent: list[list[Axis]] | None = None
        for graph in original.frozen:
            self.walk(graph, sent)
            sent = [self.dims.axes[node.name] for node in output_nodes(graph)]
        for axes in sent or []:
            for axis in axes:
                fix(axis, "it shapes the logits")
        self.dims.number_dimensions()

    def walk(self, graph: GraphModule, received: list[list[Axis]] | None) -> None:
        position = 0
        for node in graph.graph.nodes:
            if node.op == "placeholder" and PARAMETER not in node.meta:
                if received is None:
                    axes = self.fresh(shape_of(node), "it is the model's input", WINDOW)
                    axes[0] = [self.dims.batch]
                else:
                    axes = received[position]
                position += 1
                self.dims.axes[node.name] = axes
            elif node.op == "placeholder":
                self.dims.axes[node.name] = self.fresh(
                    shape_of(node), f"{node.meta[PARAMETER]} is trained", CHANNELS
                )
            elif node.op == "get_attr":
                name = str(node.target)
                if name not in self.dims.tensors:
                    self.dims.tensors[name] = self.fresh(shape_of(node), None, CHANNELS)
                self.dims.axes[node.name] = self.dims.tensors[name]
            elif node.op == "call_function":
                self.add(node)

    def add(self, node: Node) -> None:
        name = op_name(node)
        result = self.followed(node, name)
        if result is None:
            result = self.unknown(node, name)
        if result is not None:
            self.dims.axes[node.name] = result
        trained = [a for a in node.all_input_nodes if PARAMETER in a.meta]
        if trained:
            why = f"{trained[0].meta[PARAMETER]} is trained and reads or writes it"
            for touched in (*node.all_input_nodes, node):
                for axis in self.dims.axes.get(touched.name, []):
                    fix(axis, why)

    def followed(self, node: Node, name: str) -> list[Axis] | None:
        """Return the axes that a rule gives; None where there is no rule, or it does not apply.

        A rule that gives axes of another size than the node has does not: it missed something.
        """
        found = _RULES.get(name)
        if found is None or any(isinstance(value, Node) for value in node.kwargs.values()):
            return None
        try:
            result = found(self, node, [self.axes_of(argument) for argument in node.args])
        except (_CannotFollow, TypeError, ValueError, LookupError):
            return None
        if not isinstance(node.meta.get("val"), Tensor):
            return None if result is None else []
        if result is None or [size(axis) for axis in result] != list(shape_of(node)):
            return None
        return list(result)

    def axes_of(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            return self.dims.axes.get(argument.name)
        if isinstance(argument, (list, tuple)):
            return [self.axes_of(item) for item in argument]
        return argument

    def unknown(self, node: Node, name: str) -> list[Axis] | None:
        """Fix everything that an operator without a rule touches."""
        value = node.meta.get("val")
        if not isinstance(value, (Tensor, tuple, list)):
            return None
        source = node.args[0] if node.args else None
        if name == _GETITEM and isinstance(source, Node):
            name = op_name(source)
        why = f"{name} has no dimension rule"
        for source in node.all_input_nodes:
            for axis in self.dims.axes.get(source.name, []):
                fix(axis, why)
        self.dims.unknown.setdefault(name, node.name)
        return self.like_sources(node, why) if isinstance(value, Tensor) else None

    def like_sources(self, node: Node, why: str) -> list[Axis]:
        """Fixed axes, over positions where an input of the same rank and extent is that there."""
        axes = self.fresh(shape_of(node), why, CHANNELS)
        for source in node.all_input_nodes:
            known = self.dims.axes.get(source.name, [])
            if len(known) != len(axes):
                continue
            for axis, before in zip(axes, known, strict=True):
                if size(axis) == size(before) and all(v.kind == WINDOW for v in atoms(before)):
                    self.window(axis)
        return axes

    def fresh(self, shape: Iterable[int], why: str | None, kind: str) -> list[Axis]:
        return [[] if extent == 1 else [Variable(extent, why, kind)] for extent in shape]

    def window(self, axis: Axis) -> None:
        """Fix an axis over positions: pixels, kernel positions, tokens."""
        fix(axis, "it counts positions, not channels")
        for variable in atoms(axis):
            variable.kind = WINDOW

    def cost(self, node: Node, constant: float, *axes: Axis) -> None:
        flat = [variable for axis in axes for variable in axis if variable is not self.dims.batch]
        self.dims.costs.append(Cost(node.name, constant, flat))


class _CannotFollow(Exception):
    """A rule met a case that it does not cover."""


def analyse(original: LevelGraphs) -> Dims:
    """Find the dimension variables of level 0's prefix and body."""
    return Analysis(original).dims


def dims_of(program: Program) -> Dims:
    """Return the dimensions of level 0: those that a pass attached, else analysed now."""
    return analyse(program.levels[0]) if program.dims is None else program.dims


# --- rules ---------------------------------------------------------------------------------------


@rule(
    "relu.default", "relu6.default", "hardswish.default", "hardsigmoid.default", "hardtanh.default",
    "gelu.default", "silu.default", "mish.default", "sigmoid.default", "tanh.default",
    "exp.default", "neg.default", "rsqrt.default", "sqrt.default", "elu.default",
    "leaky_relu.default", "clamp.default", "pow.Tensor_Scalar", "_to_copy.default", "to.dtype",
    "contiguous.default", "detach.default",
    "dropout.default", "softplus.default", "add.Scalar", "mul.Scalar", "sub.Scalar", "div.Scalar",
)  # fmt: skip
def _elementwise(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    return inputs[0]


@rule("add.Tensor", "mul.Tensor", "sub.Tensor", "div.Tensor", "maximum.default", "minimum.default")
def _broadcast(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    left, right = inputs[0], inputs[1]
    if not isinstance(left, list) or not isinstance(right, list):
        return left if isinstance(left, list) else right
    result: list[Axis] = []
    for position in range(1, len(shape_of(node)) + 1):
        one = left[-position] if position <= len(left) else []
        other = right[-position] if position <= len(right) else []
        if size(one) > 1 and size(other) > 1:
            join(one, other)
        result.insert(0, one if size(one) > 1 else other)
    return result


@rule(
    "conv1d.default", "conv2d.default", "conv3d.default",
    "conv1d.padding", "conv2d.padding", "conv3d.padding",
)  # fmt: skip
def _convolution(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    source, weight, *rest = inputs
    bias = rest[0] if rest else None
    groups = node.args[6] if len(node.args) > 6 else 1
    _, channels, *positions = shape_of(node)
    assert isinstance(groups, int)
    if groups == 1:
        join(source[1], weight[1])
    elif groups == channels == size(source[1]):
        join(source[1], weight[0])
    else:
        fix(source[1], f"a convolution in {groups} groups reads it")
        fix(weight[0], f"a convolution in {groups} groups writes it")
        fix(weight[1], f"a convolution in {groups} groups reads it")
    if bias:
        join(weight[0], bias[0])
    for kernel in weight[2:]:
        analysis.window(kernel)
    window = math.prod(size(kernel) for kernel in weight[2:])
    analysis.cost(node, float(math.prod(positions) * window), weight[0], weight[1])
    pixels = analysis.fresh(positions, "it counts positions, not channels", WINDOW)
    return [source[0], weight[0], *pixels]


@rule("batch_norm.default")
def _batch_norm(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    for statistic in inputs[1:5]:
        if statistic:
            join(inputs[0][1], statistic[0])
    return inputs[0]


@rule("layer_norm.default")
def _layer_norm(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    for affine in inputs[2:4]:
        if isinstance(affine, list):
            for position in range(1, len(affine) + 1):
                join(inputs[0][-position], affine[-position])
    return inputs[0]


@rule("group_norm.default")
def _group_norm(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    for affine in inputs[2:4]:
        if isinstance(affine, list):
            join(inputs[0][1], affine[0])
    fix(inputs[0][1], "a group norm divides it into groups")
    return inputs[0]


@rule("index_copy.default")
def _index_copy(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    return inputs[0]  # what is written there trains: both stay whole


@rule("linear.default")
def _linear(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    source, weight, *rest = inputs
    join(source[-1], weight[1])
    if rest and rest[0]:
        join(weight[0], rest[0][0])
    rows = [v for axis in source[:-1] for v in atoms(axis)]
    analysis.cost(node, 1.0, rows, weight[0], weight[1])
    return [*source[:-1], weight[0]]


@rule("matmul.default", "bmm.default")
def _matmul(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    left, right = inputs[0], inputs[1]
    if len(left) != len(right):
        raise _CannotFollow
    for one, other in zip(left[:-2], right[:-2], strict=True):
        if size(one) != size(other):
            raise _CannotFollow
        join(one, other)
    join(left[-1], right[-2])
    analysis.cost(node, 1.0, *[atoms(axis) for axis in left], right[-1])
    return [*left[:-1], right[-1]]


@rule("scaled_dot_product_attention.default")
def _attention(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    query, key, value = inputs[:3]
    for q, k, v in zip(query[:-2], key[:-2], value[:-2], strict=True):
        join(q, k)
        join(k, v)
    join(query[-1], key[-1])
    join(key[-2], value[-2])
    mask = inputs[3] if len(inputs) > 3 and isinstance(inputs[3], list) else []
    for axis in mask[-2:]:
        analysis.window(axis)
    for axis, whole in zip(mask[-3::-1], query[-3::-1], strict=False):
        if size(axis) > 1:
            join(axis, whole)
    for variable in atoms(query[1]) if len(query) == 4 else []:
        variable.kind = HEADS
    for variable in (*atoms(query[-1]), *atoms(value[-1])):
        variable.kind = HEAD_SIZE
    tokens = float(size(query[-2]) * size(key[-2]))
    heads = [v for axis in query[:-2] for v in atoms(axis)]
    analysis.cost(node, tokens, heads, query[-1])
    analysis.cost(node, tokens, heads, value[-1])
    return [*query[:-1], value[-1]]


@rule("softmax.int", "_softmax.default")
def _softmax(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    axis = node.args[1]
    assert isinstance(axis, int)
    fix(inputs[0][axis], "a softmax normalises over it")
    return inputs[0]


@rule(
    "adaptive_avg_pool2d.default", "avg_pool2d.default", "max_pool2d.default",
    "upsample_nearest2d.vec", "upsample_bilinear2d.vec",
)  # fmt: skip
def _pool(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    pixels = analysis.fresh(shape_of(node)[2:], "it counts positions, not channels", WINDOW)
    return [*inputs[0][:2], *pixels]


@rule("mean.dim", "sum.dim_IntList", "amax.default")
def _reduce(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    rank = len(inputs[0])
    given = node.args[1] if len(node.args) > 1 else range(rank)
    reduced = {int(a) % rank for a in ([given] if isinstance(given, int) else given)}  # type: ignore[union-attr, arg-type]
    keepdim = len(node.args) > 2 and bool(node.args[2])
    for position in reduced:
        if any(v.kind != WINDOW for v in atoms(inputs[0][position])):
            fix(inputs[0][position], "a reduction runs over it")
    return [
        [] if position in reduced else axis
        for position, axis in enumerate(inputs[0])
        if keepdim or position not in reduced
    ]


@rule("reshape.default", "view.default", "flatten.using_ints", "unflatten.int")
def _reshape(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    return _divided([v for axis in inputs[0] for v in axis], shape_of(node))


def _divided(variables: Axis, extents: Iterable[int]) -> list[Axis]:
    """Axes of these extents over the same elements in the same order."""
    rest = atoms(variables)
    result: list[Axis] = []
    for extent in extents:
        axis: Axis = []
        need = extent
        while need > 1:
            if not rest:
                raise _CannotFollow
            variable = rest.pop(0)
            if need % variable.size == 0:
                axis.append(variable)
                need //= variable.size
            elif variable.size % need == 0:
                outer, inner = split(variable, need)
                axis.append(outer)
                rest.insert(0, inner)
                need = 1
            else:
                raise _CannotFollow
        result.append(axis)
    return result


@rule("transpose.int")
def _transpose(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    axes, one, other = list(inputs[0]), inputs[1], inputs[2]
    axes[one], axes[other] = axes[other], axes[one]
    return axes


@rule("permute.default")
def _permute(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    return [inputs[0][position] for position in inputs[1]]


@rule("unsqueeze.default")
def _unsqueeze(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    axes, position = list(inputs[0]), inputs[1]
    axes.insert(position if position >= 0 else len(axes) + 1 + position, [])
    return axes


@rule("squeeze.dim", "squeeze.dims")
def _squeeze(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    given = [inputs[1]] if isinstance(inputs[1], int) else inputs[1]
    gone = {position % len(inputs[0]) for position in given}
    return [
        axis for position, axis in enumerate(inputs[0]) if position not in gone or size(axis) > 1
    ]


@rule("expand.default")
def _expand(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    shape = shape_of(node)
    axes = [[]] * (len(shape) - len(inputs[0])) + list(inputs[0])
    return [
        axis
        if size(axis) == extent
        else [analysis.dims.batch]
        if extent == analysis.dims.batch.size
        else analysis.fresh((extent,), "a tensor is repeated along it", WINDOW)[0]
        for axis, extent in zip(axes, shape, strict=True)
    ]


@rule("cat.default")
def _cat(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    parts = inputs[0]
    along = int(inputs[1] if len(inputs) > 1 else 0) % len(parts[0])
    for other in parts[1:]:
        for position, (one, two) in enumerate(zip(parts[0], other, strict=True)):
            if position != along:
                join(one, two)
    windows = all(v.kind == WINDOW for part in parts for v in atoms(part[along]))
    for part in parts:
        fix(part[along], "a concatenation joins it to others")
    kind = WINDOW if windows else CHANNELS
    result = list(parts[0])
    result[along] = analysis.fresh(
        (shape_of(node)[along],), "it is a concatenation of others", kind
    )[0]
    return result


@rule("select.int")
def _select(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    axes = list(inputs[0])
    fix(axes[inputs[1]], "one index of it is selected")
    del axes[inputs[1]]
    return axes


@rule("slice.Tensor")
def _slice(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    along = inputs[1] if len(inputs) > 1 else 0
    extent = shape_of(node)[along]
    if extent == size(inputs[0][along]):
        return inputs[0]
    axes = list(inputs[0])
    fix(axes[along], "a range of it is taken")
    axes[along] = _part(analysis, axes[along], extent)
    return axes


def _part(analysis: Analysis, axis: Axis, extent: int) -> Axis:
    """An axis that is a range of another one, which is fixed."""
    windows = all(variable.kind == WINDOW for variable in atoms(axis))
    kind = WINDOW if windows else CHANNELS
    return analysis.fresh((extent,), "it is a range of another", kind)[0]


@rule("chunk.default", "split.Tensor", "split_with_sizes.default")
def _chunk(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    along = inputs[2] if len(inputs) > 2 else 0
    whole, pieces = inputs[0][along], [value.shape[along] for value in node.meta["val"]]
    parts: list[Axis] | None = None
    if len(set(pieces)) == 1:
        try:  # gates and fused projections: each piece shrinks like the others
            outer, inner = _divided(whole, (len(pieces), pieces[0]))
        except _CannotFollow:
            pass
        else:
            fix(outer, "it is taken apart piece by piece")
            parts = [inner] * len(pieces)
    if parts is None:
        fix(whole, "it is taken apart in ranges")
        parts = [_part(analysis, whole, extent) for extent in pieces]
    rank = len(inputs[0])
    along %= rank
    analysis.pieces[node.name] = [
        [part if axis == along else inputs[0][axis] for axis in range(rank)] for part in parts
    ]
    return []


@rule("unbind.int")
def _unbind(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    axes = list(inputs[0])
    along = inputs[1] if len(inputs) > 1 else 0
    fix(axes[along], "it is taken apart index by index")
    del axes[along]
    analysis.pieces[node.name] = [axes] * len(node.meta["val"])
    return []


def _getitem(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    source, index = node.args
    assert isinstance(source, Node)
    assert isinstance(index, int)
    return analysis.pieces[source.name][index]  # not there: of an operator without a rule


_GETITEM = "operator.getitem"
_RULES[_GETITEM] = _getitem


@rule("sym_size.int")
def _sym_size(analysis: Analysis, node: Node, inputs: list[Any]) -> Any:
    return None


for _name in ("operator.mul", "operator.add", "operator.sub", "operator.floordiv"):
    _RULES[_name] = _sym_size
