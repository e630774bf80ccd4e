"""What torch has no decomposition for: gradients in terms of operators that inference engines have.

Each function has the signature of the operator that it stands for, and computes what that does.
`table` adds them to torch's own; `DIFFERENTIABLE` replaces what is better taken apart before it is
differentiated than after.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions

aten = torch.ops.aten

# Forward operators that every engine has as one: taking them apart costs time and precision.
WHOLE = (
    aten._log_softmax.default,
    aten._softmax.default,
    aten.addmm.default,
    aten.avg_pool2d.default,
    aten.elu.default,
    aten.gelu.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.hardtanh.default,
    aten.leaky_relu.default,
    aten.max_pool2d_with_indices.default,
    aten.native_group_norm.default,
    aten.native_layer_norm.default,
    aten.silu.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_nearest2d.vec,
)


# The identities of tensors that no step changes; engines work their constants up ahead of time.
_frozen: ContextVar[frozenset[int]] = ContextVar("pbc_frozen", default=frozenset())


@contextmanager
def frozen(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let decompositions inside the block prefer what is fast for these constants."""
    token = _frozen.set(frozenset(id(tensor) for tensor in tensors))
    try:
        yield
    finally:
        _frozen.reset(token)


@functools.cache
def table() -> dict[Any, Callable[..., Any]]:
    """Return torch's decompositions without those of `WHOLE`, and with ours."""
    known: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    for op in WHOLE:
        known.pop(op, None)
    known[aten.convolution_backward.default] = convolution_backward
    known[aten.threshold_backward.default] = threshold_backward
    known[aten.gelu_backward.default] = gelu_backward
    known[aten.hardswish_backward.default] = hardswish_backward
    known[aten.hardsigmoid_backward.default] = hardsigmoid_backward
    known[aten.max_pool2d_with_indices_backward.default] = max_pool2d_with_indices_backward
    known[aten.avg_pool2d_backward.default] = avg_pool2d_backward
    known[aten._adaptive_avg_pool2d_backward.default] = adaptive_avg_pool2d_backward
    known[aten.upsample_nearest2d_backward.default] = upsample_nearest2d_backward
    known[aten.upsample_bilinear2d_backward.default] = upsample_bilinear2d_backward
    return known


# ---- convolution ---------------------------------------------------------------------------


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """aten.convolution_backward of a convolution over any number of spatial axes.

    The input's gradient is the transposed convolution (Dumoulin and Visin, A guide to convolution
    arithmetic, 2016). Engines are slow at that, so it has two more forms: by a frozen kernel of
    stride one, the convolution with the kernel turned around, which is a constant then; by a
    trained kernel over small pictures, one matrix product of all images, tap beside tap (im2col;
    Chellapilla et al., IWFHR 2006). The weight's gradient is such a product too.
    Raises NotImplementedError for the backward of a transposed convolution.
    """
    if transposed:
        raise NotImplementedError("the gradient of a transposed convolution")
    layer = _Convolution(x.shape, weight.shape, stride, padding, dilation, groups)
    small = groups == 1 and math.prod(grad.shape[2:]) <= _SMALL_PICTURE
    grad_x = grad_weight = grad_bias = None
    if wanted[0]:
        if id(weight) in _frozen.get() and all(s == 1 for s in stride):
            grad_x = _input_gradient_by_turning(grad, weight, layer)
        elif small:
            grad_x = _input_gradient_by_columns(grad, weight, layer)
        else:
            grad_x = _input_gradient_transposed(grad, weight, layer)
    if wanted[1]:
        grad_weight = _weight_gradient(grad, x, layer, small)
    if wanted[2]:
        grad_bias = grad.sum([0, *range(2, grad.dim())])
    return grad_x, grad_weight, grad_bias


# Output positions per channel up to which all images share one matrix product.
_SMALL_PICTURE = 256


@dataclass(frozen=True)
class _Convolution:
    """What a convolution is but for its values; shapes as torch has them."""

    x: Sequence[int]
    weight: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    @property
    def kernel(self) -> Sequence[int]:
        return self.weight[2:]

    @property
    def taps(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*(range(size) for size in self.kernel)))

    def seen(self, x: Tensor, tap: Sequence[int], outputs: Sequence[int]) -> Tensor:
        """What one tap of the kernel multiplies at every output position; x is padded."""
        for axis, (index, size) in enumerate(zip(tap, outputs, strict=True)):
            start, step = index * self.dilation[axis], self.stride[axis]
            if (start, step) != (0, 1) or size != x.shape[2 + axis]:
                stop = start + (size - 1) * step + 1
                x = aten.slice.Tensor(x, 2 + axis, start, stop, step)
        return x

    def padded(self, x: Tensor) -> Tensor:
        return _pad(x, [(p, p) for p in self.padding])


