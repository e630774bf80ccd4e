"""The operators that TVM modules are written of: for each of torch's, what computes the same.

Relax's own operators where they do, simpler ones where they do not: the statistics of a layer norm,
say.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tvm import relax, te, tirx, topi

from pbc.targets.tvm.scope import (
    Converter,
    Expr,
    Scope,
    Size,
    Unsupported,
    axes_of,
    constant,
    count_of,
    dtype_name,
    is_tensor,
    kind_of,
    pair,
    rank_of,
    require,
    shape_of,
)

aten = torch.ops.aten

TABLE: dict[Any, Converter] = {}

_END = 2**63 - 1


def _converts(*operators: Any) -> Callable[[Converter], Converter]:
    """Enter a function of the scope and the operator's own arguments into the table."""

    def enter(function: Converter) -> Converter:
        TABLE.update(dict.fromkeys(operators, function))
        return function

    return enter


# ---- sizes ---------------------------------------------------------------------------------


@_converts(aten.sym_size.int)
def _sym_size(scope: Scope, x: Expr, axis: int) -> Size:
    return shape_of(x)[axis]


@_converts(aten.sym_numel.default)
def _sym_numel(scope: Scope, x: Expr) -> Size:
    return scope.simple(count_of(x))


@_converts(operator.mul, operator.add, operator.sub)
def _size_arithmetic(scope: Scope, one: Size, other: Size) -> Size:
    assert callable(scope.node.target)
    return scope.simple(scope.node.target(one, other))


@_converts(operator.floordiv)
def _size_floordiv(scope: Scope, one: Size, other: Size) -> Size:
    if isinstance(one, int) and isinstance(other, int):
        return one // other
    return scope.simple(tirx.floordiv(one, other))


@_converts(operator.getitem)
def _getitem(scope: Scope, values: Sequence[Any], index: int) -> Any:
    if values[index] is None:
        raise Unsupported(f"its output {index} in use")
    return values[index]


# ---- one value at a time -------------------------------------------------------------------


def _unary(operators: Mapping[Any, Callable[..., Expr]]) -> None:
    for target, function in operators.items():
        TABLE[target] = lambda scope, x, function=function: function(scope.cast(x, scope.dtype))


_unary(
    {
        aten.abs.default: relax.op.abs,
        aten.ceil.default: relax.op.ceil,
        aten.cos.default: relax.op.cos,
        aten.erf.default: relax.op.erf,
        aten.exp.default: relax.op.exp,
        aten.floor.default: relax.op.floor,
        aten.log.default: relax.op.log,
        aten.neg.default: relax.op.negative,
        aten.relu.default: relax.op.nn.relu,
        aten.round.default: relax.op.round,
        aten.rsqrt.default: relax.op.rsqrt,
        aten.sigmoid.default: relax.op.sigmoid,
        aten.silu.default: relax.op.nn.silu,
        aten.sign.default: relax.op.sign,
        aten.sin.default: relax.op.sin,
        aten.sqrt.default: relax.op.sqrt,
        aten.square.default: relax.op.square,
        aten.tanh.default: relax.op.tanh,
    }
)


@_converts(
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
)
def _same(scope: Scope, x: Expr, **_: Any) -> Expr:
    return x


@_converts(aten.dropout.default)
def _dropout(scope: Scope, x: Expr, share: float, train: bool) -> Expr:
    require(not train, "train=True")
    return x


@_converts(aten._to_copy.default, aten.to.dtype)
def _to(scope: Scope, x: Expr, *_: Any, **__: Any) -> Expr:
    return scope.cast(x, scope.dtype)


@_converts(aten.logical_not.default, aten.bitwise_not.default)
def _not(scope: Scope, x: Expr) -> Expr:
    require(kind_of(x) == "bool", "numbers")
    return relax.op.logical_not(x)


@_converts(aten.reciprocal.default)
def _reciprocal(scope: Scope, x: Expr) -> Expr:
    return relax.op.divide(constant(1, scope.dtype), scope.cast(x, scope.dtype))


@_converts(
    aten.clamp.default, aten.hardtanh.default, aten.clamp_min.default, aten.clamp_max.default
)
def _clamp(scope: Scope, x: Expr, *bounds: Any, **named: Any) -> Expr:
    target = scope.node.target
    low: Any
    high: Any
    if target == aten.hardtanh.default:
        low, high = {0: (-1.0, 1.0), 1: (*bounds, 1.0), 2: bounds}[len(bounds)]
        low, high = named.get("min_val", low), named.get("max_val", high)
    elif target == aten.clamp_min.default:
        low, high = bounds[0], None
    elif target == aten.clamp_max.default:
        low, high = None, bounds[0]
    else:
        low, high = (*bounds, None, None)[:2]
        low, high = named.get("min", low), named.get("max", high)
    x = scope.cast(x, scope.dtype)
    if low is not None:
        x = scope.emit(relax.op.maximum(x, scope.operand(low, scope.dtype)))
    if high is not None:
        x = scope.emit(relax.op.minimum(x, scope.operand(high, scope.dtype)))
    return x


