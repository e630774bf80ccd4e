"""Every decomposition of ours against torch's own autograd, over shapes that hypothesis picks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from pbc.training_graph.decompositions import (
    DIFFERENTIABLE,
    activations,
    attention,
    convolution_gradients,
    convolutions,
    grid_samples,
    matrices,
    norms,
    pooling,
    resizing,
    selections,
    slices,
    table,
    windows,
)
from pbc.training_graph.decompositions.constants import frozen

aten = torch.ops.aten

settings.register_profile("quick", deadline=None, max_examples=40)
settings.load_profile("quick")


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_close(value: Tensor | None, expected: Tensor | None) -> None:
    assert (value is None) == (expected is None)
    if value is not None and expected is not None:
        # A sixth in torch's own kernels is one of float32.
        torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-7)


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(5, 8), st.integers(5, 8)),
    bias=st.booleans(),
    small=st.booleans(),
    is_frozen=st.booleans(),
)
def test_convolution_backward(
    batch: int,
    groups: int,
    per_group: int,
    outputs: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
    bias: bool,
    small: bool,
    is_frozen: bool,
) -> None:
    x = random(batch, groups * per_group, *size)
    weight = random(groups * outputs, per_group, *kernel)
    result = functional.conv2d(x, weight, None, stride, padding, dilation, groups)
    arguments = (
        random(*result.shape),
        x,
        weight,
        [groups * outputs] if bias else None,
        stride,
        padding,
        dilation,
        False,
        (0, 0),
        groups,
        (True, True, bias),
    )
    expected = aten.convolution_backward.default(*arguments)
    with (
        mock.patch.object(convolution_gradients, "_SMALL_FEATURE_MAP", 256 if small else 0),
        mock.patch.object(convolution_gradients, "_SMALL_ROW", 64 if small else 0),
        frozen([weight] if is_frozen else []),
    ):
        found = convolution_gradients.convolution_backward(*arguments)
    for value, goal in zip(found, expected, strict=True):
        assert_close(value, goal)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_threshold_backward(threshold: float) -> None:
    x, grad = random(7, 9), random(9, 7).t()
    assert_close(
        activations.threshold_backward(grad, x, threshold),
        aten.threshold_backward.default(grad, x, threshold),
    )


@pytest.mark.parametrize("name", ["hardswish", "hardsigmoid"])
def test_hard_activations_backward(name: str) -> None:
    x, grad = 3 * random(7, 9), random(9, 7).t()
    found = getattr(activations, f"{name}_backward")(grad, x)
    assert_close(found, getattr(aten, f"{name}_backward").default(grad, x))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_backward(approximate: str) -> None:
    x, grad = 3 * random(7, 9), random(9, 7).t()
    assert_close(
        activations.gelu_backward(grad, x, approximate),
        aten.gelu_backward.default(grad, x, approximate=approximate),
    )


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("size", [(9,), (3, 5, 4)])
def test_convolution_backward_over_other_numbers_of_axes(
    size: tuple[int, ...], groups: int
) -> None:
    axes = len(size)
    x, weight = random(2, 4, *size), random(4, 4 // groups, *[3] * axes)
    stride, padding, one = (2,) * axes, (1,) * axes, (1,) * axes
    result = aten.convolution.default(x, weight, None, stride, padding, one, False, [0], groups)
    arguments = (
        random(*result.shape), x, weight, None, stride, padding, one, False, (0,) * axes, groups,
        (True, True, False),
    )  # fmt: skip
    expected = aten.convolution_backward.default(*arguments)
    for value, goal in zip(
        convolution_gradients.convolution_backward(*arguments), expected, strict=True
    ):
        assert_close(value, goal)


@given(
    axes=st.integers(1, 3),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 2),
    outputs=st.integers(1, 2),
    bias=st.booleans(),
    small=st.booleans(),
    is_frozen=st.booleans(),
    data=st.data(),
)
def test_transposed_convolution_backward(
    axes: int,
    groups: int,
    inputs: int,
    outputs: int,
    bias: bool,
    small: bool,
    is_frozen: bool,
    data: st.DataObject,
) -> None:
    def sizes(least: int, most: int) -> list[int]:
        return data.draw(st.lists(st.integers(least, most), min_size=axes, max_size=axes))

    kernel, stride, dilation, size = sizes(1, 3), sizes(1, 3), sizes(1, 3), sizes(2, 4)
    padding = [p % (k + 1) for p, k in zip(sizes(0, 2), kernel, strict=True)]
    # torch allows one below the stride or the dilation, whichever is larger.
    output_padding = [o % max(s, d) for o, s, d in zip(sizes(0, 2), stride, dilation, strict=True)]
    whole = [
        s * (n - 1) + d * (k - 1) + 1
        for s, n, d, k in zip(stride, size, dilation, kernel, strict=True)
    ]
    assume(all(w > 2 * p for w, p in zip(whole, padding, strict=True)))
    x = random(2, groups * inputs, *size)
    weight = random(groups * inputs, outputs, *kernel)
    window = (stride, padding, dilation, True, output_padding, groups)
    result = aten.convolution.default(x, weight, None, *window)
    arguments = (
        random(*result.shape),
        x,
        weight,
        [groups * outputs] if bias else None,
        *window,
        (True, True, bias),
    )
    expected = aten.convolution_backward.default(*arguments)
    with (
        mock.patch.object(convolution_gradients, "_SMALL_FEATURE_MAP", 256 if small else 0),
        mock.patch.object(convolution_gradients, "_SMALL_ROW", 64 if small else 0),
        frozen([weight] if is_frozen else []),
    ):
        found = convolution_gradients.convolution_backward(*arguments)
    for value, goal in zip(found, expected, strict=True):
        assert_close(value, goal)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False)])
def test_a_gradient_that_nobody_wants_is_not_computed(wanted: tuple[bool, bool, bool]) -> None:
    x, weight = random(2, 3, 6), random(4, 3, 3)
    grad = random(2, 4, 4)
    found = convolution_gradients.convolution_backward(
        grad, x, weight, None, (1,), (0,), (1,), False, (0,), 1, wanted
    )
    assert tuple(value is not None for value in found) == wanted
    expected = aten.convolution_backward.default(
        grad, x, weight, None, (1,), (0,), (1,), False, (0,), 1, wanted
    )
    for value, goal in zip(found, expected, strict=True):
        assert_close(value, goal)


@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    ceil_mode=st.booleans(),
    size=st.tuples(st.integers(6, 9), st.integers(6, 9)),
)
def test_max_pool_backward(
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    ceil_mode: bool,
    size: tuple[int, int],
) -> None:
    x = random(2, 3, *size)
    window: Any = (
        (kernel, kernel),
        (stride, stride),
        (min(padding, kernel // 2),) * 2,
        (dilation, dilation),
        ceil_mode,
    )
    result, indices = aten.max_pool2d_with_indices.default(x, *window)
    arguments = (random(*result.shape), x, *window, indices)
    expected = aten.max_pool2d_with_indices_backward.default(*arguments)
    assert_close(pooling.max_pool_with_indices_backward(*arguments), expected)


@given(
    channels=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padded=st.booleans(),
    ceil_mode=st.booleans(),
    count_include_pad=st.booleans(),
    divisor=st.sampled_from([None, 5]),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
)
def test_avg_pool_backward(
    channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padded: bool,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
    size: tuple[int, int],
) -> None:
    x = random(2, channels, *size)
    padding = tuple(k // 2 for k in kernel) if padded else (0, 0)
    window = (kernel, stride, padding, ceil_mode, count_include_pad, divisor)
    result = aten.avg_pool2d.default(x, *window)
    arguments = (random(*result.shape), x, *window)
    expected = aten.avg_pool2d_backward.default(*arguments)
    assert_close(pooling.avg_pool2d_backward(*arguments), expected)


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    padded=st.booleans(),
    divisor=st.sampled_from([None, 5]),
)
def test_an_average_over_volumes_and_its_gradient(
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    padded: bool,
    divisor: int | None,
) -> None:
    padding = tuple(k // 2 for k in kernel) if padded else (0, 0, 0)
    window = (kernel, stride, padding, False, True, divisor)
    assert_same_gradient(pooling.avg_pool3d, aten.avg_pool3d.default, random(2, 3, 5, 4, 6), window)


def assert_same_gradient(
    found: Callable[..., Tensor], expected: Callable[..., Tensor], x: Tensor, rest: Sequence[Any]
) -> None:
    """Compare the results of two functions, and the gradients of all that torch derives."""
    slopes = []
    for function in (found, expected):
        leaf = x.clone().requires_grad_()
        result = function(leaf, *rest)
        slopes.append((result, *torch.autograd.grad(result, leaf, random(*result.shape))))
    for value, goal in zip(*slopes, strict=True):
        assert_close(value, goal)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    bins=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_adaptive_max_pool_backward(size: tuple[int, int], bins: tuple[int, int]) -> None:
    x, grad = random(2, 3, *size), random(2, 3, *bins)
    _, indices = aten.adaptive_max_pool2d.default(x, bins)
    expected = aten.adaptive_max_pool2d_backward.default(grad, x, indices)
    assert_close(pooling.adaptive_max_pool2d_backward(grad, x, indices), expected)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    bins=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_adaptive_avg_pool_backward(size: tuple[int, int], bins: tuple[int, int]) -> None:
    x, grad = random(2, 3, *size), random(2, 3, *bins)
    expected = aten._adaptive_avg_pool2d_backward.default(grad, x)
    assert_close(pooling.adaptive_avg_pool2d_backward(grad, x), expected)


@settings(max_examples=15)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    bins=st.sampled_from([(1, 1), (2, 3)]),
    channels_last=st.booleans(),
)
def test_an_adaptive_pooling_is_one_function_wherever_its_channels_lie(
    size: tuple[int, int], bins: tuple[int, int], channels_last: bool
) -> None:
    """torch's own becomes writes by strides, which a graph of functions loses."""
    x = random(2, *size, 3).permute(0, 3, 1, 2) if channels_last else random(2, 3, *size)

    def slope(pool: Any, x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(pool(leaf, bins).square().sum(), leaf)
        return found

    pool = DIFFERENTIABLE[aten.adaptive_avg_pool2d.default]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, enable_python_dispatcher():
        trace = make_fx(lambda x: slope(pool, x), decomposition_table=table())(mode.from_tensor(x))
    called = {node.target for node in trace.graph.nodes if node.op == "call_function"}
    assert not [op for op in called if op._schema.is_mutable and op != aten.detach_.default]
    assert_close(slope(pool, x), slope(functional.adaptive_avg_pool2d, x))


@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    outputs=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    align_corners=st.booleans(),
)
def test_upsampling_backward(
    size: tuple[int, int], outputs: tuple[int, int], align_corners: bool
) -> None:
    grad, shape = random(2, 3, *outputs), [2, 3, *size]
    assert_close(
        resizing.upsample_bilinear2d_backward(grad, outputs, shape, align_corners),
        aten.upsample_bilinear2d_backward.default(grad, outputs, shape, align_corners),
    )
    assert_close(
        resizing.upsample_nearest2d_backward(grad, outputs, shape),
        aten.upsample_nearest2d_backward.default(grad, outputs, shape),
    )