def _pad(x: Tensor, margins: Sequence[tuple[int, int]]) -> Tensor:
    """Add zeros before and after each spatial axis."""
    if not any(any(margin) for margin in margins):
        return x
    flat = [size for margin in reversed(margins) for size in margin]
    padded: Tensor = aten.constant_pad_nd.default(x, flat, 0.0)
    return padded


def _rows(x: Tensor) -> Tensor:
    """[channels, everything else] of [batch, channels, …]."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def _weight_gradient(grad: Tensor, x: Tensor, layer: _Convolution, small: bool) -> Tensor:
    outputs, taps, groups = grad.shape[2:], layer.taps, layer.groups
    depthwise = groups > 1 and tuple(layer.weight[:2]) == (groups, 1)
    if depthwise and layer.x[-1] <= _SMALL_ROW:
        return _depthwise_weight_gradient(grad, x, layer)
    x = layer.padded(x)
    if groups == 1 and (small or len(taps) == 1):
        columns = [_rows(layer.seen(x, tap, outputs)) for tap in taps]
        stacked = columns[0] if len(taps) == 1 else torch.stack(columns, 1)
        # [channels, taps]: the order in which the weight has them.
        stacked = stacked.reshape(layer.weight[1] * len(taps), -1)
        return (_rows(grad) @ stacked.t()).reshape(layer.weight)
    if groups == 1:
        rows = _rows(grad)
        products = [rows @ _rows(layer.seen(x, tap, outputs)).t() for tap in taps]
        return torch.stack(products, -1).reshape(layer.weight)
    batch, per_group, per_output = layer.x[0], layer.weight[1], layer.weight[0] // groups
    if depthwise:
        # One multiplication and one sum per tap of the kernel.
        axes = [0, *range(2, grad.dim())]
        sums = [(layer.seen(x, tap, outputs) * grad).sum(axes) for tap in taps]
        return torch.stack(sums, -1).reshape(layer.weight)
    by_group = grad.reshape(batch, groups, per_output, -1)
    products = [
        (
            by_group
            @ layer.seen(x, tap, outputs).reshape(batch, groups, per_group, -1).transpose(-1, -2)
        ).sum(0)
        for tap in taps
    ]
    return torch.stack(products, -1).reshape(layer.weight)


# Positions of a row up to which products of rows beat a multiplication and a sum per tap.
_SMALL_ROW = 64


def _depthwise_weight_gradient(grad: Tensor, x: Tensor, layer: _Convolution) -> Tensor:
    """Per channel and row of the kernel, what every input column times every output column gives.

    Those are matrix products over all images and rows; of each, a tap takes its diagonal.
    """
    channels, columns, out_columns = layer.x[1], layer.x[-1], grad.shape[-1]
    # [channels, rows…, batch, columns]
    order = [*range(1, x.dim() - 1), 0, x.dim() - 1]
    images, slopes = x.permute(order), grad.permute(order)
    margins = [0, 0, 0, 0, *(p for p in reversed(layer.padding[:-1]) for _ in range(2))]
    if any(margins):
        images = aten.constant_pad_nd.default(images, margins, 0.0)
    slopes = slopes.reshape(channels, -1, out_columns)
    products = []
    for tap in itertools.product(*(range(size) for size in layer.kernel[:-1])):
        seen = images
        for axis, index in enumerate(tap):
            start, step = index * layer.dilation[axis], layer.stride[axis]
            stop = start + (grad.shape[2 + axis] - 1) * step + 1
            seen = aten.slice.Tensor(seen, 1 + axis, start, stop, step)
        seen = seen.reshape(channels, -1, columns)
        products.append(seen.transpose(1, 2) @ slopes)
    row = _Convolution(
        (1, 1, columns),
        (1, 1, layer.kernel[-1]),
        layer.stride[-1:],
        layer.padding[-1:],
        layer.dilation[-1:],
        1,
    )
    _, where = _connections(row)
    stacked = torch.stack(products, 1).reshape(-1, columns * out_columns)
    return (stacked @ where.to(grad.dtype).t()).reshape(layer.weight)


def _input_gradient_by_columns(grad: Tensor, weight: Tensor, layer: _Convolution) -> Tensor:
    """One product to what every tap contributes, and the contributions added up in place."""
    (batch, channels, *size), outputs, taps = layer.x, grad.shape[2:], layer.taps
    columns = weight.reshape(layer.weight[0], -1).t() @ _rows(grad)
    columns = columns.reshape(channels, len(taps), batch, *outputs)
    total: Tensor | None = None
    whole = [s + 2 * p for s, p in zip(size, layer.padding, strict=True)]
    for number, tap in enumerate(taps):
        part = _spread(aten.select.int(columns, 1, number), layer.stride)
        starts = [index * d for index, d in zip(tap, layer.dilation, strict=True)]
        margins = [
            (start, total_size - start - part_size)
            for start, total_size, part_size in zip(starts, whole, part.shape[2:], strict=True)
        ]
        part = _pad(part, margins)
        total = part if total is None else total + part
    assert total is not None
    return _inner(total, layer.padding, size).transpose(0, 1)


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Put stride - 1 zeros between neighbours."""
    for axis, step in enumerate(stride, 2):
        if step > 1:
            shape = list(x.shape)
            # A padding begins with the last axis: none for those behind the one that is inserted.
            behind = [0, 0] * (x.dim() - 1 - axis)
            wide = aten.constant_pad_nd.default(x.unsqueeze(axis + 1), [*behind, 0, step - 1], 0.0)
            shape[axis] = shape[axis] * step
            x = aten.slice.Tensor(wide.reshape(shape), axis, 0, shape[axis] - step + 1)
    return x