def _clipped(scope: Scope, x: Expr, low: float, high: float) -> Expr:
    x = scope.emit(relax.op.maximum(x, constant(low, kind_of(x))))
    return scope.emit(relax.op.minimum(x, constant(high, kind_of(x))))


@_converts(aten.relu6.default)
def _relu6(scope: Scope, x: Expr) -> Expr:
    return _clipped(scope, x, 0.0, 6.0)


@_converts(aten.hardsigmoid.default)
def _hardsigmoid(scope: Scope, x: Expr) -> Expr:
    moved = scope.emit(relax.op.add(x, constant(3.0, kind_of(x))))
    return relax.op.multiply(_clipped(scope, moved, 0.0, 6.0), constant(1 / 6, kind_of(x)))


@_converts(aten.hardswish.default)
def _hardswish(scope: Scope, x: Expr) -> Expr:
    return relax.op.multiply(x, scope.emit(_hardsigmoid(scope, x)))


@_converts(aten.leaky_relu.default)
def _leaky_relu(scope: Scope, x: Expr, slope: float = 0.01) -> Expr:
    return relax.op.nn.leakyrelu(x, slope)


@_converts(aten.elu.default)
def _elu(scope: Scope, x: Expr, alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0) -> Expr:
    def elu(x: Any) -> Any:
        def value(*index: Any) -> Any:
            negative = alpha * scale * (tirx.exp(x(*index) * inner) - 1.0)
            return tirx.Select(x(*index) > 0.0, x(*index) * scale, negative)

        return te.compute(x.shape, value)

    return scope.compute(elu, x)


@_converts(aten.gelu.default)
def _gelu(scope: Scope, x: Expr, approximate: str = "none") -> Expr:
    return relax.op.nn.gelu_tanh(x) if approximate == "tanh" else relax.op.nn.gelu(x)


@_converts(aten.softplus.default)
def _softplus(scope: Scope, x: Expr, beta: float = 1.0, threshold: float = 20.0) -> Expr:
    def softplus(x: Any) -> Any:
        def value(*index: Any) -> Any:
            scaled = x(*index) * beta
            soft = tirx.log(1.0 + tirx.exp(tirx.min(scaled, tirx.const(threshold, x.dtype))))
            return tirx.Select(scaled > threshold, x(*index), soft / beta)

        return te.compute(x.shape, value)

    return scope.compute(softplus, x)


# ---- two values at a time ------------------------------------------------------------------


@_converts(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar)
def _sum_of_two(scope: Scope, one: Any, other: Any, alpha: Any = 1) -> Expr:
    dtype = scope.dtype
    one, other = scope.operand(one, dtype), scope.operand(other, dtype)
    if scope.node.target == aten.rsub.Scalar:
        one, other = other, one
    if alpha != 1:
        other = scope.emit(relax.op.multiply(other, scope.operand(alpha, dtype)))
    adds = scope.node.target in (aten.add.Tensor, aten.add.Scalar)
    return (relax.op.add if adds else relax.op.subtract)(one, other)


def _binary(operators: Mapping[Any, Callable[..., Expr]]) -> None:
    def converter(function: Callable[..., Expr]) -> Converter:
        def convert_binary(scope: Scope, one: Any, other: Any) -> Expr:
            return function(scope.operand(one, scope.dtype), scope.operand(other, scope.dtype))

        return convert_binary

    TABLE.update({target: converter(function) for target, function in operators.items()})


_binary(
    {
        aten.bitwise_and.Tensor: relax.op.logical_and,
        aten.bitwise_or.Tensor: relax.op.logical_or,
        aten.div.Scalar: relax.op.divide,
        aten.div.Tensor: relax.op.divide,
        aten.logical_and.default: relax.op.logical_and,
        aten.logical_or.default: relax.op.logical_or,
        aten.maximum.default: relax.op.maximum,
        aten.minimum.default: relax.op.minimum,
        aten.mul.Scalar: relax.op.multiply,
        aten.mul.Tensor: relax.op.multiply,
    }
)


@_converts(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor)
def _pow(scope: Scope, x: Expr, exponent: Any) -> Expr:
    x = scope.cast(x, scope.dtype)
    if exponent == 2:
        return relax.op.multiply(x, x)
    if exponent == 0.5:
        return relax.op.sqrt(x)
    return relax.op.power(x, scope.operand(exponent, scope.dtype))


def _comparisons(operators: Mapping[str, Callable[..., Expr]]) -> None:
    def converter(function: Callable[..., Expr]) -> Converter:
        def compare(scope: Scope, one: Expr, other: Any) -> Expr:
            dtype = kind_of(one)
            if is_tensor(other):
                kinds = [getattr(torch, str(kind_of(value))) for value in (one, other)]
                dtype = dtype_name(torch.promote_types(*kinds))
            elif isinstance(other, float) and not str(dtype).startswith("float"):
                dtype = "float32"
            return function(scope.operand(one, dtype), scope.operand(other, dtype))

        return compare

    for name, function in operators.items():
        packet = getattr(aten, name)
        TABLE.update(dict.fromkeys((packet.Scalar, packet.Tensor), converter(function)))


