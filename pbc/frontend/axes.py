"""Axes of a traced run: where one comes from, and which of a value's counts channels."""

from __future__ import annotations

import math

from pbc.frontend.trace import PRODUCTS, Operator, Value

# Elementwise operators of two values.
BINARY = frozenset({"add", "sub", "rsub", "mul", "div", "maximum", "minimum"})
REDUCTIONS = frozenset({
    "mean", "sum", "amax", "amin", "max", "logsumexp", "norm", "linalg_vector_norm",
    "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "max_pool2d_with_indices",
})  # fmt: skip
# Operators that are defined with channels in front of positions.
_CHANNELS_FIRST = frozenset({
    "convolution", "mkldnn_convolution", "native_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "native_group_norm",
    "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "max_pool2d_with_indices",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "pixel_shuffle",
})  # fmt: skip
_CHANNELS_LAST = (PRODUCTS - _CHANNELS_FIRST) | {"native_layer_norm", "_fused_rms_norm"}


class Lost(Exception):
    """An axis of a result that is no axis of the operand."""


class Features(Lost):
    """An axis that is known to count features, not classes."""


def axis_before(operator: Operator, operand: Value, result: Value, axis: int) -> int:
    """Return which axis of an operand becomes this axis of the result; raise Lost if none does."""
    word, args, kwargs = operator.word, operator.args, operator.kwargs
    rank = len(operand.shape)
    if word == "t":
        return rank - 1 - axis
    if word == "transpose":
        one, other = (int(dim) % rank for dim in args[1:3])
        return {one: other, other: one}.get(axis, axis)
    if word == "permute":
        return int(args[1][axis]) % rank
    if word == "expand" or word in BINARY:
        before = axis - len(result.shape) + rank
        if before < 0:
            raise Lost("its outputs are one number repeated")
        return before
    if word in ("select", "unbind"):
        dim = int(args[1] if len(args) > 1 else 0) % rank
        return axis + (axis >= dim)
    if word in ("unsqueeze", "stack"):
        dim = int(args[1] if len(args) > 1 else 0) % len(result.shape)
        if axis == dim:
            raise Lost(f"its outputs are put together by `{word}`")
        return axis - (axis > dim)
    if len(result.shape) == rank and word not in ("view", "reshape", "_unsafe_view"):
        if operand.shape[axis] != result.shape[axis]:
            raise Lost(
                f"its {result.shape[axis]} outputs are put together by `{word}` of "
                f"{operand.shape[axis]} and others"
            )
        return axis
    if word in REDUCTIONS:
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        if word in ("norm", "linalg_vector_norm"):
            dims = args[2] if len(args) > 2 else kwargs.get("dim")
        gone = {int(d) % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims or 0])}
        left = [dim for dim in range(rank) if dim not in gone]
        return left[axis]
    # A view: the axis before which as many elements lie, and of the same size.
    wanted, size = math.prod(result.shape[:axis]), result.shape[axis]
    for before in range(rank):
        if math.prod(operand.shape[:before]) == wanted and operand.shape[before] == size:
            return before
    raise Lost(f"its outputs are regrouped by `{word}`")


def channel_axis(value: Value) -> int:
    """Return the axis of a value [batch, …] that counts channels, by the layers that made it.

    Where nothing tells, that of an image or of a sequence of tokens.
    """
    rank = len(value.shape)
    for axis in range(1, rank):
        if _counts_channels(value, axis):
            return axis
    return rank - 1 if rank == 3 else 1


def _counts_channels(value: Value, axis: int) -> bool | None:
    """None where what made the value does not tell."""
    operator = value.made_by
    if operator is None:
        return None
    if operator.word in _CHANNELS_FIRST:
        return axis == 1
    if operator.word in _CHANNELS_LAST:
        return axis == len(value.shape) - 1
    for operand in operator.inputs:
        if operand.constant:
            continue
        try:
            joined = operator.word == "cat"  # of more or fewer, along whichever axis
            before = axis if joined else axis_before(operator, operand, value, axis)
            found = _counts_channels(operand, before)
        except (Lost, IndexError, TypeError):
            continue
        if found is not None:
            return found
    return None