def _inner(x: Tensor, margins: Sequence[int], size: Sequence[int]) -> Tensor:
    for axis, (margin, length) in enumerate(zip(margins, size, strict=True), 2):
        if margin or x.shape[axis] != length:
            x = aten.slice.Tensor(x, axis, margin, margin + length)
    return x


def _input_gradient_by_turning(grad: Tensor, weight: Tensor, layer: _Convolution) -> Tensor:
    """The convolution of the gradient with the kernel turned around; the stride is one."""
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel, strict=True)]
    margins = [r - p for r, p in zip(reach, layer.padding, strict=True)]
    # Padding beyond the kernel's reach only ever met zeros.
    grad = _inner(grad, [max(0, -m) for m in margins], [
        size - 2 * max(0, -m) for size, m in zip(grad.shape[2:], margins, strict=True)
    ])  # fmt: skip
    ones, zeros = [1] * len(margins), [0] * len(margins)
    grad_x: Tensor = aten.convolution.default(
        grad,
        _turned(weight, layer.groups),
        None,
        ones,
        [max(0, m) for m in margins],
        layer.dilation,
        False,
        zeros,
        layer.groups,
    )
    return grad_x


def _turned(weight: Tensor, groups: int) -> Tensor:
    """Inputs and outputs of each group swapped, the kernel turned around."""
    outputs, per_group, *kernel = weight.shape
    if (per_group, outputs) != (1, groups):
        weight = weight.reshape(groups, outputs // groups, per_group, *kernel).transpose(1, 2)
        weight = weight.reshape(groups * per_group, outputs // groups, *kernel)
    turning = [axis for axis, size in enumerate(kernel, 2) if size > 1]
    return aten.flip.default(weight, turning) if turning else weight


def _input_gradient_transposed(grad: Tensor, weight: Tensor, layer: _Convolution) -> Tensor:
    """The transposed convolution (Dumoulin and Visin, A guide to convolution arithmetic, 2016)."""
    missing = [
        # Rows at the end that no window reached: their gradient is zero.
        layer.x[2 + axis] - ((grad.shape[2 + axis] - 1) * s - 2 * p + d * (k - 1) + 1)
        for axis, (s, p, d, k) in enumerate(
            zip(layer.stride, layer.padding, layer.dilation, layer.kernel, strict=True)
        )
    ]
    grad_x: Tensor = aten.convolution.default(
        grad, weight, None, layer.stride, layer.padding, layer.dilation, True, missing, layer.groups
    )
    return grad_x


# ---- activations ---------------------------------------------------------------------------
# By factors of 0 and 1: engines vectorise a comparison and a product, and select one by one.


def threshold_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Let through what was above the threshold; for a ReLU `x` is its result."""
    mask = (x > threshold).to(grad.dtype)
    return grad * mask


def hardsigmoid_backward(grad: Tensor, x: Tensor) -> Tensor:
    """One sixth between -3 and 3."""
    return grad * (_between(x) * (1 / 6))


def hardswish_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Differentiate x · hardsigmoid(x) as a product."""
    share: Tensor = aten.hardsigmoid.default(x)
    return grad * (share + x * (_between(x) * (1 / 6)))


def _between(x: Tensor) -> Tensor:
    """1 where -3 < x < 3, else 0."""
    return (x.abs() < 3).to(x.dtype)


def gelu_backward(grad: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    """Differentiate x · Φ(x): with u = x/√2, that is (1 + erf u)/2 + u · exp(-u²)/√π."""
    if approximate != "none":
        by_tanh: Tensor = core_aten_decompositions()[aten.gelu_backward.default](
            grad, x, approximate=approximate
        )
        return by_tanh
    u = x * math.sqrt(0.5)
    # The factor 1/√π as a term of the exponent, that one subtraction serves the sign as well.
    factor: Tensor = aten.scalar_tensor.default(-0.5 * math.log(math.pi), dtype=x.dtype)
    slope = u.erf() * 0.5 + u * (factor - u * u).exp() + 0.5
    return grad * slope


# ---- pooling -------------------------------------------------------------------------------


def max_pool2d_with_indices_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Send each gradient to where its maximum was; windows that overlap add up."""
    batch, channels, height, width = x.shape
    zeros = aten.full.default(
        [batch, channels, height * width], 0.0, dtype=grad.dtype, device=grad.device
    )
    spread = aten.scatter_add.default(
        zeros, 2, indices.reshape(batch, channels, -1), grad.reshape(batch, channels, -1)
    )
    grad_x: Tensor = spread.reshape(x.shape)
    return grad_x


def avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Spread each gradient evenly over its window: a transposed depthwise convolution of ones."""
    padding = _pair(padding)
    if ceil_mode or (any(padding) and not count_include_pad):
        raise NotImplementedError(
            "the gradient of an average pooling with ceil_mode or without its padding"
        )
    kernel, stride = _pair(kernel), _pair(stride) if stride else _pair(kernel)
    channels = x.shape[1]
    share = 1 / (divisor_override or math.prod(kernel))
    ones = aten.full.default([channels, 1, *kernel], share, dtype=grad.dtype, device=grad.device)
    grad_x, _, _ = convolution_backward(
        grad, x, ones, None, stride, padding, (1, 1), False, (0, 0), channels, (True, False, False)
    )
    assert grad_x is not None
    return grad_x


def adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Multiply by the transposed averaging matrices of both axes."""
    if all(size == 1 for size in grad.shape[2:]):
        return (grad / (x.shape[2] * x.shape[3])).expand(x.shape)
    rows = _averaging(x.shape[2], grad.shape[2], grad)
    columns = _averaging(x.shape[3], grad.shape[3], grad)
    return rows.t() @ grad @ columns


def _averaging(size: int, bins: int, like: Tensor) -> Tensor:
    """[bins, size]: what each position counts in each of the adaptive pooling's bins."""
    matrix = [[0.0] * size for _ in range(bins)]
    for index, row in enumerate(matrix):
        start, stop = index * size // bins, -(-(index + 1) * size // bins)
        row[start:stop] = [1 / (stop - start)] * (stop - start)
    return torch.tensor(matrix, dtype=like.dtype, device=like.device)


# ---- upsampling ----------------------------------------------------------------------------


def upsample_nearest2d_backward(
    grad: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Tensor:
    """Add up what each position was copied to."""
    matrices = (
        _sampling(size, outputs, scale, lambda at: [(math.floor(at), 1.0)], grad)
        for size, outputs, scale in zip(
            input_size[2:], output_size, (scales_h, scales_w), strict=True
        )
    )
    rows, columns = matrices
    return rows.t() @ grad @ columns


def upsample_bilinear2d_backward(
    grad: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Tensor:
    """Multiply by the transposed interpolation matrices of both axes."""
    matrices = []
    for size, outputs, scale in zip(input_size[2:], output_size, (scales_h, scales_w), strict=True):
        if align_corners:
            step = (size - 1) / (outputs - 1) if outputs > 1 else 0.0
            positions = [index * step for index in range(outputs)]
        else:
            step = 1 / scale if scale else size / outputs
            positions = [max(0.0, (index + 0.5) * step - 0.5) for index in range(outputs)]
        matrices.append(_matrix([_neighbours(at, size) for at in positions], size, grad))
    rows, columns = matrices
    return rows.t() @ grad @ columns


def _sampling(
    size: int,
    outputs: int,
    scale: float | None,
    weights: Callable[[float], list[tuple[int, float]]],
    like: Tensor,
) -> Tensor:
    step = 1 / scale if scale else size / outputs
    sources = [
        [(min(at, size - 1), share) for at, share in weights(index * step)]
        for index in range(outputs)
    ]
    return _matrix(sources, size, like)


def _neighbours(at: float, size: int) -> list[tuple[int, float]]:
    below = min(math.floor(at), size - 1)
    share = at - below
    return [(below, 1 - share), (min(below + 1, size - 1), share)]


def _matrix(rows: list[list[tuple[int, float]]], size: int, like: Tensor) -> Tensor:
    """[outputs, size]: what each output takes from each position."""
    matrix = [[0.0] * size for _ in rows]
    for row, sources in zip(matrix, rows, strict=True):
        for at, share in sources:
            row[at] += share
    return torch.tensor(matrix, dtype=like.dtype, device=like.device)


def _pair(value: Sequence[int]) -> tuple[int, int]:
    first, second = value if len(value) == 2 else (value[0], value[0])
    return first, second


# ---- taken apart before differentiation ----------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """aten.linear as one matrix product over all leading axes.

    torch's own broadcasts the weight over the batch for inputs of three axes, and engines then
    make the copies.
    """
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    product = rows @ weight.t() if bias is None else aten.addmm.default(bias, rows, weight.t())
    return product.reshape(*x.shape[:-1], weight.shape[0]) if x.dim() != 2 else product


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """aten.conv2d; a trained depthwise one over small pictures as a matrix product per channel.

    Engines are an order of magnitude slower at depthwise kernels that are no constants.
    """
    positions = math.prod(x.shape[2:])
    depthwise = groups == x.shape[1] == weight.shape[0] and groups > 1
    if not depthwise or id(weight) in _frozen.get() or positions > _SMALL_CHANNEL:
        result: Tensor = aten.conv2d.default(x, weight, bias, stride, padding, dilation, groups)
        return result
    layer = _Convolution(
        x.shape, weight.shape, _pair(stride), _pair(padding), _pair(dilation), groups
    )
    outputs, where = _connections(layer)
    matrices = weight.reshape(groups, -1) @ where.to(weight.dtype)
    matrices = matrices.reshape(groups, positions, math.prod(outputs))
    rows = x.reshape(-1, groups, positions).transpose(0, 1) @ matrices
    y = rows.transpose(0, 1).reshape(-1, groups, *outputs)
    return y if bias is None else y + bias.reshape(1, -1, 1, 1)


# Positions of a channel up to which a matrix of them by outputs is small.
_SMALL_CHANNEL = 64


def _connections(layer: _Convolution) -> tuple[list[int], Tensor]:
    """Output sizes, and f32 [taps, inputs x outputs]: 1 where a tap connects the two."""
    size = layer.x[2:]
    outputs = [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, p, d, k, step in zip(
            size, layer.padding, layer.dilation, layer.kernel, layer.stride, strict=True
        )
    ]
    table = [[0.0] * (math.prod(size) * math.prod(outputs)) for _ in layer.taps]
    for row, tap in zip(table, layer.taps, strict=True):
        for number, output in enumerate(itertools.product(*(range(count) for count in outputs))):
            at = [
                o * step + t * d - p
                for o, step, t, d, p in zip(
                    output, layer.stride, tap, layer.dilation, layer.padding, strict=True
                )
            ]
            if all(0 <= a < s for a, s in zip(at, size, strict=True)):
                place = 0
                for a, s in zip(at, size, strict=True):
                    place = place * s + a
                row[place * math.prod(outputs) + number] = 1.0
    return outputs, torch.tensor(table, device="cpu")


def adaptive_avg_pool2d(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """aten.adaptive_avg_pool2d; a mean where one value per channel is left.

    torch's own writes its strides into the mean of a picture that lies channels last. That write is
    no operator of a graph, and its gradient is zero there.
    """
    if all(size == 1 for size in output_size):
        return x.mean((-2, -1), keepdim=True)
    pooled: Tensor = aten._adaptive_avg_pool2d.default(x, output_size)
    return pooled


def vector_norm(
    x: Tensor,
    order: float = 2,
    axes: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """aten.linalg_vector_norm; the Euclidean one from a sum, whose gradient at zero is zero.

    torch's own writes that zero into the gradient.
    """
    if order != 2 or dtype is not None:
        norm: Tensor = aten.linalg_vector_norm.default(x, order, axes, keepdim, dtype=dtype)
        return norm
    squares = x.square().sum(list(range(x.dim()) if axes is None else axes), keepdim)
    # Below the rounding of any norm but zero.
    euclidean: Tensor = (squares + 1e-30).sqrt()
    return euclidean


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """aten.scaled_dot_product_attention from products and a softmax, [..., tokens, head_dim]."""
    if is_causal or enable_gqa or dropout:
        raise NotImplementedError("the gradient of causal or grouped attention, or with dropout")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -math.inf)
    alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    if not alike or (mask is not None and mask.requires_grad):
        return _attention_weights(query * factor, key, mask) @ value
    attended: Tensor = _Attention.apply(query * factor, key, value, mask)  # type: ignore[no-untyped-call]
    return attended


def _attention_weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(-1, -2)
    return torch.softmax(scores if mask is None else scores + mask, -1)


class _Attention(torch.autograd.Function):
    """Attention whose backward makes the weights again instead of keeping [tokens, tokens].

    Dao et al., FlashAttention (NeurIPS 2022): what a query's scores share of the softmax's
    gradient is the product of its result and that result's gradient.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        attended = _attention_weights(query, key, mask) @ value
        ctx.save_for_backward(query, key, value, mask, attended)
        return attended

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        query, key, value, mask, attended = ctx.saved_tensors
        weights = _attention_weights(query, key, mask)
        shared = (grad * attended).sum(-1, keepdim=True)
        grad_scores = weights * (grad @ value.transpose(-1, -2) - shared)
        return (
            grad_scores @ key,
            grad_scores.transpose(-1, -2) @ query,
            weights.transpose(-1, -2) @ grad,
            None,
        )


def unbind(x: Tensor, axis: int) -> tuple[Tensor, ...]:
    """Take a tensor apart along an axis; the gradients are put together again, in one copy.

    torch's own spreads the gradient of each part over zeros of the whole, and adds those up.
    """
    parts: tuple[Tensor, ...] = _Unbind.apply(x, axis)  # type: ignore[no-untyped-call]
    return parts


class _Unbind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> tuple[Tensor, ...]:
        ctx.axis = axis
        return tuple(aten.select.int(x, axis, index) for index in range(x.shape[axis]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return torch.stack(grads, ctx.axis), None


def _affine(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """What a batch norm with these statistics multiplies by and then adds."""
    inverse = (variance + epsilon).rsqrt()
    scale = inverse if weight is None else weight * inverse
    return scale, -mean * scale if bias is None else bias - mean * scale


def normed_convolution(convolution: Sequence[Any], norm: Sequence[Any]) -> Tensor:
    """aten.conv2d of these arguments, and a batch norm of frozen statistics of what comes out.

    As one convolution with a scaled kernel: no other operator then touches what comes out, neither
    here nor in the gradient, and none of it is kept.
    """
    x, weight, bias, *window = convolution if len(convolution) > 2 else (*convolution, None)
    norm_weight, norm_bias, mean, variance, _, _, epsilon, _ = norm
    scale, shift = _affine(norm_weight, norm_bias, mean, variance, epsilon)
    shift = shift if bias is None else shift + bias * scale
    # As a matrix: engines are slow at sums over an axis in the middle, which is the gradient's.
    kernel = weight.reshape(weight.shape[0], -1) * scale.unsqueeze(1)
    return conv2d(x, kernel.reshape(weight.shape), shift, *window)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    momentum: float,
    epsilon: float,
    cudnn_enabled: bool,
) -> Tensor:
    """aten.batch_norm with frozen statistics: one multiplication and one addition per value."""
    if training:
        raise NotImplementedError("a batch norm that computes the statistics of its batch")
    scale, shift = _affine(weight, bias, mean, variance, epsilon)
    shape = (1, -1, *[1] * (x.dim() - 2))
    return x * scale.reshape(shape) + shift.reshape(shape)


DIFFERENTIABLE: dict[Any, Callable[..., Any]] = {
    aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d,
    aten.conv2d.default: conv2d,
    aten.linalg_vector_norm.default: vector_norm,
    aten.linear.default: linear,
    aten.scaled_dot_product_attention.default: scaled_dot_product_attention,
    aten.batch_norm.default: batch_norm,
}