@given(leading=st.lists(st.integers(1, 3), min_size=1, max_size=3), bias=st.booleans())
def test_linear(leading: list[int], bias: bool) -> None:
    x, weight = random(*leading, 4), random(5, 4)
    shift = random(5) if bias else None
    assert_close(matrices.linear(x, weight, shift), functional.linear(x, weight, shift))


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("axes", [None, [1], [0, -1]])
def test_vector_norm(axes: list[int] | None, keepdim: bool) -> None:
    x = random(3, 4, 5)
    x[:, :, 2] = 0.0  # a length of zero among them: its gradient is zero, and not 0/0
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = norms.vector_norm(leaf, 2, axes, keepdim)
    expected = torch.linalg.vector_norm(other, 2, axes, keepdim)
    assert_close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention(mask: str | None, scale: float | None) -> None:
    query, key, value = random(2, 3, 5, 4), random(2, 3, 6, 4), random(2, 3, 6, 7)
    given = None if mask is None else random(5, 6)
    if given is not None and mask == "bool":
        given = given > -1
    assert_close(
        attention.scaled_dot_product_attention(query, key, value, given, scale=scale),
        functional.scaled_dot_product_attention(query, key, value, given, scale=scale),
    )


@pytest.mark.parametrize("heads", [(3, 3), (3, 1)], ids=["of its own", "shared"])
@pytest.mark.parametrize("mask", [None, "given", "trained"])
def test_attention_backward(mask: str | None, heads: tuple[int, int]) -> None:
    inputs = [random(2, heads[0], 5, 4), random(2, heads[1], 6, 4), random(2, heads[1], 6, 7)]
    inputs += [] if mask is None else [random(5, 6)]
    for tensor in inputs:
        tensor.requires_grad_()
    given = None if mask is None else inputs[3] if mask == "trained" else inputs.pop().detach()
    query, key, value = inputs[:3]
    grad = random(2, 3, 5, 7)
    found, expected = (
        torch.autograd.grad(attend(query, key, value, given, scale=0.3), inputs, grad)
        for attend in (
            attention.scaled_dot_product_attention,
            functional.scaled_dot_product_attention,
        )
    )
    for gradient, reference in zip(found, expected, strict=True):
        assert_close(gradient, reference)


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=3), data=st.data())
def test_unbind(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = random(*shape).requires_grad_()
    parts, expected = slices.unbind(x, axis), torch.unbind(x, axis)
    for part, reference in zip(parts, expected, strict=True):
        assert_close(part, reference)
    # The first part is used by nobody.
    losses = [
        sum((part.sin().sum() for part in some[1:]), x.sum() * 0) for some in (parts, expected)
    ]
    assert_close(*(torch.autograd.grad(loss, x)[0] for loss in losses))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_with_frozen_statistics(affine: bool) -> None:
    x, mean, variance = random(2, 4, 3, 3), random(4), random(4).square()
    weight, bias = (random(4), random(4)) if affine else (None, None)
    assert_close(
        norms.batch_norm(x, weight, bias, mean, variance, False, 0.1, 1e-5, False),
        functional.batch_norm(x, mean, variance, weight, bias),
    )


@pytest.mark.parametrize("epsilon", [None, 1e-2])
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm(affine: bool, epsilon: float | None) -> None:
    x = random(2, 3, 4, 5)
    weight = random(4, 5) if affine else None
    assert_close(
        norms.rms_norm(x, [4, 5], weight, epsilon),
        functional.rms_norm(x, [4, 5], weight, epsilon),
    )


@given(
    channels=st.integers(2, 4),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
)
def test_a_trained_depthwise_convolution(
    channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    bias: bool,
) -> None:
    arguments = (
        random(2, channels, 6, 7),
        random(channels, 1, *kernel),
        random(channels) if bias else None,
        stride,
        padding,
        dilation,
        channels,
    )
    found = convolutions.conv2d(*arguments)
    assert found.grad_fn is None
    assert_close(found, functional.conv2d(*arguments))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_one_value_is_written_by_a_comparison(axis: int) -> None:
    x = random(2, 3, 4)
    most = x.max(axis, keepdim=True)
    source = random(*most.indices.shape)
    written = selections.scatter_src(x, axis, most.indices, source)
    assert_close(written, x.scatter(axis, most.indices, source))
    written = selections.scatter_value(x, axis, most.indices, 0.5)
    assert_close(written, x.scatter(axis, most.indices, 0.5))
    several = x.argsort(axis)
    assert selections.scatter_src(x, axis, several, x) is NotImplemented


@pytest.mark.parametrize("keepdim", [True, False])
def test_the_gradient_of_a_maximum_scatters_nothing(keepdim: bool) -> None:
    x = random(2, 3, 4)

    def slope(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(leaf.max(1, keepdim).values.square().sum(), leaf)
        return found

    trace = make_fx(slope, decomposition_table=table())(x)
    called = {node.target for node in trace.graph.nodes if node.op == "call_function"}
    assert not [op for op in called if "scatter" in str(op)]
    assert_close(trace(x), slope(x))


def assert_same_gradients(
    ours: Callable[..., Tensor], torchs: Callable[..., Tensor], *inputs: Tensor
) -> None:
    """Compare results, and gradients with respect to every input."""
    made = []
    for function in (ours, torchs):
        leaves = [value.detach().clone().requires_grad_() for value in inputs]
        result = function(*leaves)
        loss = (result * random(*result.shape)).sum()
        slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
        # torch's kernels give zeros where autograd gives none.
        made.append([result, *(torch.zeros(()) if s is None else s for s in slopes)])
    for found, expected in zip(*made, strict=True):
        assert_close(found.expand_as(expected).to(expected.dtype), expected)


@given(
    interpolation=st.integers(0, 2),
    outside=st.integers(0, 2),
    align_corners=st.booleans(),
    size=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    outputs=st.lists(st.integers(1, 4), min_size=3, max_size=3),
)
def test_grid_sampler(
    interpolation: int, outside: int, align_corners: bool, size: list[int], outputs: list[int]
) -> None:
    assume(interpolation < 2 or len(size) == 2)
    x = random(2, 3, *size)
    grid = 2 * random(2, *outputs[: len(size)], len(size))

    def ours(x: Tensor, grid: Tensor) -> Tensor:
        return grid_samples.grid_sampler(x, grid, interpolation, outside, align_corners)

    def torchs(x: Tensor, grid: Tensor) -> Tensor:
        return torch.grid_sampler(x, grid, interpolation, outside, align_corners)

    assert_same_gradients(ours, torchs, x, grid)


@pytest.mark.parametrize("outside", [0, 1, 2])
def test_a_grid_sampler_at_the_pixels_themselves_takes_the_same_side(outside: int) -> None:
    """An untrained spatial transformer is there: one side's slope, and none at the border."""
    matrix = torch.eye(2, 3, dtype=torch.float64)[None]
    grid = functional.affine_grid(matrix, [1, 3, 5, 9], align_corners=True)
    assert_same_gradients(
        lambda x, grid: grid_samples.grid_sampler(x, grid, 0, outside, True),
        lambda x, grid: torch.grid_sampler(x, grid, 0, outside, True),
        random(1, 3, 5, 9),
        grid,
    )


def test_a_grid_sampler_reads_nothing_but_the_map() -> None:
    grid = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30]).expand(2, 3, 4)[..., None]
    found = grid_samples.grid_sampler(
        torch.ones(2, 3, 4, 4), grid.expand(-1, -1, -1, 2), 0, 0, False
    )
    assert not found[..., 1:].nan_to_num().any()


