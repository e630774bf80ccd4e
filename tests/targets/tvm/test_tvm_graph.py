"""Converted graphs in TVM compute what torch computes of the graphs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import ConvNet, pruned, settled
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pbc.errors import PbcError
from pbc.frontend.capture import capture
from pbc.ir.graph import get_tensor, graph_inputs, output_names
from pbc.runtime.engines.pytorch.ops import OPS
from pbc.runtime.engines.tvm.library import Graph as Runner
from pbc.runtime.engines.tvm.library import Library
from pbc.runtime.engines.tvm.library import loaded as executable_of
from pbc.targets.tvm.build import build, this_machine
from pbc.targets.tvm.convert import convert
from pbc.targets.tvm.operators import TABLE
from pbc.testing import graph_of

aten = torch.ops.aten


def tensors(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(len(shapes))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


INDICES = torch.tensor([[2, 0], [1, 1]])
MASK = torch.tensor([[True, False, True, True, False]])
FEATURES = tensors((2, 8, 8, 8))


class Whole:
    """An operator that tracing would take apart, with what it takes after its tensors."""

    def __init__(self, target: torch._ops.OpOverload, *rest: Any, **named: Any) -> None:
        self.target, self.rest, self.named = target, rest, named

    def __call__(self, *given: Tensor) -> Any:
        return self.target(*given, *self.rest, **self.named)

    def graph(self, given: tuple[Tensor, ...]) -> GraphModule:
        graph = Graph()
        nodes = [graph.placeholder(f"given_{number}") for number in range(len(given))]
        for node, value in zip(nodes, given, strict=True):
            node.meta["val"] = value
        called = graph.call_function(self.target, (*nodes, *self.rest), self.named)
        result = called.meta["val"] = self(*given)
        results = [called]
        if isinstance(result, tuple):
            results = [graph.call_function(getitem, (called, n)) for n in range(len(result))]
            for node, value in zip(results, result, strict=True):
                node.meta["val"] = value
        graph.output(tuple(results))
        return GraphModule(nn.Module(), graph)


Case = tuple[Callable[..., Any], tuple[Tensor, ...]]


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = aten.native_layer_norm(x, [6], scale, shift, 1e-5)
    return found


CASES: dict[str, Case] = {
    "add with alpha": (lambda x, y: aten.add.Tensor(x, y, alpha=2), tensors((3, 5), (5,))),
    "sub of numbers": (lambda x: aten.rsub.Scalar(x, 1.5) - 2, tensors((4,))),
    "mul of types": (lambda x: x * INDICES, tensors((2, 2))),
    "div of integers": (lambda x: INDICES / 3 + x, tensors((2, 2))),
    "exp and log": (lambda x: (x.exp() + 1).log(), tensors((3, 7))),
    "sqrt and rsqrt": (lambda x: x.abs().sqrt() + (x.square() + 1).rsqrt(), tensors((3, 7))),
    "erf": (lambda x: torch.erf(x * 3), tensors((5, 9))),
    "tanh": (lambda x: torch.tanh(x), tensors((5, 9))),
    "gelu": (lambda x: nn.functional.gelu(x * 3), tensors((5, 9))),
    "gelu by tanh": (lambda x: nn.functional.gelu(x * 3, approximate="tanh"), tensors((5, 9))),
    "silu": (lambda x: aten.silu(x), tensors((5, 9))),
    "sigmoid": (lambda x: torch.sigmoid(x * 4), tensors((5, 9))),
    "relu and relu6": (lambda x: aten.relu(x) + aten.hardtanh(x * 5, 0.0, 6.0), tensors((5, 9))),
    "hardswish": (lambda x: aten.hardswish(x * 4), tensors((5, 9))),
    "hardsigmoid": (lambda x: aten.hardsigmoid(x * 4), tensors((5, 9))),
    "leaky relu": (lambda x: aten.leaky_relu(x, 0.2), tensors((5, 9))),
    "elu": (lambda x: aten.elu(x, 0.5), tensors((5, 9))),
    "clamp": (lambda x: torch.clamp(x, -0.5, 0.3), tensors((5, 9))),
    "clamp on one side": (lambda x: torch.clamp(x, min=0.1), tensors((5, 9))),
    "pow": (lambda x: x.abs() ** 1.5 + x**2, tensors((5, 9))),
    "comparisons": (lambda x, y: ((x > y) & (x >= 0)) | (x == y), tensors((4, 5), (5,))),
    "not": (lambda x: ~(x < 0), tensors((4, 5))),
    "where": (lambda x: torch.where(MASK, x, 0.0), tensors((4, 5))),
    "to": (lambda x: (x > 0).to(torch.float32) + (x * 3).to(torch.int64), tensors((4, 5))),
    "full": (lambda x: x + torch.full((2, 3), 7.0) + torch.zeros(3), tensors((2, 3))),
    "arange": (lambda x: torch.arange(0, 3) + x, tensors((2, 3))),
    "reshape": (lambda x: x.reshape(2, -1).unsqueeze(1), tensors((4, 3, 2))),
    "permute": (lambda x: x.permute(2, 0, 1).transpose(0, 1), tensors((4, 3, 2))),
    "squeeze": (lambda x: x.squeeze(1) + x.squeeze(), tensors((4, 1, 3))),
    "expand": (lambda x: x.expand(2, -1, 5), tensors((3, 1))),
    "slice": (lambda x: x[:, 1:-1:2], tensors((3, 8))),
    "select": (lambda x: x[:, -1] + x.select(1, 2), tensors((3, 8))),
    "cat and stack": (lambda x, y: torch.cat([x, y], 1), tensors((3, 2), (3, 4))),
    "stack": (lambda x, y: torch.stack([x, y], -1), tensors((3, 4), (3, 4))),
    "split": (lambda x: torch.split(x, 3, 1)[2] + x[:, :2], tensors((3, 8))),
    "unbind": (lambda x: torch.unbind(x, 1)[1], tensors((3, 4, 2))),
    "flip": (lambda x: torch.flip(x, [0, -1]), tensors((3, 4, 2))),
    "roll": (lambda x: torch.roll(x, [1, -2], [0, 1]), tensors((3, 5))),
    "repeat": (lambda x: x.repeat(2, 1, 3), tensors((3, 2))),
    "pad": (lambda x: aten.constant_pad_nd(x, [1, 0, 0, 2], 0.5), tensors((2, 3, 4))),
    "negative pad": (lambda x: aten.constant_pad_nd(x, [-1, 1, 0, -1], 0.0), tensors((2, 3, 4))),
    "slice_scatter": (
        lambda x, y: aten.slice_scatter(x, y, 1, 1, 8, 3),
        tensors((3, 9), (3, 3)),
    ),
    "select_scatter": (lambda x, y: aten.select_scatter(x, y, 0, -1), tensors((3, 4), (4,))),
    "index": (lambda x: aten.index.Tensor(x, [None, INDICES]), tensors((2, 3, 4))),
    "embedding": (lambda x: aten.embedding(x, INDICES), tensors((3, 4))),
    "gather": (lambda x: torch.gather(x, 1, INDICES), tensors((2, 4))),
    "sum": (lambda x: x.sum([0, 2], True) + x.sum(), tensors((3, 4, 2))),
    "sum of truths": (lambda x: (x > 0).sum(1), tensors((3, 4))),
    "mean": (lambda x: x.mean([-1, -2]) + x.mean(), tensors((3, 4, 2))),
    "amax and amin": (lambda x: torch.amax(x, 1) - torch.amin(x, 1), tensors((3, 4))),
    "var": (lambda x: torch.var(x, 1, keepdim=True), tensors((3, 8))),
    "var_mean": (
        lambda x: torch.cat(torch.var_mean(x, [1], correction=0)),
        tensors((3, 8)),
    ),
    "cumsum": (lambda x: torch.cumsum(x, 1), tensors((3, 8, 2))),
    "matmul": (lambda x, y: torch.matmul(x, y), tensors((2, 3, 4), (4, 5))),
    "bmm": (lambda x, y: torch.bmm(x, y), tensors((2, 3, 4), (2, 4, 5))),
    "linear": (nn.functional.linear, tensors((2, 3, 4), (5, 4), (5,))),
    "addmm": (
        lambda b, x, y: torch.addmm(b, x, y, beta=0.5, alpha=2),
        tensors((5,), (2, 3), (3, 5)),
    ),
    "attention": (
        Whole(aten.scaled_dot_product_attention.default),
        tensors((2, 2, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)),
    ),
    "attention with a mask": (
        Whole(aten.scaled_dot_product_attention.default, scale=0.2),
        (*tensors((2, 2, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)), MASK.expand(5, 5).contiguous()),
    ),
    "convolution": (
        lambda x, w, b: aten.convolution(x, w, b, [2, 1], [1, 2], [1, 2], False, [0, 0], 1),
        tensors((2, 3, 9, 8), (4, 3, 3, 3), (4,)),
    ),
    "grouped convolution": (
        lambda x, w: aten.convolution(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 2),
        tensors((2, 4, 7, 7), (6, 2, 3, 3)),
    ),
    "depthwise convolution": (
        lambda x, w: aten.convolution(x, w, None, [2, 2], [2, 2], [1, 1], False, [0, 0], 4),
        tensors((2, 4, 7, 7), (4, 1, 5, 5)),
    ),
    "transposed convolution": (
        lambda x, w: aten.convolution(x, w, None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1),
        tensors((2, 4, 5, 6), (4, 3, 3, 3)),
    ),
    "grouped transposed convolution": (
        lambda x, w: aten.convolution(x, w, None, [2, 1], [1, 0], [1, 2], True, [0, 0], 2),
        tensors((2, 4, 5, 6), (4, 3, 3, 3)),
    ),
    "layer norm": (
        lambda *given: torch.cat([v.flatten() for v in layer_norm(*given)]),
        tensors((3, 4, 6), (6,), (6,)),
    ),
    "group norm": (
        lambda x, s, b: aten.native_group_norm(x, s, b, 2, 6, 20, 3, 1e-5)[0],
        tensors((2, 6, 4, 5), (6,), (6,)),
    ),
    "softmax": (lambda x: aten._softmax(x * 30, 1, False), tensors((3, 5, 2))),
    "log softmax": (lambda x: aten._log_softmax(x * 30, 1, False), tensors((3, 5))),
    "max pool": (
        lambda x: aten.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1])[0],
        tensors((2, 3, 8, 7)),
    ),
    "max pool with ceil_mode": (
        lambda x: aten.max_pool2d_with_indices(x, [2, 2], [2, 2], [0, 0], [1, 1], True)[0],
        tensors((2, 3, 7, 7)),
    ),
    "max pool, where": (
        lambda x: aten.max_pool2d_with_indices(x.relu(), [3, 2], [2, 1], [1, 0], [2, 1])[1],
        tensors((2, 3, 8, 7)),
    ),
    "max pool with ceil_mode, where": (
        lambda x: aten.max_pool2d_with_indices(x, [2, 2], [2, 2], [0, 0], [1, 1], True)[1],
        tensors((2, 3, 7, 7)),
    ),
    "scatter add": (
        lambda x, y: aten.scatter_add(x, 1, INDICES, y),
        tensors((2, 4), (2, 2)),
    ),
    "average pool": (
        lambda x: aten.avg_pool2d(x, [3, 2], [2, 2], [1, 0], False, True),
        tensors((2, 3, 8, 8)),
    ),
    "average pool that does not count its padding": (
        lambda x: aten.avg_pool2d(x, [3, 3], [2, 2], [1, 1], False, False),
        tensors((2, 3, 8, 8)),
    ),
    "adaptive average pool": (
        lambda x: aten._adaptive_avg_pool2d(x, [3, 2]),
        tensors((2, 3, 7, 6)),
    ),
    "bilinear, smaller": (
        Whole(aten.upsample_bilinear2d.vec, [5, 4], False, None),
        tensors((2, 3, 8, 8)),
    ),
    "bilinear, larger": (
        Whole(aten.upsample_bilinear2d.vec, None, True, [2.0, 2.0]),
        tensors((2, 3, 4, 5)),
    ),
    "nearest": (
        Whole(aten.upsample_nearest2d.vec, [7, 10], None),
        tensors((2, 3, 4, 5)),
    ),
    "convolution of rows": (
        Whole(aten.conv1d.default, None, [2], [1], [1], 2),
        tensors((2, 4, 9), (6, 2, 3)),
    ),
    "convolution of volumes": (
        Whole(aten.conv3d.default, None, [1, 2, 1], [1, 0, 1]),
        tensors((2, 3, 5, 6, 7), (4, 3, 2, 3, 3)),
    ),
    "transposed convolution of rows": (
        Whole(aten.conv_transpose1d.default, None, [2], [1], [1], 2, [2]),
        tensors((2, 4, 9), (4, 3, 3)),
    ),
    "transposed convolution, called so": (
        Whole(aten.conv_transpose2d.input, None, [2, 2], [1, 1], [1, 1]),
        tensors((2, 4, 5, 6), (4, 3, 3, 3)),
    ),
    "convolution with the same size": (
        Whole(aten.conv2d.padding, None, [1, 1], "same"),
        tensors((2, 3, 6, 6), (4, 3, 3, 3)),
    ),
    "average pool with ceil_mode and padding": (
        Whole(aten.avg_pool2d.default, [3, 3], [2, 2], [1, 1], True, True),
        tensors((2, 3, 8, 7)),
    ),
    "average pool with ceil_mode, padding not counted": (
        Whole(aten.avg_pool2d.default, [3, 3], [2, 2], [1, 1], True, False),
        tensors((2, 3, 8, 7)),
    ),
    "average pool with a divisor": (
        Whole(aten.avg_pool2d.default, [3, 2], [2, 2], [1, 1], False, True, 5),
        tensors((2, 3, 8, 8)),
    ),
    "average pool of rows": (Whole(aten.avg_pool1d.default, [3], [2], [1]), tensors((2, 3, 8))),
    "average pool of volumes": (
        Whole(aten.avg_pool3d.default, [3, 1, 2], [1, 1, 2], [1, 0, 0]),
        tensors((2, 3, 5, 4, 6)),
    ),
    "adaptive average pool of rows": (
        Whole(aten.adaptive_avg_pool1d.default, [5]),
        tensors((2, 3, 8)),
    ),
    "adaptive max pool": (Whole(aten.adaptive_max_pool2d.default, [3, 5]), tensors((2, 3, 8, 7))),
    "instance norm": (
        Whole(aten.instance_norm.default, None, None, None, None, True, 0.1, 1e-5, False),
        FEATURES,
    ),
    "rms norm": (Whole(aten.rms_norm.default, [8]), FEATURES),
    "prelu": (Whole(aten.prelu.default), tensors((2, 4, 5), (4,))),
    "celu": (Whole(aten.celu.default, 0.5), FEATURES),
    "selu": (Whole(aten.selu.default), FEATURES),
    "mish": (Whole(aten.mish.default), FEATURES),
    "log sigmoid": (Whole(aten.log_sigmoid.default), FEATURES),
    "log1p": (lambda x: (x.abs() * 1e-4).log1p() + torch.log1p(x.abs() * 1e9), FEATURES),
    "expm1": (lambda x: (x * 1e-4).expm1() + (x * 20).expm1(), FEATURES),
    "glu": (Whole(aten.glu.default, 1), FEATURES),
    "pixel shuffle": (Whole(aten.pixel_shuffle.default, 2), FEATURES),
    "pixel unshuffle": (Whole(aten.pixel_unshuffle.default, 2), FEATURES),
    "channel shuffle": (Whole(aten.channel_shuffle.default, 2), FEATURES),
    "im2col": (Whole(aten.im2col.default, [3, 3], [1, 1], [1, 1], [2, 2]), FEATURES),
    "windows": (Whole(aten.unfold.default, 2, 3, 2), FEATURES),
    "clamp by tensors": (Whole(aten.clamp.Tensor), tensors((2, 3), (2, 3), (3,))),
    "rsub": (Whole(aten.rsub.Tensor), tensors((2, 3), (3,))),
    "div, rounded down": (
        Whole(aten.div.Tensor_mode, rounding_mode="floor"),
        tensors((2, 3), (3,)),
    ),
    "div, cut off": (Whole(aten.div.Tensor_mode, rounding_mode="trunc"), tensors((2, 3), (3,))),
    "div by a number, rounded down": (
        Whole(aten.div.Scalar_mode, 0.3, rounding_mode="floor"),
        FEATURES,
    ),
    "floor_divide": (Whole(aten.floor_divide.default), tensors((2, 3), (3,))),
    "floor_divide of integers": (
        lambda x: x[0, 0, 0, 0] + torch.floor_divide(INDICES - 1, 2),
        FEATURES,
    ),
    "remainder": (Whole(aten.remainder.Scalar, 0.7), FEATURES),
    "power of a number": (lambda x: torch.pow(2.0, x), FEATURES),
    "addcmul": (Whole(aten.addcmul.default), tensors((2, 3), (3,), (2, 3))),
    "addcdiv": (Whole(aten.addcdiv.default), tensors((2, 3), (3,), (2, 3))),
    "lerp": (Whole(aten.lerp.Scalar, 0.3), tensors((2, 3), (2, 3))),
    "prod": (Whole(aten.prod.dim_int, 1), tensors((2, 3, 4))),
    "max and where": (lambda x: x.max(1)[0] + x.max(1)[1], FEATURES),
    "min and where": (lambda x: x.min(2, keepdim=True)[1] * x.min(2, keepdim=True)[0], FEATURES),
    "argmax": (Whole(aten.argmax.default, 1), FEATURES),
    "argmax of all": (Whole(aten.argmax.default), FEATURES),
    "var over axes": (Whole(aten.var.dim, [2, 3]), FEATURES),
    "std": (Whole(aten.std.correction, [2], correction=1), FEATURES),
    "norm": (Whole(aten.norm.ScalarOpt_dim, 2, [1]), FEATURES),
    "vector norm of order 3": (Whole(aten.linalg_vector_norm.default, 3, [1]), FEATURES),
    "tril": (Whole(aten.tril.default, 1), FEATURES),
    "triu": (Whole(aten.triu.default), FEATURES),
    "movedim": (Whole(aten.movedim.int, 1, -1), FEATURES),
    "swapaxes": (Whole(aten.swapaxes.default, 1, 3), FEATURES),
    "repeat_interleave": (Whole(aten.repeat_interleave.self_int, 3, 1), FEATURES),
    "tile": (Whole(aten.tile.default, [1, 2, 1, 1]), FEATURES),
    "unflatten": (Whole(aten.unflatten.int, 1, [2, 4]), FEATURES),
    "narrow": (Whole(aten.narrow.default, 1, 2, 4), FEATURES),
    "concat": (lambda x: torch.concat([x, x], 1), FEATURES),
    "two indices": (lambda x: x[:, [0, -1], [1, 2]], FEATURES),
    "two indices apart": (lambda x: x[:, [0, -1], :, [1, 2]], FEATURES),
    "indices that are broadcast": (
        lambda x: x[:, torch.tensor([[0], [-1]]), torch.tensor([1, 2, 3])],
        FEATURES,
    ),
    "index from the end": (lambda x: x[:, [0, -1]], FEATURES),
    "index_copy": (
        lambda x, v: aten.index_copy(x, 1, torch.tensor([2, 0]), v),
        tensors((3, 4, 5), (3, 2, 5)),
    ),
    "index_put that adds": (
        lambda x, v: aten.index_put(x, [None, torch.tensor([0, -1, 0])], v, True),
        tensors((2, 4, 5), (2, 3, 5)),
    ),
    "index_put of two indices": (
        lambda x, v: aten.index_put(
            x, [torch.tensor([[0], [1]]), None, torch.tensor([0, 1, 1])], v, True
        ),
        tensors((2, 4, 5), (2, 3, 4)),
    ),
    "index_put that replaces": (
        lambda x, v: aten.index_put(x, [torch.tensor([1, 0])], v, False),
        tensors((2, 4), (4,)),
    ),
    "reflected border": (Whole(aten.pad.default, [1, 2, 2, 1], "reflect"), FEATURES),
    "replicated border": (Whole(aten.pad.default, [1, 2, 2, 1], "replicate"), FEATURES),
    "replication pad": (Whole(aten.replication_pad2d.default, [1, 2, 2, 1]), FEATURES),
    "reflection pad": (Whole(aten.reflection_pad2d.default, [1, 2, 2, 1]), FEATURES),
    "nearest, called so": (Whole(aten.upsample_nearest2d.default, [5, 9]), FEATURES),
    "bilinear, called so": (Whole(aten.upsample_bilinear2d.default, [5, 9], False), FEATURES),
    "bicubic, called so": (Whole(aten.upsample_bicubic2d.default, [5, 9], True), FEATURES),
    "bicubic": (Whole(aten.upsample_bicubic2d.vec, [5, 9], False, None), FEATURES),
    "bilinear, antialiased": (Whole(aten._upsample_bilinear2d_aa.default, [5, 5], False), FEATURES),
    "bicubic, antialiased": (Whole(aten._upsample_bicubic2d_aa.default, [5, 5], False), FEATURES),
    "grid sampler": (
        Whole(aten.grid_sampler.default, 0, 0, False),
        tensors((2, 3, 6, 6), (2, 4, 5, 2)),
    ),
    "einsum": (lambda x: torch.einsum("bchw,bdhw->bcd", x, x), FEATURES),
    "linspace": (lambda x: x * torch.linspace(0, 1, 8), FEATURES),
    "eye": (lambda x: x @ torch.eye(8), FEATURES),
    "meshgrid": (
        lambda x: x * torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")[0],
        FEATURES,
    ),
    "new_full": (lambda x: x * x.new_full((8,), 2.0), FEATURES),
    "fill": (lambda x: aten.fill.Scalar(x, 2.0) + aten.fill.Tensor(x, x.sum()), FEATURES),
    "copy": (Whole(aten.copy.default), tensors((2, 3), (3,))),
    "type_as": (Whole(aten.type_as.default), tensors((2, 3), (3,))),
    "view_as": (Whole(aten.view_as.default), tensors((2, 3), (3, 2))),
    "expand_as": (Whole(aten.expand_as.default), tensors((1, 3), (3, 3))),
    "tensor_split": (lambda x: x.tensor_split(3, 1)[1], FEATURES),
    "batch norm without training": (
        lambda x, w, b: aten._native_batch_norm_legit_no_training(x, w, b, b, w.abs(), 0.1, 1e-5)[
            0
        ],
        tensors((2, 3, 4, 4), (3,), (3,)),
    ),
    "batch norm by its own statistics": (
        lambda x, w, b: torch.cat(
            [y.flatten() for y in aten._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-5)]
        ),
        tensors((2, 3, 4, 4), (3,), (3,)),
    ),
    "weight standardisation": (
        lambda x: aten._native_batch_norm_legit.no_stats(x, None, None, True, 0.0, 1e-5)[0],
        tensors((1, 3, 8)),
    ),
    "sines and tangents": (
        lambda x: torch.cat([x.tan(), x.atan(), torch.atan2(x, x.flip(1)), torch.atan2(-x, x)]),
        FEATURES,
    ),
    "inverse sines": (
        lambda x: x.tanh().mul(0.9).asin() + x.tanh().mul(0.9).acos() + x.tanh().mul(0.9).atanh(),
        FEATURES,
    ),
    "hyperbolic sines": (
        lambda x: x.sinh() + x.cosh() + x.asinh() + (x.abs() + 1.1).acosh(),
        FEATURES,
    ),
    "logarithms to other bases": (lambda x: x.abs().log2() + x.abs().log10(), FEATURES),
    "trunc": (Whole(aten.trunc.default), FEATURES),
    "fmod": (Whole(aten.fmod.Scalar, 0.7), FEATURES),
    "fmod of tensors": (Whole(aten.fmod.Tensor), tensors((2, 3), (3,))),
    "isnan and isinf": (
        lambda x: (x.log().isnan() | (x.relu().log()).isinf()) * x,
        FEATURES,
    ),
    "either of two": (
        lambda x: torch.logical_xor(x > 0, x > 1) * x + ((x > 0) ^ (x < 1)) * x,
        FEATURES,
    ),
    "any": (
        lambda x: x * (x > 2).any() + (x > 1).any(1, keepdim=True) + x.relu().any((2, 3), True),
        FEATURES,
    ),
    "argmin": (Whole(aten.argmin.default, 1), FEATURES),
    "prod of all": (Whole(aten.prod.default), tensors((2, 3))),
    "local response norm": (lambda x: torch.nn.functional.local_response_norm(x, 5), FEATURES),
    "logsumexp": (Whole(aten.logsumexp.default, [1]), FEATURES),
}


def traced(function: Callable[..., Any], given: tuple[Tensor, ...]) -> GraphModule:
    """The function as a graph of the operators that it calls."""
    if isinstance(function, Whole):
        return function.graph(given)
    trace = make_fx(
        lambda *args: (function(*args),), tracing_mode="fake", _allow_non_fake_inputs=True
    )
    graph = trace(*given)
    assert isinstance(graph, GraphModule)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


@cache
def cases() -> tuple[dict[str, GraphModule], dict[str, Runner]]:
    """The graphs of all cases, and one library of them."""
    graphs = {f"case_{n}": traced(*case) for n, case in enumerate(CASES.values())}
    return graphs, loaded(graphs)


def loaded(graphs: dict[str, GraphModule], **options: Any) -> dict[str, Runner]:
    module, reads = convert(graphs, **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        path.write_bytes(build(module, this_machine()))
        library = Library(executable_of(path))

    def arrays(graph: GraphModule, names: tuple[str, ...]) -> list[np.ndarray]:
        return [get_tensor(graph, name).detach().numpy() for name in names]

    return {
        name: library.graph(
            name,
            graph_inputs(graph),
            output_names(graph),
            arrays(graph, reads[name].tensors),
            arrays(graph, reads[name].setup),
        )
        for name, graph in graphs.items()
    }


def run(graph: GraphModule, runner: Runner, given: tuple[Tensor, ...]) -> None:
    """Compare what both make of the inputs."""
    with torch.no_grad():
        expected = graph(*given)
    values = {n: value.detach().numpy() for n, value in zip(runner.inputs, given, strict=True)}
    for found, value in zip(runner.run(values).values(), expected, strict=True):
        array = found.numpy()
        assert array.dtype == value.detach().numpy().dtype
        np.testing.assert_allclose(array, value.detach().numpy(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", list(CASES))
def test_an_operator(name: str) -> None:
    graphs, runners = cases()
    at = f"case_{list(CASES).index(name)}"
    run(graphs[at], runners[at], CASES[name][1])


# Capture takes these apart where torch can; what is left of them is refused by name.
LACKING = {
    "aten._adaptive_avg_pool3d.default",
    "aten._cdist_forward.default",
    "aten._embedding_bag.default",
    "aten._fft_c2c.default",
    "aten._fft_c2r.default",
    "aten.view_as_complex.default",
    "aten.view_as_real.default",
    "aten._fft_r2c.default",
    "aten._pdist_forward.default",
    "aten.bitwise_and.Scalar",
    "aten.bitwise_or.Scalar",
    "aten.bitwise_xor.Scalar",
    "aten.col2im.default",
    "aten.cumprod.default",
    "aten.diagonal.default",
    "aten.grid_sampler_2d.default",
    "aten.logcumsumexp.default",
    "aten.masked_scatter.default",
    "aten.max_pool3d_with_indices.default",
    "aten.nonzero.default",
    "aten.reflection_pad1d.default",
    "aten.reflection_pad3d.default",
    "aten.replication_pad3d.default",
    "aten.scatter.src",
    "aten.scatter.value",
    "aten.scatter_reduce.two",
    "aten.sort.default",
    "aten.topk.default",
}


def test_every_operator_of_the_pytorch_engine_is_converted_or_known_to_lack() -> None:
    """By the table; as a case here that torch takes apart; or torch always takes it apart."""
    tried = {
        node.target
        for graph in cases()[0].values()
        for node in graph.graph.nodes
        if node.op == "call_function"
    }
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    left = set()
    for name in OPS:
        module, packet, overload = ("", *name.split("."))[-3:]
        if module != "aten":
            continue  # arithmetic of sizes
        target = getattr(getattr(aten, packet), overload)
        if not (
            target in TABLE or target in tried or target.has_kernel_for_dispatch_key(composite)
        ):
            left.add(name)
    assert left == LACKING


@pytest.mark.parametrize("name", ["concat", "einsum", "split", "tensor_split", "meshgrid"])
def test_an_operator_of_lists_is_taken_apart(name: str) -> None:
    calls: dict[str, tuple[Any, Callable[[Any], tuple[Any, ...]]]] = {
        "concat": (aten.concat.default, lambda x: ([x, x], 1)),
        "einsum": (aten.einsum.default, lambda x: ("bchw,bdhw->bcd", [x, x])),
        "split": (aten.split.sizes, lambda x: (x, [3, 5], 1)),
        "tensor_split": (aten.tensor_split.sections, lambda x: (x, 3, 1)),
        "meshgrid": (aten.meshgrid.indexing, lambda x: ([x, x],)),
    }
    target, arguments = calls[name]
    (value,) = FEATURES
    value = value[0, 0, 0] if name == "meshgrid" else value
    named: dict[str, Any] = {"indexing": "ij"} if name == "meshgrid" else {}
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = value
    called = graph.call_function(target, arguments(x), named)
    called.meta["val"] = result = target(*arguments(value), **named)
    if not isinstance(result, Tensor):
        called = graph.call_function(getitem, (called, 1))
        called.meta["val"] = result[1]
    graph.output((called,))
    module = GraphModule(nn.Module(), graph)
    (runner,) = loaded({"net": module}).values()
    run(module, runner, (value,))


class Shapes(nn.Module):
    """Does with the batch axis what networks do with it."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.scale = nn.Parameter(torch.rand(4))
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        rows = x.reshape(count, 5, 6)
        rows = torch.cat([self.token.expand(count, -1, -1), rows], 1)
        mixed = rows.reshape(count * 2, 3, 6).transpose(1, 2).reshape(count, 6, 6)
        values = self.linear(mixed[:, 1:]) * torch.rsqrt(self.scale + 1.0)
        first: Tensor = values.flip(1)[:, 0] + values.mean(1)
        return first


