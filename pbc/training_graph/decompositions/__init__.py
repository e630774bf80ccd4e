"""Gradients in terms of operators that inference engines have, where torch has no such.

Each function has the signature of the operator that it stands for, and computes what that does; it
is in the file of its family and in one of two tables here. `table()` replaces operators of a traced
gradient; `DIFFERENTIABLE` replaces operators of the body before they are differentiated, where the
gradient of their parts is better than what parts of the gradient could be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import core_aten_decompositions

from pbc.ir import borders
from pbc.training_graph.decompositions.activations import (
    gelu_backward,
    hardsigmoid_backward,
    hardswish_backward,
    threshold_backward,
)
from pbc.training_graph.decompositions.attention import scaled_dot_product_attention
from pbc.training_graph.decompositions.convolution_gradients import convolution_backward
from pbc.training_graph.decompositions.convolutions import conv2d
from pbc.training_graph.decompositions.grid_samples import grid_sampler
from pbc.training_graph.decompositions.matrices import linear
from pbc.training_graph.decompositions.norms import batch_norm, norm, rms_norm, vector_norm
from pbc.training_graph.decompositions.pooling import (
    adaptive_avg_pool2d,
    adaptive_avg_pool2d_backward,
    adaptive_max_pool2d_backward,
    avg_pool2d_backward,
    avg_pool3d,
    max_pool_with_indices_backward,
)
from pbc.training_graph.decompositions.resizing import (
    upsample_bicubic2d_aa,
    upsample_bilinear2d_aa,
    upsample_bilinear2d_backward,
    upsample_nearest2d_backward,
)
from pbc.training_graph.decompositions.selected_channels import index_copy
from pbc.training_graph.decompositions.selections import scatter_src, scatter_value
from pbc.training_graph.decompositions.slices import diagonal
from pbc.training_graph.decompositions.sums import index_add
from pbc.training_graph.decompositions.windows import unfold_backward

aten = torch.ops.aten

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
"""Forward operators that every engine has as one: taking them apart costs time and precision."""

_BACKWARD: dict[Any, Callable[..., Any]] = {
    aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool2d_backward,
    aten.adaptive_max_pool2d_backward.default: adaptive_max_pool2d_backward,
    aten.avg_pool2d_backward.default: avg_pool2d_backward,
    aten.convolution_backward.default: convolution_backward,
    aten.gelu_backward.default: gelu_backward,
    aten.hardsigmoid_backward.default: hardsigmoid_backward,
    aten.hardswish_backward.default: hardswish_backward,
    aten.index_add.default: index_add,
    aten.index_copy.default: index_copy,
    aten.max_pool2d_with_indices_backward.default: max_pool_with_indices_backward,
    aten.max_pool3d_with_indices_backward.default: max_pool_with_indices_backward,
    aten.scatter.src: scatter_src,
    aten.scatter.value: scatter_value,
    aten.threshold_backward.default: threshold_backward,
    aten.unfold_backward.default: unfold_backward,
    aten.upsample_bilinear2d_backward.default: upsample_bilinear2d_backward,
    aten.upsample_nearest2d_backward.default: upsample_nearest2d_backward,
}

DIFFERENTIABLE: dict[Any, Callable[..., Any]] = {
    **borders.TABLE,
    aten._upsample_bicubic2d_aa.default: upsample_bicubic2d_aa,
    aten._upsample_bicubic2d_aa.vec: upsample_bicubic2d_aa,
    aten._upsample_bilinear2d_aa.default: upsample_bilinear2d_aa,
    aten._upsample_bilinear2d_aa.vec: upsample_bilinear2d_aa,
    aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d,
    aten.avg_pool3d.default: avg_pool3d,
    aten.batch_norm.default: batch_norm,
    aten.conv2d.default: conv2d,
    aten.diagonal.default: diagonal,
    aten.grid_sampler.default: grid_sampler,
    aten.grid_sampler_2d.default: grid_sampler,
    aten.linalg_vector_norm.default: vector_norm,
    aten.linear.default: linear,
    aten.norm.ScalarOpt_dim: norm,
    aten.rms_norm.default: rms_norm,
    aten.scaled_dot_product_attention.default: scaled_dot_product_attention,
}
"""Taken apart before they are differentiated, by the body's operator."""


@functools.cache
def table() -> dict[Any, Callable[..., Any]]:
    """Return torch's decompositions without those of `WHOLE`, and with ours."""
    known: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    for op in WHOLE:
        known.pop(op, None)
    return {**known, **_BACKWARD}