_comparisons(
    {
        "eq": relax.op.equal,
        "ge": relax.op.greater_equal,
        "gt": relax.op.greater,
        "le": relax.op.less_equal,
        "lt": relax.op.less,
        "ne": relax.op.not_equal,
    }
)


@_converts(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(scope: Scope, condition: Expr, one: Any, other: Any) -> Expr:
    dtype = scope.dtype
    return relax.op.where(condition, scope.operand(one, dtype), scope.operand(other, dtype))


@_converts(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(scope: Scope, x: Expr, mask: Expr, value: Any) -> Expr:
    return relax.op.where(mask, scope.operand(value, scope.dtype), x)


# ---- new tensors ---------------------------------------------------------------------------


@_converts(aten.scalar_tensor.default)
def _scalar_tensor(scope: Scope, value: Any, **_: Any) -> Expr:
    return scope.operand(value, scope.dtype)


@_converts(aten.full.default)
def _full(scope: Scope, sizes: Sequence[Size], value: Any, **_: Any) -> Expr:
    return relax.op.full(scope.contract(sizes), scope.operand(value, scope.dtype), scope.dtype)


@_converts(aten.full_like.default)
def _full_like(scope: Scope, x: Expr, value: Any, **_: Any) -> Expr:
    return _full(scope, shape_of(x), value)


@_converts(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def _zeros(scope: Scope, like: Any, *sizes: Any, **_: Any) -> Expr:
    if scope.node.target == aten.zeros_like.default:
        return _full(scope, shape_of(like), 0)
    return _full(scope, sizes[0] if sizes else like, 0)


@_converts(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(scope: Scope, like: Any, *sizes: Any, **_: Any) -> Expr:
    if scope.node.target == aten.ones_like.default:
        return _full(scope, shape_of(like), 1)
    return _full(scope, sizes[0] if sizes else like, 1)


@_converts(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(scope: Scope, *bounds: Any, **_: Any) -> Expr:
    start, end, step = {1: (0, *bounds, 1), 2: (*bounds, 1), 3: bounds}[len(bounds)]
    require(not isinstance(start, float) and isinstance(step, int) and step > 0, "these bounds")
    count = scope.simple(tirx.floordiv(end - start + step - 1, tirx.const(step, "int64")))
    dtype = scope.dtype

    def arange(count: Size, start: Size) -> Any:
        return te.compute((count,), lambda index: (index * step + start).astype(dtype))

    return (
        scope.compute(lambda count: arange(count, start), tirx.IntImm("int64", count))
        if isinstance(count, int)
        else scope.compute(lambda count: arange(count, start), count)
    )


# ---- shapes --------------------------------------------------------------------------------


@_converts(aten.reshape.default, aten.view.default, aten._unsafe_view.default)
def _reshape(scope: Scope, x: Expr, sizes: Sequence[Size]) -> Expr:
    return scope.reshape(x, sizes)


@_converts(aten.flatten.using_ints)
def _flatten(scope: Scope, x: Expr, first: int = 0, last: int = -1) -> Expr:
    shape = shape_of(x)
    first, last = first % len(shape), last % len(shape)
    return scope.reshape(
        x, [*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :]]
    )


@_converts(aten.permute.default)
def _permute(scope: Scope, x: Expr, order: Sequence[int]) -> Expr:
    order = axes_of(x, list(order))
    return x if order == sorted(order) else relax.op.permute_dims(x, order)


@_converts(aten.transpose.int)
def _transpose(scope: Scope, x: Expr, one: int, other: int) -> Expr:
    order = list(range(rank_of(x)))
    one, other = one % len(order), other % len(order)
    order[one], order[other] = other, one
    return _permute(scope, x, order)


@_converts(aten.t.default)
def _t(scope: Scope, x: Expr) -> Expr:
    return x if rank_of(x) < 2 else relax.op.permute_dims(x, [1, 0])


@_converts(aten.unsqueeze.default)
def _unsqueeze(scope: Scope, x: Expr, axis: int) -> Expr:
    return relax.op.expand_dims(x, axis % (rank_of(x) + 1))


@_converts(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _squeeze(scope: Scope, x: Expr, axes: Any = None) -> Expr:
    shape = shape_of(x)
    doomed = [
        axis for axis in axes_of(x, axes) if isinstance(shape[axis], int) and shape[axis] == 1
    ]
    return scope.reshape(x, [size for axis, size in enumerate(shape) if axis not in doomed])


@_converts(aten.expand.default)
def _expand(scope: Scope, x: Expr, sizes: Sequence[Size], implicit: bool = False) -> Expr:
    own = [1] * (len(sizes) - rank_of(x)) + shape_of(x)
    goal = [
        old if isinstance(size, int) and size == -1 else scope.simple(size)
        for old, size in zip(own, sizes, strict=True)
    ]
    if len(own) == rank_of(x) and all(scope.equal(o, g) for o, g in zip(own, goal, strict=True)):
        return x
    return relax.op.broadcast_to(x, goal)


@_converts(aten.slice.Tensor)
def _slice(
    scope: Scope, x: Expr, axis: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Expr:
    axis %= rank_of(x)
    size = shape_of(x)[axis]
    start, end = 0 if start is None else start, _END if end is None else end
    if isinstance(size, int):
        if not (isinstance(start, int) and isinstance(end, int)):
            raise Unsupported("bounds that depend on the batch")
        start, end, step = slice(start, end, step).indices(size)
        if (start, end, step) == (0, size, 1):
            return x
    elif isinstance(end, int) and end >= _END and isinstance(start, int) and start >= 0:
        if start == 0 and step == 1:
            return x
        end = size
    elif not isinstance(start, int) or start < 0 or (isinstance(end, int) and end < 0):
        raise Unsupported("negative bounds along the batch")
    return relax.op.strided_slice(x, [axis], [start], [end], [step], assume_inbound=True)


@_converts(aten.select.int)
def _select(scope: Scope, x: Expr, axis: int, index: int) -> Expr:
    axis %= rank_of(x)
    size = shape_of(x)[axis]
    require(isinstance(index, int) and (isinstance(size, int) or index >= 0), "such an index")
    index = index % size if isinstance(size, int) else index
    return _selected(scope, x, axis, index)


def _selected(scope: Scope, x: Expr, axis: int, index: int) -> Expr:
    def select(x: Any) -> Any:
        shape = [*x.shape[:axis], *x.shape[axis + 1 :]]
        return te.compute(shape, lambda *at: x(*at[:axis], index, *at[axis:]))

    return scope.compute(select, x)


@_converts(aten.unbind.int)
def _unbind(scope: Scope, x: Expr, axis: int = 0) -> list[Expr]:
    axis %= rank_of(x)
    return [_selected(scope, x, axis, index) for index in range(shape_of(x)[axis])]


def _parts(scope: Scope, x: Expr, axis: int, lengths: Sequence[int]) -> list[Expr]:
    ends = np.cumsum(lengths).tolist()
    return [
        scope.emit(relax.op.strided_slice(x, [axis], [end - length], [end], assume_inbound=True))
        for length, end in zip(lengths, ends, strict=True)
    ]


@_converts(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def _split(scope: Scope, x: Expr, how: Any, axis: int = 0) -> list[Expr]:
    axis %= rank_of(x)
    size = shape_of(x)[axis]
    require(isinstance(size, int), "the batch as its axis")
    if scope.node.target == aten.split_with_sizes.default:
        return _parts(scope, x, axis, how)
    length = how if scope.node.target == aten.split.Tensor else -(-size // how)
    return _parts(scope, x, axis, [min(length, size - at) for at in range(0, size, length)])


@_converts(aten.cat.default)
def _cat(scope: Scope, tensors: Sequence[Expr], axis: int = 0) -> Expr:
    some = [scope.cast(x, scope.dtype) for x in tensors]
    return relax.op.concat(some, axis % rank_of(some[0]))


@_converts(aten.stack.default)
def _stack(scope: Scope, tensors: Sequence[Expr], axis: int = 0) -> Expr:
    axis %= rank_of(tensors[0]) + 1
    return relax.op.concat([scope.emit(relax.op.expand_dims(x, axis)) for x in tensors], axis)


@_converts(aten.flip.default)
def _flip(scope: Scope, x: Expr, axes: Sequence[int]) -> Expr:
    turned = set(axes_of(x, list(axes))) if axes else set()

    def flip(x: Any) -> Any:
        def value(*index: Any) -> Any:
            return x(*[x.shape[a] - 1 - i if a in turned else i for a, i in enumerate(index)])

        return te.compute(x.shape, value)

    return scope.compute(flip, x)


@_converts(aten.roll.default)
def _roll(scope: Scope, x: Expr, shifts: Sequence[int], axes: Sequence[int] = ()) -> Expr:
    require(len(axes) == len(shifts), "no axes")
    for shift, axis in zip(shifts, axes_of(x, list(axes)), strict=True):
        size = shape_of(x)[axis]
        require(isinstance(size, int), "the batch as its axis")
        if shift % size:
            at = size - shift % size
            first, second = _parts(scope, x, axis, [at, size - at])
            x = scope.emit(relax.op.concat([second, first], axis))
    return x


@_converts(aten.repeat.default)
def _repeat(scope: Scope, x: Expr, repeats: Sequence[Size]) -> Expr:
    return relax.op.tile(x, scope.contract(repeats))


@_converts(aten.constant_pad_nd.default)
def _constant_pad(scope: Scope, x: Expr, pad: Sequence[int], value: float = 0.0) -> Expr:
    before, after = [0] * rank_of(x), [0] * rank_of(x)
    for number in range(len(pad) // 2):
        before[-1 - number], after[-1 - number] = pad[2 * number], pad[2 * number + 1]
    for axis in range(rank_of(x)):
        # A negative padding cuts off.
        if before[axis] < 0 or after[axis] < 0:
            start, end = max(0, -before[axis]), shape_of(x)[axis] + min(0, after[axis])
            x = scope.emit(relax.op.strided_slice(x, [axis], [start], [end], assume_inbound=True))
    before, after = [max(0, size) for size in before], [max(0, size) for size in after]
    if not any((*before, *after)):
        return x
    fill = tirx.const(value, kind_of(x))
    return scope.compute(lambda x: topi.nn.pad(x, before, after, fill), x)


@_converts(aten.slice_scatter.default)
def _slice_scatter(
    scope: Scope,
    x: Expr,
    source: Expr,
    axis: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Expr:
    axis %= rank_of(x)
    size = shape_of(x)[axis]
    start, end = 0 if start is None else start, _END if end is None else end
    if not isinstance(size, int):
        require((start, end, step) == (0, _END, 1), "part of the batch")
        return source
    start, end, step = slice(start, end, step).indices(size)
    if (start, end, step) == (0, size, 1):
        return source

    def scatter(x: Any, source: Any) -> Any:
        def value(*index: Any) -> Any:
            at = index[axis]
            inside = tirx.all(at >= start, at < end, tirx.floormod(at - start, step) == 0)
            place = tirx.floordiv(at - start, step)
            read = source(*index[:axis], place, *index[axis + 1 :])
            return tirx.if_then_else(inside, read, x(*index))

        return te.compute(x.shape, value)

    return scope.compute(scatter, x, source)


@_converts(aten.select_scatter.default)
def _select_scatter(scope: Scope, x: Expr, source: Expr, axis: int, index: int) -> Expr:
    axis %= rank_of(x)
    size = shape_of(x)[axis]
    require(isinstance(size, int), "the batch as its axis")
    index %= size

    def scatter(x: Any, source: Any) -> Any:
        def value(*at: Any) -> Any:
            read = source(*at[:axis], *at[axis + 1 :])
            return tirx.if_then_else(at[axis] == index, read, x(*at))

        return te.compute(x.shape, value)

    return scope.compute(scatter, x, source)


@_converts(aten.index_select.default)
def _index_select(scope: Scope, x: Expr, axis: int, index: Expr) -> Expr:
    return relax.op.take(x, index, axis % rank_of(x), "clip")


@_converts(aten.embedding.default)
def _embedding(scope: Scope, weight: Expr, indices: Expr, *_: Any) -> Expr:
    return relax.op.take(weight, indices, 0, "clip")


@_converts(aten.index.Tensor)
def _index(scope: Scope, x: Expr, indices: Sequence[Any]) -> Expr:
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    require(len(given) == 1 and given[0][1].ty.dtype != "bool", "several indices or a mask")
    axis, index = given[0]
    return relax.op.take(x, index, axis, "clip")


@_converts(aten.gather.default)
def _gather(scope: Scope, x: Expr, axis: int, index: Expr) -> Expr:
    axis %= rank_of(x)

    def gather(x: Any, index: Any) -> Any:
        return te.compute(index.shape, lambda *at: x(*at[:axis], index(*at), *at[axis + 1 :]))

    return scope.compute(gather, x, index)


# ---- sums ----------------------------------------------------------------------------------


@_converts(aten.sum.default, aten.sum.dim_IntList)
def _sum(scope: Scope, x: Expr, axes: Any = None, keep: bool = False, **_: Any) -> Expr:
    x = scope.cast(x, scope.dtype)
    return relax.op.sum(x, axes_of(x, axes), keep) if rank_of(x) else x


@_converts(aten.mean.default, aten.mean.dim)
def _mean(scope: Scope, x: Expr, axes: Any = None, keep: bool = False, **_: Any) -> Expr:
    return relax.op.mean(x, axes_of(x, axes), keep) if rank_of(x) else x


@_converts(aten.amax.default)
def _amax(scope: Scope, x: Expr, axes: Any = None, keep: bool = False) -> Expr:
    return relax.op.max(x, axes_of(x, axes), keep)


@_converts(aten.amin.default)
def _amin(scope: Scope, x: Expr, axes: Any = None, keep: bool = False) -> Expr:
    return relax.op.min(x, axes_of(x, axes), keep)


@_converts(aten.scatter_add.default)
def _scatter_add(scope: Scope, x: Expr, axis: int, index: Expr, source: Expr) -> Expr:
    sizes = zip(shape_of(index), shape_of(source), strict=True)
    require(all(scope.equal(one, other) for one, other in sizes), "a source larger than its index")
    return relax.op.scatter_elements(x, index, source, axis % rank_of(x), "add")


@_converts(aten.cumsum.default)
def _cumsum(scope: Scope, x: Expr, axis: int, **_: Any) -> Expr:
    """As a sum under a triangle: what is summed so is short, and a scan has no schedule."""
    axis %= rank_of(x)
    x = scope.cast(x, scope.dtype)

    def cumulate(x: Any) -> Any:
        other = te.reduce_axis((0, x.shape[axis]))

        def value(*at: Any) -> Any:
            read = x(*at[:axis], other, *at[axis + 1 :])
            return te.sum(tirx.if_then_else(other <= at[axis], read, _zero(x)), other)

        return te.compute(x.shape, value)

    return scope.compute(cumulate, x)


def _zero(x: Any) -> Any:
    return tirx.const(0, x.dtype)


@_converts(aten.var.correction, aten.var_mean.correction)
def _var(
    scope: Scope, x: Expr, axes: Any = None, *, correction: Any = 1, keepdim: bool = False
) -> Any:
    chosen = axes_of(x, axes)
    count = math.prod(shape_of(x)[axis] for axis in chosen)
    mean = scope.emit(relax.op.mean(x, chosen, True))
    centred = scope.emit(relax.op.subtract(x, mean))
    squares = scope.emit(
        relax.op.sum(scope.emit(relax.op.multiply(centred, centred)), chosen, True)
    )
    divisor = scope.operand(count - (1 if correction is None else correction), kind_of(x))
    results = [scope.emit(relax.op.divide(squares, divisor)), mean]
    if not keepdim:
        shape = [size for axis, size in enumerate(shape_of(x)) if axis not in chosen]
        results = [scope.reshape(result, shape) for result in results]
    return results if scope.node.target == aten.var_mean.correction else results[0]


# ---- products ------------------------------------------------------------------------------


@_converts(aten.mm.default, aten.bmm.default, aten.matmul.default)
def _matmul(scope: Scope, one: Expr, other: Expr) -> Expr:
    return relax.op.matmul(one, other)


@_converts(aten.linear.default)
def _linear(scope: Scope, x: Expr, weight: Expr, bias: Expr | None = None) -> Expr:
    product = scope.emit(relax.op.matmul(x, scope.emit(relax.op.permute_dims(weight, [1, 0]))))
    return product if bias is None else relax.op.add(product, bias)


@_converts(aten.addmm.default, aten.baddbmm.default)
def _addmm(
    scope: Scope, bias: Expr, one: Expr, other: Expr, *, beta: Any = 1, alpha: Any = 1
) -> Expr:
    product = scope.emit(relax.op.matmul(one, other))
    if alpha != 1:
        product = scope.emit(relax.op.multiply(product, constant(alpha, scope.dtype)))
    if beta != 1:
        bias = scope.emit(relax.op.multiply(bias, constant(beta, scope.dtype)))
    return relax.op.add(product, bias)


@_converts(aten.scaled_dot_product_attention.default)
def _attention(
    scope: Scope,
    query: Expr,
    key: Expr,
    value: Expr,
    mask: Expr | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Expr:
    require(not (dropout or causal or enable_gqa), "dropout, is_causal or enable_gqa")
    width = shape_of(query)[-1]
    factor = constant(width**-0.5 if scale is None else scale, scope.dtype)
    last = rank_of(key) - 1
    turned = scope.emit(relax.op.permute_dims(key, [*range(last - 1), last, last - 1]))
    scaled = scope.emit(relax.op.multiply(query, factor))
    scores = scope.emit(relax.op.matmul(scaled, turned))
    if mask is not None and kind_of(mask) == "bool":
        lowest = scope.operand(float(np.finfo(np.float32).min), scope.dtype)
        scores = scope.emit(relax.op.where(mask, scores, lowest))
    elif mask is not None:
        scores = scope.emit(relax.op.add(scores, mask))
    return relax.op.matmul(scope.emit(relax.op.nn.softmax(scores, -1)), value)


# ---- convolutions --------------------------------------------------------------------------


@_converts(aten.conv2d.default)
def _conv2d(
    scope: Scope,
    x: Expr,
    weight: Expr,
    bias: Expr | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Expr:
    return _convolution(scope, x, weight, bias, stride, padding, dilation, False, 0, groups)


@_converts(aten.convolution.default)
def _convolution(
    scope: Scope,
    x: Expr,
    weight: Expr,
    bias: Expr | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Expr:
    require(rank_of(x) == 4, f"{rank_of(x) - 2} spatial axes")
    stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
    pads = [*padding, *padding]
    if transposed:
        x, weight, pads = _turned_around(
            scope, x, weight, stride, padding, dilation, pair(output_padding), groups
        )
        stride = (1, 1)
    result = scope.emit(
        relax.op.nn.conv2d(
            x, weight, strides=stride, padding=pads, dilation=dilation, groups=groups
        )
    )
    if bias is None:
        return result
    return relax.op.add(result, scope.reshape(bias, [1, -1, 1, 1]))


def _turned_around(
    scope: Scope,
    x: Expr,
    weight: Expr,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    output_padding: tuple[int, int],
    groups: int,
) -> tuple[Expr, Expr, list[int]]:
    """What the convolution reads that a transposed one is: input, weight, padding on four sides.

    The input's values are moved apart by the stride, the kernel is turned around (Dumoulin and
    Visin, A guide to convolution arithmetic, 2016).
    """
    inputs, outputs, *kernel = shape_of(weight)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    before = [r - p for r, p in zip(reach, padding, strict=True)]
    after = [b + o for b, o in zip(before, output_padding, strict=True)]
    require(min(*before, *after) >= 0, "a padding beyond its kernel")
    if stride != (1, 1):
        x = scope.compute(lambda x: topi.nn.dilate(x, [1, 1, *stride]), x)

    def turn(weight: Any) -> Any:
        own = inputs // groups

        def value(out: Any, into: Any, row: Any, column: Any) -> Any:
            group, channel = tirx.floordiv(out, outputs), tirx.floormod(out, outputs)
            return weight(group * own + into, channel, kernel[0] - 1 - row, kernel[1] - 1 - column)

        return te.compute((outputs * groups, own, *kernel), value)

    return x, scope.compute(turn, weight), [*before, *after]


# ---- normalisation -------------------------------------------------------------------------


def _normalised(scope: Scope, x: Expr, axes: Sequence[int], epsilon: float) -> list[Expr]:
    """The tensor with mean zero and variance one along these axes, its mean, and 1/deviation."""
    mean = scope.emit(relax.op.mean(x, list(axes), True))
    centred = scope.emit(relax.op.subtract(x, mean))
    squares = scope.emit(relax.op.multiply(centred, centred))
    variance = scope.emit(relax.op.mean(squares, list(axes), True))
    shifted = scope.emit(relax.op.add(variance, constant(epsilon, kind_of(x))))
    inverse = scope.emit(relax.op.rsqrt(shifted))
    return [scope.emit(relax.op.multiply(centred, inverse)), mean, inverse]


def _affine(scope: Scope, x: Expr, scale: Expr | None, shift: Expr | None) -> Expr:
    if scale is not None:
        x = scope.emit(relax.op.multiply(x, scale))
    return x if shift is None else scope.emit(relax.op.add(x, shift))


@_converts(aten.native_layer_norm.default)
def _native_layer_norm(
    scope: Scope,
    x: Expr,
    shape: Sequence[int],
    scale: Expr | None,
    shift: Expr | None,
    epsilon: float,
) -> list[Expr]:
    axes = range(rank_of(x) - len(shape), rank_of(x))
    normal, mean, inverse = _normalised(scope, x, axes, epsilon)
    return [_affine(scope, normal, scale, shift), mean, inverse]


@_converts(aten.layer_norm.default)
def _layer_norm(
    scope: Scope,
    x: Expr,
    shape: Sequence[int],
    scale: Expr | None = None,
    shift: Expr | None = None,
    epsilon: float = 1e-5,
    *_: Any,
) -> Expr:
    return _native_layer_norm(scope, x, shape, scale, shift, epsilon)[0]


@_converts(aten.native_group_norm.default)
def _native_group_norm(
    scope: Scope,
    x: Expr,
    scale: Expr | None,
    shift: Expr | None,
    batch: Size,
    channels: int,
    area: Size,
    groups: int,
    epsilon: float,
) -> list[Expr]:
    shape = shape_of(x)
    apart = scope.reshape(x, [shape[0], groups, channels // groups * math.prod(shape[2:])])
    normal, mean, inverse = _normalised(scope, apart, [2], epsilon)
    along = [1, channels, *(1 for _ in shape[2:])]
    scale, shift = (
        None if value is None else scope.reshape(value, along) for value in (scale, shift)
    )
    statistics = (scope.reshape(value, [shape[0], groups]) for value in (mean, inverse))
    return [_affine(scope, scope.reshape(normal, shape), scale, shift), *statistics]


@_converts(aten.group_norm.default)
def _group_norm(
    scope: Scope,
    x: Expr,
    groups: int,
    scale: Expr | None = None,
    shift: Expr | None = None,
    epsilon: float = 1e-5,
    *_: Any,
) -> Expr:
    channels = shape_of(x)[1]
    return _native_group_norm(scope, x, scale, shift, None, channels, None, groups, epsilon)[0]


@_converts(aten.batch_norm.default)
def _batch_norm(
    scope: Scope,
    x: Expr,
    scale: Expr | None,
    shift: Expr | None,
    mean: Expr,
    variance: Expr,
    training: bool,
    momentum: float,
    epsilon: float,
    *_: Any,
) -> Expr:
    """With the statistics that it was given; as one product and one sum per value."""
    require(not training, "training=True")
    shifted = scope.emit(relax.op.add(variance, constant(epsilon, kind_of(variance))))
    factor = scope.emit(relax.op.rsqrt(shifted))
    if scale is not None:
        factor = scope.emit(relax.op.multiply(factor, scale))
    along = [1, shape_of(mean)[0], *(1 for _ in shape_of(x)[2:])]
    moved = scope.emit(relax.op.multiply(mean, factor))
    offset = scope.emit(
        relax.op.negative(moved) if shift is None else relax.op.subtract(shift, moved)
    )
    return _affine(scope, x, scope.reshape(factor, along), scope.reshape(offset, along))


@_converts(aten.softmax.int, aten._softmax.default)
def _softmax(scope: Scope, x: Expr, axis: int, *_: Any) -> Expr:
    return relax.op.nn.softmax(x, axis)


@_converts(aten.log_softmax.int, aten._log_softmax.default)
def _log_softmax(scope: Scope, x: Expr, axis: int, *_: Any) -> Expr:
    largest = scope.emit(relax.op.max(x, [axis], True))
    moved = scope.emit(relax.op.subtract(x, largest))
    total = scope.emit(relax.op.sum(scope.emit(relax.op.exp(moved)), [axis], True))
    return relax.op.subtract(moved, scope.emit(relax.op.log(total)))


# ---- pooling and resizing ------------------------------------------------------------------


@_converts(aten.max_pool2d.default, aten.max_pool2d_with_indices.default)
def _max_pool2d(
    scope: Scope,
    x: Expr,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:
    pooled = relax.op.nn.max_pool2d(
        x,
        pair(kernel),
        pair(stride or kernel),
        pair(padding),
        pair(dilation),
        ceil_mode,
    )
    if scope.node.target == aten.max_pool2d.default:
        return pooled
    values = scope.emit(pooled)
    if not any(user.args[1:] == (1,) for user in scope.node.users):
        return [values, None]
    window = zip(pair(kernel), pair(stride or kernel), pair(padding), pair(dilation), strict=True)
    return [values, scope.compute(_first_places, x, values, list(window))]


def _first_places(x: Any, pooled: Any, window: Sequence[tuple[int, int, int, int]]) -> Any:
    """Where in its plane each window first has its largest value, as torch counts.

    window: size, stride, padding and dilation of rows, and of columns.
    """
    height, width = x.shape[2:]
    steps = [te.reduce_axis((0, size)) for size, *_ in window]

    def value(image: Any, channel: Any, *at: Any) -> Any:
        row, column = (
            place * stride - padding + step * dilation
            for place, step, (_, stride, padding, dilation) in zip(at, steps, window, strict=True)
        )
        inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
        # Nowhere equal are values that are no numbers: the last place is a place at least.
        last = (height * width - 1).astype("int64")
        largest = x(image, channel, row, column) == pooled(image, channel, *at)
        found = tirx.Select(largest, (row * width + column).astype("int64"), last)
        return te.min(tirx.if_then_else(inside, found, last), steps)

    return te.compute(pooled.shape, value)


@_converts(aten.avg_pool2d.default)
def _avg_pool2d(
    scope: Scope,
    x: Expr,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Expr:
    require(divisor is None, "a divisor of its own")
    require(not ceil_mode or not any(pair(padding)), "ceil_mode and padding")
    return relax.op.nn.avg_pool2d(
        x,
        pair(kernel),
        pair(stride or kernel),
        pair(padding),
        (1, 1),
        ceil_mode,
        count_include_pad,
    )


@_converts(aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default)
def _adaptive_avg_pool2d(scope: Scope, x: Expr, size: Any) -> Expr:
    goal = pair(size)
    if goal == (1, 1):
        return relax.op.mean(x, [rank_of(x) - 2, rank_of(x) - 1], True)
    return relax.op.nn.adaptive_avg_pool2d(x, goal)


@_converts(
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec,
    aten.upsample_nearest2d.vec,
    aten._upsample_bilinear2d_aa.vec,
)
def _upsample(scope: Scope, x: Expr, *options: Any, **named: Any) -> Expr:
    """As what torch's own operator does to a basis: sums of a few rows, then of a few columns."""
    *_, height, width = shape_of(x)
    goal = [int(size) for size in scope.node.meta["val"].shape[-2:]]
    target = scope.node.target
    assert isinstance(target, torch._ops.OpOverload)
    # A picture that changes along one axis alone shows what happens along that axis.
    rows = torch.eye(height).reshape(1, height, height, 1).expand(1, height, height, width)
    columns = torch.eye(width).reshape(1, width, 1, width).expand(1, width, height, width)
    options = tuple(None if _is_size_list(option) else option for option in options)
    down = _applied(target, rows, goal, options, named)[0, :, :, 0]
    across = _applied(target, columns, goal, options, named)[0, :, 0, :]
    x = _gathered(scope, x, 2, down.numpy())
    return _gathered(scope, x, 3, across.numpy())


def _is_size_list(option: Any) -> bool:
    return isinstance(option, (list, tuple)) and bool(option) and not isinstance(option[0], float)


def _applied(
    target: Any, picture: Tensor, goal: list[int], options: Sequence[Any], named: Mapping[str, Any]
) -> Tensor:
    sized = list(options)
    # The vec overloads take a size or factors; the other is None.
    if not (named.get("scale_factors") or (sized and isinstance(sized[-1], (list, tuple)))):
        sized[:1] = [goal]
    result: Tensor = target(picture.contiguous(), *sized, **named)
    return result


def _gathered(scope: Scope, x: Expr, axis: int, weights: np.ndarray) -> Expr:
    """Along an axis, sums of values by weights [old size, new size], most of them zero."""
    taps = int((weights != 0).sum(0).max())
    order = np.argsort(weights == 0, axis=0, kind="stable")[:taps]
    places, factors = order.astype(np.int32), np.take_along_axis(weights, order, 0)

    def gather(x: Any, places: Any, factors: Any) -> Any:
        shape = [*x.shape[:axis], weights.shape[1], *x.shape[axis + 1 :]]

        def value(*at: Any) -> Any:
            reads = [x(*at[:axis], places(tap, at[axis]), *at[axis + 1 :]) for tap in range(taps)]
            if taps == 1 and (factors_are_one := bool((weights.sum(0) == 1).all())):
                assert factors_are_one
                return reads[0]
            return sum(
                (read * factors(tap, at[axis]) for tap, read in enumerate(reads)), start=_zero(x)
            )

        return te.compute(shape, value)

    return scope.compute(gather, x, constant(places, "int32"), constant(factors, "float32"))