def test_any_batch() -> None:
    graph = capture(Shapes(), (5, 2, 3))
    (runner,) = loaded({"net": graph}).values()
    for count in (1, 2, 5, 16):
        run(graph, runner, tensors((count, 5, 2, 3)))


class Pool(nn.Module):
    """The gradient of a max pool: windows overlap, and zeros are as large."""

    def forward(self, x: Tensor, grad: Tensor) -> Tensor:
        x = x.relu()
        _, places = aten.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1])
        count, channels, height, width = x.shape
        zeros = torch.zeros(count, channels, height * width)
        flat = places.reshape(count, channels, -1)
        spread = aten.scatter_add(zeros, 2, flat, grad.reshape(count, channels, -1))
        sent: Tensor = spread.reshape(x.shape)
        return sent


def test_the_gradient_of_a_max_pool() -> None:
    pool = nn.MaxPool2d(3, 2, 1)
    graphs = {}
    for count in (2, 5):
        x, grad = tensors((count, 3, 8, 7), (count, 3, 4, 4))
        graphs[f"of_{count}"] = traced(Pool(), (x, grad))
    runners = loaded(graphs)
    for count in (2, 5):
        x, grad = tensors((count, 3, 8, 7), (count, 3, 4, 4))
        x = x.relu().requires_grad_()
        (expected,) = torch.autograd.grad(pool(x), x, grad)
        runner = runners[f"of_{count}"]
        values = dict(zip(runner.inputs, (x.detach().numpy(), grad.numpy()), strict=True))
        (found,) = runner.run(values).values()
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5, atol=2e-6)


