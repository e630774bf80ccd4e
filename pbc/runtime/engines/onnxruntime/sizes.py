"""Shapes that ONNX operators return, and the multiply-accumulates that they take.

A rule per family of operators, for those that torch's exporter writes. The specification is
https://onnx.ai/onnx/operators. A rule that lacks a shape or a value says nothing (None); what does
not fit raises ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np

from pbc.runtime.engines.onnxruntime.declared import Shape


@dataclass(frozen=True)
class Call:
    """An operator with what is known of its inputs; None: nothing, or that there is none."""

    attributes: Mapping[str, Any]
    shapes: Sequence[Shape | None]
    values: Sequence[np.ndarray | None]
    outputs: int

    def shape(self, index: int) -> Shape:
        """Return the shape of an input; raises Unknown where it is not known."""
        shape = self.shapes[index] if index < len(self.shapes) else None
        if shape is None:
            raise Unknown
        return shape

    def has(self, index: int) -> bool:
        """Return whether there is such an input, of known shape."""
        return index < len(self.shapes) and self.shapes[index] is not None

    def numbers(self, index: int) -> list[int]:
        """Return the whole numbers that an input holds; raises Unknown where they are not known."""
        value = self.values[index] if index < len(self.values) else None
        if value is None:
            raise Unknown
        return [int(number) for number in value.ravel()]

    def number(self, name: str, default: int) -> int:
        """Return an attribute that is a whole number."""
        value = self.attributes.get(name, default)
        if not isinstance(value, int):
            raise ValueError(f"its {name} is no whole number")
        return value

    def list(self, name: str, default: Sequence[int], least: int = 0) -> list[int]:
        """Return an attribute that is a list of whole numbers, as many as the default has."""
        value = self.attributes.get(name, default)
        if not isinstance(value, list | tuple) or len(value) != len(default):
            raise ValueError(f"its {name} has another length than {len(default)}")
        if any(not isinstance(number, int) or number < least for number in value):
            raise ValueError(f"its {name} is below {least}")
        return list(value)


_NEGATIVE = -(2**31)


class Unknown(Exception):
    """A shape depends on what is not known yet."""


Sized = tuple[list[Shape], int]
"""Shapes of the results, and the multiply-accumulates of products."""


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} of {rank}")
    return axis % rank


def _same(call: Call) -> Sized:
    return [call.shape(0)] * call.outputs, 0


def _broadcast(call: Call) -> Sized:
    shapes = [call.shape(index) for index in range(len(call.shapes))]
    return [tuple(int(size) for size in np.broadcast_shapes(*shapes))], 0


def _windows(call: Call, kernel: Sequence[int], sizes: Shape) -> list[int]:
    """Return how often a kernel fits along each axis."""
    ones, rank = [1] * len(kernel), len(kernel)
    if len(sizes) != rank:
        raise ValueError(f"a kernel of {rank} axes over {len(sizes)}")
    strides, dilations = call.list("strides", ones, 1), call.list("dilations", ones, 1)
    pads = call.list("pads", [0] * 2 * rank, _NEGATIVE)
    how = call.attributes.get("auto_pad", "NOTSET")
    found = []
    for axis, size in enumerate(sizes):
        stride = strides[axis]
        if how in ("SAME_UPPER", "SAME_LOWER"):
            found.append(-(-size // stride))
            continue
        before, after = (pads[axis], pads[axis + rank]) if how == "NOTSET" else (0, 0)
        room = before + size + after - dilations[axis] * (kernel[axis] - 1) - 1
        if room < 0:
            raise ValueError("a kernel is larger than what it moves over")
        count = room // stride + 1
        if call.number("ceil_mode", 0):
            count = -(-room // stride) + 1
            count -= (count - 1) * stride >= before + size  # it would begin behind the end
        found.append(count)
    return found


def _conv(call: Call) -> Sized:
    data, weight = call.shape(0), call.shape(1)
    if call.number("group", 1) < 1 or len(weight) < 3 or len(data) != len(weight):
        raise ValueError("no convolution")
    made = (data[0], weight[0], *_windows(call, weight[2:], data[2:]))
    return [made], prod(made) * prod(weight[1:])


def _conv_transpose(call: Call) -> Sized:
    data, weight = call.shape(0), call.shape(1)
    group, kernel = call.number("group", 1), weight[2:]
    if group < 1 or len(weight) < 3 or len(data) != len(weight):
        raise ValueError("no convolution")
    ones, zeros = [1] * len(kernel), [0] * len(kernel)
    strides, dilations = call.list("strides", ones, 1), call.list("dilations", ones, 1)
    pads, more = call.list("pads", zeros * 2, _NEGATIVE), call.list("output_padding", zeros)
    if "output_shape" in call.attributes:
        sizes = call.list("output_shape", ones, 1)
    else:
        sizes = [
            strides[axis] * (size - 1) + more[axis] + dilations[axis] * (kernel[axis] - 1) + 1
            - pads[axis] - pads[axis + len(kernel)]
            for axis, size in enumerate(data[2:])
        ]  # fmt: skip
    return [(data[0], weight[1] * group, *sizes)], prod(data) * prod(weight[1:])


def _pool(call: Call) -> Sized:
    data = call.shape(0)
    kernel = call.list("kernel_shape", [1] * (len(data) - 2), 1)
    made = (*data[:2], *_windows(call, kernel, data[2:]))
    return [made] * call.outputs, prod(made) * prod(kernel)


def _global_pool(call: Call) -> Sized:
    data = call.shape(0)
    return [(*data[:2], *[1] * (len(data) - 2))], 0


def _matmul(call: Call) -> Sized:
    one, other = call.shape(0), call.shape(1)
    left = one if len(one) > 1 else (1, *one)
    right = other if len(other) > 1 else (*other, 1)
    if left[-1] != right[-2]:
        raise ValueError(f"a product of {list(one)} and {list(other)}")
    outer = tuple(int(size) for size in np.broadcast_shapes(left[:-2], right[:-2]))
    made = (*outer, *left[-2:-1][: len(one) > 1], *right[-1:][: len(other) > 1])
    return [made], prod(outer) * left[-2] * left[-1] * right[-1]


def _gemm(call: Call) -> Sized:
    one, other = call.shape(0), call.shape(1)
    rows, inner = one[::-1] if call.number("transA", 0) else one
    depth, columns = other[::-1] if call.number("transB", 0) else other
    if inner != depth:
        raise ValueError(f"a product of {list(one)} and {list(other)}")
    if call.has(2) and np.broadcast_shapes(call.shape(2), (rows, columns)) != (rows, columns):
        raise ValueError(f"a bias of {list(call.shape(2))} for a product of {[rows, columns]}")
    return [(rows, columns)], rows * inner * columns


def _einsum(call: Call) -> Sized:
    given, arrow, result = str(call.attributes.get("equation", "")).replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for index, labels in enumerate(given.split(",")):
        shape = call.shape(index)
        if len(labels) != len(shape) or not labels.isalpha():
            raise ValueError("an einsum whose labels are not one for each axis")
        for label, size in zip(labels, shape, strict=True):
            if sizes.setdefault(label, size) not in (size, 1) and size != 1:
                raise ValueError("an einsum whose sizes differ")
            sizes[label] = max(sizes[label], size)
    if not arrow:
        raise ValueError("an einsum that does not say what it returns")
    return [tuple(sizes[label] for label in result)], prod(sizes.values())


def _reduce(call: Call) -> Sized:
    data = call.shape(0)
    axes = call.attributes.get("axes")
    if axes is None and call.has(1):
        axes = call.numbers(1)
    if not axes:
        if call.number("noop_with_empty_axes", 0):
            return [data], 0
        axes = range(len(data))
    return [_without(data, [_axis(axis, len(data)) for axis in axes], call)], 0


def _arg(call: Call) -> Sized:
    data = call.shape(0)
    return [_without(data, [_axis(call.number("axis", 0), len(data))], call)], 0


def _without(data: Shape, axes: Sequence[int], call: Call) -> Shape:
    if call.number("keepdims", 1):
        return tuple(1 if axis in axes else size for axis, size in enumerate(data))
    return tuple(size for axis, size in enumerate(data) if axis not in axes)


def _reshape(call: Call) -> Sized:
    data, wanted = call.shape(0), call.numbers(1)
    if not call.number("allowzero", 0):
        wanted = [data[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    if wanted.count(-1) == 1:
        rest = -prod(wanted)
        wanted = [(prod(data) // rest if rest else 0) if size == -1 else size for size in wanted]
    if min(wanted, default=1) < 0 or prod(wanted) != prod(data):
        raise ValueError(f"{list(data)} as {wanted}")
    return [tuple(wanted)], 0


def _flatten(call: Call) -> Sized:
    data, axis = call.shape(0), call.number("axis", 1)
    axis = axis + len(data) if axis < 0 else axis
    return [(prod(data[:axis]), prod(data[axis:]))], 0


def _transpose(call: Call) -> Sized:
    data = call.shape(0)
    order = call.attributes.get("perm") or list(range(len(data)))[::-1]
    if sorted(order) != list(range(len(data))):
        raise ValueError(f"{list(data)} in the order {order}")
    return [tuple(data[axis] for axis in order)], 0


def _expand(call: Call) -> Sized:
    sizes = np.broadcast_shapes(call.shape(0), tuple(_sizes(call.numbers(1))))
    return [tuple(int(size) for size in sizes)], 0


def _tile(call: Call) -> Sized:
    data, times = call.shape(0), _sizes(call.numbers(1))
    return [tuple(size * time for size, time in zip(data, times, strict=True))], 0


def _axes(call: Call) -> list[int] | None:
    axes: list[int] | None = call.attributes.get("axes")
    return call.numbers(1) if axes is None and call.has(1) else axes


def _squeeze(call: Call) -> Sized:
    data, axes = call.shape(0), _axes(call)
    if axes is None:
        return [tuple(size for size in data if size != 1)], 0
    gone = [_axis(axis, len(data)) for axis in axes]
    return [tuple(size for axis, size in enumerate(data) if axis not in gone)], 0


def _unsqueeze(call: Call) -> Sized:
    data, axes = list(call.shape(0)), _axes(call)
    if axes is None:
        raise Unknown
    for axis in sorted(_axis(axis, len(data) + len(axes)) for axis in axes):
        data.insert(axis, 1)
    return [tuple(data)], 0


def _concat(call: Call) -> Sized:
    shapes = [call.shape(index) for index in range(len(call.shapes))]
    axis = _axis(call.number("axis", 0), len(shapes[0]))
    made = list(shapes[0])
    made[axis] = sum(shape[axis] for shape in shapes)
    return [tuple(made)], 0


def _split(call: Call) -> Sized:
    data = call.shape(0)
    axis = _axis(call.number("axis", 0), len(data))
    if call.has(1):
        sizes = _sizes(call.numbers(1))
    else:
        part = -(-data[axis] // call.outputs)
        sizes = [min(part, max(0, data[axis] - part * n)) for n in range(call.outputs)]
    return [(*data[:axis], size, *data[axis + 1 :]) for size in sizes], 0


def _slice(call: Call) -> Sized:
    made = list(call.shape(0))
    starts, ends = call.numbers(1), call.numbers(2)
    axes = call.numbers(3) if call.has(3) else list(range(len(starts)))
    steps = call.numbers(4) if call.has(4) else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = _axis(axis, len(made))
        made[place] = len(range(*slice(start, end, step).indices(made[place])))
    return [tuple(made)], 0


def _pad(call: Call) -> Sized:
    made, pads = list(call.shape(0)), call.numbers(1)
    axes = call.numbers(3) if call.has(3) else list(range(len(made)))
    for number, axis in enumerate(axes):
        made[_axis(axis, len(made))] += pads[number] + pads[number + len(axes)]
    return [tuple(made)], 0


def _gather(call: Call) -> Sized:
    data, indices = call.shape(0), call.shape(1)
    axis = _axis(call.number("axis", 0), len(data))
    return [(*data[:axis], *indices, *data[axis + 1 :])], 0


def _gather_nd(call: Call) -> Sized:
    data, indices = call.shape(0), call.shape(1)
    return [(*indices[:-1], *data[call.number("batch_dims", 0) + indices[-1] :])], 0


def _second(call: Call) -> Sized:
    return [call.shape(1)], 0


def _resize(call: Call) -> Sized:
    data = call.shape(0)
    axes = call.attributes.get("axes") or list(range(len(data)))
    made = list(data)
    if call.has(3):
        wanted: Sequence[float] = call.numbers(3)
    else:
        scales = call.values[2] if len(call.values) > 2 else None
        if scales is None:
            raise Unknown
        scaled = zip(axes, scales.astype(np.float32).ravel(), strict=True)
        wanted = [float(np.float32(data[axis]) * scale) for axis, scale in scaled]
    for axis, size in zip(axes, wanted, strict=True):
        made[_axis(axis, len(data))] = int(size)
    # Cubic interpolation reads four values along each axis.
    return [tuple(made)], 16 * prod(made)


def _depth_to_space(call: Call) -> Sized:
    data, block = call.shape(0), _block(call)
    return [(data[0], data[1] // block**2, data[2] * block, data[3] * block)], 0


def _space_to_depth(call: Call) -> Sized:
    data, block = call.shape(0), _block(call)
    return [(data[0], data[1] * block**2, data[2] // block, data[3] // block)], 0


def _block(call: Call) -> int:
    block = call.number("blocksize", 1)
    if block < 1 or len(call.shape(0)) != 4:
        raise ValueError(f"blocks of {block}")
    return block


def _one_hot(call: Call) -> Sized:
    made, (depth,) = list(call.shape(0)), call.numbers(1)
    axis = _axis(call.number("axis", -1), len(made) + 1)
    return [(*made[:axis], *_sizes([depth]), *made[axis:])], 0


def _constant_of_shape(call: Call) -> Sized:
    return [tuple(_sizes(call.numbers(0)))], 0


def _range(call: Call) -> Sized:
    start, end, step = (call.values[index] for index in range(3))
    if start is None or end is None or step is None:
        raise Unknown
    return [(max(0, ceil((end.item() - start.item()) / step.item())),)], 0


def _top_k(call: Call) -> Sized:
    made, (count,) = list(call.shape(0)), call.numbers(1)
    made[_axis(call.number("axis", -1), len(made))] = count
    return [tuple(made)] * call.outputs, 0


def _shape(call: Call) -> Sized:
    rank = len(call.shape(0))
    kept = slice(call.number("start", 0), call.number("end", rank))
    return [(len(range(rank)[kept]),)], 0


def _scalar(call: Call) -> Sized:
    return [()], 0


def _non_zero(call: Call) -> Sized:
    data = call.shape(0)
    return [(len(data), prod(data))], 0


def _grid_sample(call: Call) -> Sized:
    made = (*call.shape(0)[:2], *call.shape(1)[1:-1])
    return [made], 16 * prod(made)


def _col_to_im(call: Call) -> Sized:
    data, image, block = call.shape(0), _sizes(call.numbers(1)), _sizes(call.numbers(2))
    return [(data[0], data[1] // prod(block), *image)], prod(data)


def _recurrent(call: Call) -> Sized:
    (steps, batch, _), weight, recurrent = call.shape(0), call.shape(1), call.shape(2)
    directions, hidden = weight[0], recurrent[2]
    state = (directions, batch, hidden)
    work = steps * batch * (prod(weight) + prod(recurrent))
    return [(steps, directions, batch, hidden), state, state][: call.outputs], work


def _sizes(numbers: list[int]) -> list[int]:
    if min(numbers, default=0) < 0:
        raise ValueError(f"a size of {min(numbers)}")
    return numbers


_SAME = """
Abs Acos Acosh Asin Asinh Atan Atanh BatchNormalization Bernoulli BitwiseNot Cast CastLike Ceil Celu
Clip Cos Cosh CumSum DequantizeLinear Dropout Elu Erf Exp EyeLike Floor Gelu GroupNormalization
HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf IsNaN LRN LayerNormalization
LeakyRelu Log LogSoftmax LpNormalization Mish Neg Not QuantizeLinear RandomNormalLike
RandomUniformLike Reciprocal Relu Round ScatterElements ScatterND Selu Shrink Sigmoid Sign Sin Sinh
Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Trilu
"""
_ELEMENTWISE = """
Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual
Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor
"""
_REDUCTIONS = """
ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare
"""
RULES: Mapping[str, Callable[[Call], Sized]] = {
    **dict.fromkeys(_SAME.split(), _same),
    **dict.fromkeys(_ELEMENTWISE.split(), _broadcast),
    **dict.fromkeys(_REDUCTIONS.split(), _reduce),
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg),
    **dict.fromkeys(("AveragePool", "LpPool", "MaxPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"), _global_pool),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
    "Col2Im": _col_to_im,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _second,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "GridSample": _grid_sample,
    "MatMul": _matmul,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Size": _scalar,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