@given(
    axis=st.integers(-3, 2),
    size=st.integers(1, 7),
    step=st.integers(1, 7),
    more=st.integers(0, 9),
)
def test_unfold_backward(axis: int, size: int, step: int, more: int) -> None:
    sizes = [2, 3, 4]
    sizes[axis] = size + more
    grad = random(*random(*sizes).unfold(axis, size, step).shape)
    assert_close(
        windows.unfold_backward(grad, sizes, axis, size, step),
        aten.unfold_backward.default(grad, sizes, axis, size, step),
    )


@given(
    axes=st.permutations([0, 1, -1]),
    offset=st.integers(-4, 4),
    sizes=st.lists(st.integers(1, 5), min_size=3, max_size=3),
)
def test_diagonal(axes: list[int], offset: int, sizes: list[int]) -> None:
    x, (first, second, _) = random(*sizes), axes
    assume(-sizes[first] < offset < sizes[second])
    assert_same_gradients(
        lambda x: slices.diagonal(x, offset, first, second),
        lambda x: x.diagonal(offset, first, second),
        x,
    )


def test_the_older_norm() -> None:
    assert_same_gradients(
        lambda x: norms.norm(x, None, [1], True),
        lambda x: x.norm(dim=1, keepdim=True),
        random(2, 3, 4),
    )


@given(
    mode=st.sampled_from(["bilinear", "bicubic"]),
    align_corners=st.booleans(),
    by_size=st.booleans(),
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    outputs=st.tuples(st.integers(2, 9), st.integers(2, 9)),
)
def test_antialiased_resizing(
    mode: str, align_corners: bool, by_size: bool, size: tuple[int, int], outputs: tuple[int, int]
) -> None:
    x = random(2, 3, *size)
    operator = getattr(aten, f"_upsample_{mode}2d_aa").vec
    given = (outputs, align_corners, None) if by_size else (None, align_corners, [0.75, 1.5])
    assert_same_gradients(
        lambda x: DIFFERENTIABLE[operator](x, *given), lambda x: operator(x, *given), x
    )


def test_maxima_of_volumes() -> None:
    x = random(2, 3, 4, 5, 6)
    result, indices = functional.max_pool3d(x, 2, 1, return_indices=True)
    grad, window = random(*result.shape), ([2] * 3, [1] * 3, [0] * 3, [1] * 3, False, indices)
    assert_close(
        pooling.max_pool_with_indices_backward(grad, x, *window),
        aten.max_pool3d_with_indices_backward.default(grad, x, *window),
    )