def test_what_frozen_tensors_alone_decide_is_computed_once() -> None:
    graph = capture(Shapes(), (5, 2, 3))
    module, reads = convert({"net": graph})
    names = {variable.name_hint for variable in module.get_global_vars()}
    assert {"net", "net_setup"} <= names
    assert reads["net"].setup == ("scale",)
    assert set(reads["net"].tensors) == {"token", "linear.weight", "linear.bias"}


def test_an_open_head_takes_any_number_of_classes() -> None:
    program = pruned(ConvNet)
    graph = graph_of(program, "body/0")
    head = list(program.network.head.parameters)
    (runner,) = loaded({"body": graph}, head=head, open_head=True).values()
    width = program.network.head.parameters[head[0]]
    features = torch.rand(3, width)
    for classes in (2, 7):
        weight, bias = tensors((classes, width), (classes,))
        run(graph, runner, (features, weight, bias))


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.logcumsumexp(x, 1)


def test_an_operator_without_a_conversion_is_named() -> None:
    graph = capture(settled(nn.Sequential(Unknown(), nn.Flatten())), (1, 2, 2))
    name = r"aten\.logcumsumexp\.default"
    words = rf"operator {name} in 0 .*is not supported by the tvm engine; replace it"
    with pytest.raises(PbcError, match=words):
        convert({"net": graph})


class Causal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_a_variant_without_a_conversion_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PbcError, match="not with dropout, is_causal or enable_gqa: replace it"):
        convert({"net": capture(Causal(), (1, 4, 4))})
    assert capfd.readouterr().err == ""
