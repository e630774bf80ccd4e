"""Layers that torch takes apart run on the PyTorch engine as they do in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from pbc.frontend.capture import capture
from pbc.ir.graph import get_tensor, op_name, tensor_names
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.runtime.engines.pytorch.graph import parse
from pbc.runtime.engines.pytorch.ops import OPS
from pbc.runtime.engines.pytorch.resolved_graph import ResolvedGraph
from pbc.targets.pytorch.lowering import graph_json
from pbc.testing import make_program

Maps = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Maps of 8 by 8; what each of some operators makes of them, its axes but two averaged; a head.

    Many operators share a net, since capturing one is what takes long.
    """

    def __init__(self, operators: Iterable[Maps]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.operators = list(operators)
        self.layers = nn.ModuleList([o for o in self.operators if isinstance(o, nn.Module)])
        self.fc = nn.Linear(8 * len(self.operators), 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.stem(x)
        made = [operator(maps) for operator in self.operators]
        logits: Tensor = self.fc(
            torch.cat([y.flatten(2).mean(2) if y.dim() > 2 else y for y in made], 1)
        )
        return logits


class Recurrent(nn.Module):
    """The last state over the rows as a sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.layer(x.mean(3).transpose(1, 2))
        last: Tensor = states[:, -1]
        return last


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        attended: Tensor = self.layer(tokens, tokens, tokens)[0]
        return attended.mean(1)


def warped(x: Tensor) -> Tensor:
    matrix = torch.tensor([[0.8, 0.1, 0.0], [-0.1, 0.9, 0.1]]).expand(x.shape[0], 2, 3)
    grid = functional.affine_grid(matrix, [x.shape[0], 8, 8, 8], align_corners=False)
    return functional.grid_sample(x, grid, align_corners=False)


def spectrum(x: Tensor) -> Tensor:
    magnitudes: Tensor = torch.fft.rfft2(x).abs()
    return magnitudes


LAYERS: dict[str, Maps] = {
    "gru": Recurrent(nn.GRU(8, 8, 2, batch_first=True)),
    "gru both ways": Recurrent(nn.GRU(8, 4, batch_first=True, bidirectional=True)),
    "lstm": Recurrent(nn.LSTM(8, 8, batch_first=True)),
    "rnn": Recurrent(nn.RNN(8, 8, batch_first=True)),
    "attention": Attention(),
    "encoder": nn.Sequential(
        nn.Flatten(2), nn.TransformerEncoderLayer(64, 4, 32, batch_first=True)
    ),
    "transposed convolution": nn.ConvTranspose2d(8, 8, 3, 2, 1, 1),
    "transposed depthwise": nn.ConvTranspose2d(8, 8, 2, 2, groups=8),
    "conv1d": nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 3)),
    "conv3d": lambda x: functional.conv3d(x[:, :, None], torch.ones(8, 8, 1, 3, 3)),
    "average pool, ceil": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "average pool, divisor": nn.AvgPool2d(3, divisor_override=5),
    "average pool in 1d": nn.Sequential(nn.Flatten(2), nn.AvgPool1d(3)),
    "average pool in 3d": lambda x: functional.avg_pool3d(x, (1, 2, 2)),
    "adaptive average pool": nn.AdaptiveAvgPool2d((3, 5)),
    "adaptive max pool": nn.AdaptiveMaxPool2d((3, 5)),
    "power pool": nn.LPPool2d(2, 3, 2),
    "max pool, dilated": nn.MaxPool2d(3, 2, 1, dilation=2),
    "topk": lambda x: x.flatten(2).topk(4, 2).values,
    "sort": lambda x: x.flatten(2).sort(2).values[:, :, 1:],
    "local response norm": nn.LocalResponseNorm(3),
    "instance norm": nn.InstanceNorm2d(8, affine=True),
    "group norm": nn.GroupNorm(2, 8),
    "rms norm": nn.RMSNorm(8),
    "unbind": lambda x: torch.stack([part * i for i, part in enumerate(x.unbind(1))], 1),
    "roll": lambda x: x * x.roll((1, 2), (2, 3)),
    "pixel shuffle": lambda x: nn.PixelShuffle(2)(x).repeat(1, 4, 1, 1),
    "pixel unshuffle": lambda x: nn.PixelUnshuffle(2)(x)[:, ::4],
    "channel shuffle": nn.ChannelShuffle(4),
    "grid sample": warped,
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
    "cumsum": lambda x: x.cumsum(2),
    "cumprod": lambda x: (x.sigmoid() + 0.5).cumprod(2),
    "logcumsumexp": lambda x: x.logcumsumexp(2),
    "bicubic": lambda x: functional.interpolate(x, scale_factor=1.5, mode="bicubic"),
    "bicubic, antialiased": lambda x: functional.interpolate(
        x, (5, 5), mode="bicubic", antialias=True
    ),
    "nearest": lambda x: functional.interpolate(x, (13, 13), mode="nearest"),
    "nearest, exact": lambda x: functional.interpolate(x, (13, 13), mode="nearest-exact"),
    "area": lambda x: functional.interpolate(x, (3, 3), mode="area"),
    "linear": lambda x: functional.interpolate(x.flatten(2), 31, mode="linear"),
    "unfold": lambda x: functional.unfold(x, 3, stride=2)[:, :8],
    "fold": lambda x: functional.fold(functional.unfold(x, 2, stride=2), (8, 8), 2, stride=2),
    "unfold of a tensor": lambda x: x.unfold(2, 4, 2),
    "cosine similarity": lambda x: x * functional.cosine_similarity(x, x.flip(1), 1)[:, None],
    "normalize": lambda x: functional.normalize(x, dim=1),
    "pairwise distances": lambda x: torch.cdist(x.flatten(2), x.flatten(2)),
    "standard deviation": lambda x: x.std((2, 3), keepdim=True) * x,
    "variance and mean": lambda x: torch.cat(torch.var_mean(x, (2, 3), keepdim=True), 1)[:, 4:12],
    "log-sum-exp": lambda x: x.logsumexp((2, 3)),
    "softmin": nn.Softmin(1),
    "gated linear unit": lambda x: functional.glu(torch.cat([x, x], 1), 1),
    "softsign": nn.Softsign(),
    "tanhshrink": nn.Tanhshrink(),
    "hardshrink": nn.Hardshrink(),
    "threshold": nn.Threshold(0.1, 0.0),
    "log sigmoid": nn.LogSigmoid(),
    "scatter": lambda x: x.scatter(1, torch.zeros(x.shape[0], 1, 8, 8, dtype=torch.int64), 0.5),
    "masked scatter by index": lambda x: x.index_fill(1, torch.tensor([0, 3]), 0.5),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "outer product": lambda x: torch.outer(torch.ones(8), torch.arange(8.0)) @ x.flatten(2),
    "batched trace": lambda x: x.diagonal(dim1=2, dim2=3),
    "sines": lambda x: x.tan().atan() + torch.atan2(x, x.square() + 1) + x.sinh().asinh(),
    "logarithms": lambda x: x.abs().log1p() + (x.abs() + 1).log2() + x.clamp(-3, 3).expm1(),
    "complex spectrum": spectrum,
    "tensordot": lambda x: torch.tensordot(x, torch.ones(8, 3), ([3], [0])),
    "baddbmm": lambda x: torch.baddbmm(
        x.flatten(2), x.flatten(2), torch.ones(1, 64, 64).expand(x.shape[0], -1, -1)
    ),
    "bilinear": lambda x: functional.bilinear(x, x.flip(3), torch.ones(8, 8, 8), torch.ones(8)),
    "median": lambda x: x.median(1, keepdim=True).values + x.median(2).values[:, :, None],
    "k-th value": lambda x: x.kthvalue(3, 3).values,
    "written over": lambda x: x.index_fill(1, torch.tensor([1]), 0.0).slice_scatter(
        torch.ops.aten.copy(x[:, :2], x[:, 2:3]), 1, 0, 2
    ),
    "max unpool": lambda x: functional.max_unpool2d(
        *functional.max_pool2d(x, 2, return_indices=True), [2, 2]
    ),
}
GROUPS = 6


@pytest.mark.parametrize("group", range(GROUPS))
def test_layers_run_as_in_pytorch(group: int) -> None:
    torch.manual_seed(0)
    net = Net(list(LAYERS.values())[group::GROUPS]).eval()
    program = make_program(net, passes=[MarkTrainable(), SplitPrefix()])
    x = torch.randn(4, 3, 16, 16)
    values: dict[str, Tensor] = {"x": x}
    for title, graph in reversed(list(program.graphs.items())):  # the prefix first
        tensors = {n: get_tensor(graph, n) for n in tensor_names(graph)}
        data = graph_json(graph, {n: f"file#{n}" for n in tensors})
        declared = parse(data, OPS, str(title))
        runs = ResolvedGraph(
            declared,
            lambda file, key, t=tensors: t[key],  # type: ignore[misc]
            str(title),
        )
        values |= runs.run(values, program.parameters)
    with torch.no_grad():
        torch.testing.assert_close(values["logits"], net(x), rtol=1e-4, atol=1e-5)


def test_the_allow_list_is_core_aten_and_larger_operators() -> None:
    core = set()
    for qualified in torch._C._dispatch_get_all_op_names():
        space, _, name = qualified.partition("::")
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if space == "aten" and operator is not None and torch.Tag.core in operator.tags:
            core.add(operator)
    assert len(core) > 180
    refused = {
        str(operator)
        for operator in core
        if operator._schema.is_mutable
        or torch.Tag.nondeterministic_seeded in operator.tags
        or str(operator).partition(".")[2].partition(".")[0].endswith("_backward")
    }
    # Memory as it lies there, and values that a graph has no arguments for.
    refused |= {
        "aten.as_strided.default",
        "aten.empty.memory_format",
        "aten.empty_strided.default",
        "aten.sym_is_contiguous.default",
        "aten.sym_storage_offset.default",
        "aten.sym_stride.int",
        "aten._local_scalar_dense.default",
    }
    assert {str(operator) for operator in core} - OPS == refused
    assert not refused & OPS


@pytest.mark.parametrize("op", sorted(op for op in OPS if op.startswith("aten.")))
def test_what_is_allowed_changes_nothing_and_is_not_random(op: str) -> None:
    _, packet, overload = op.split(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload)
    assert not operator._schema.is_mutable
    if torch.Tag.nondeterministic_seeded in operator.tags:
        # Captured where it drops nothing.
        names = {argument.name for argument in operator._schema.arguments}
        assert names & {"train", "dropout_p"}


def test_an_engine_with_fewer_operators_gets_those_that_it_has() -> None:
    torch.manual_seed(0)
    names = ("einsum", "pixel shuffle", "rms norm", "instance norm", "normalize", "channel shuffle")
    net = Net([LAYERS[name] for name in names]).eval()
    missing = {
        "aten.einsum.default",
        "aten.pixel_shuffle.default",
        "aten.rms_norm.default",
        "aten.instance_norm.default",
        "aten.linalg_vector_norm.default",
        "aten.channel_shuffle.default",
    }

    def operators(graph: GraphModule) -> set[str]:
        return {op_name(node) for node in graph.graph.nodes if node.op == "call_function"}

    assert missing <= operators(capture(net, (3, 16, 16)))
    graph = capture(net, (3, 16, 16), operators=OPS - missing)
    assert not missing & operators(graph)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(graph(x)[0], net(x), rtol=1e-4, atol=1e-5)
