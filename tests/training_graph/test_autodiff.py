"""Derived gradients against torch's autograd, in float64."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from functools import cache
from math import prod

import pytest
import torch
import zoo
from networks import AttentionNet, ConvNet, Kind, ResidualNet, captured, settled
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional

from pbc.errors import PbcError
from pbc.frontend import strategy
from pbc.ir.graph import (
    NAME,
    PARAMETER,
    get_tensor,
    graph_inputs,
    graph_outputs,
    origin,
    output_names,
    parameter_names,
    placeholders,
    tensor_names,
)
from pbc.ir.program import Program
from pbc.ir.rewrite import copy_graph, in_float64
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.targets.onnxruntime.convert import Converter
from pbc.testing import graph_of, make_program, retarget, run_passes
from pbc.training_graph.autodiff import Gradient, differentiate
from pbc.training_graph.names import LABELS, LOGITS, LOSS, LOSSES, SAVED, SMOOTHING

aten = torch.ops.aten


class MobileBlock(nn.Module):
    """Widen, depthwise, squeeze-excite, narrow; a residual connection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(width, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.squeeze = nn.Conv2d(hidden, 4, 1)
        self.excite = nn.Conv2d(4, hidden, 1)
        self.narrow = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.hardswish(self.norm1(self.widen(x)))
        y = functional.hardswish(self.norm2(self.depthwise(y)))
        share = torch.relu(self.squeeze(functional.adaptive_avg_pool2d(y, 1)))
        narrow: Tensor = self.narrow(y * functional.hardsigmoid(self.excite(share)))
        return x + narrow


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, 1, 1, groups=2)
        self.blocks = nn.Sequential(MobileBlock(8, 16), MobileBlock(8, 12))
        self.hidden = nn.Linear(8, 12)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.grouped(functional.hardswish(self.norm(self.stem(x)))))
        logits: Tensor = self.fc(functional.hardswish(self.hidden(x.mean((2, 3)))))
        return logits


class PyramidBlock(nn.Module):
    """A feature map beside smaller ones of itself, grown again in two ways."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.small = nn.Conv2d(width, 4, 3, padding=1)
        self.smaller = nn.Conv2d(width, 4, 1)
        self.mix = nn.Conv2d(width + 8, width, 3, padding=2, dilation=2)
        self.norm = nn.GroupNorm(2, width)

    def forward(self, x: Tensor) -> Tensor:
        small = self.small(functional.avg_pool2d(x, 2))
        smaller = self.smaller(functional.adaptive_avg_pool2d(x, (2, 4)))
        grown = functional.interpolate(small, scale_factor=2.0, mode="nearest")
        blurred = functional.interpolate(smaller, size=x.shape[2:], mode="bilinear")
        mixed = self.mix(torch.cat([x, grown, blurred], 1))
        y: Tensor = functional.gelu(self.norm(mixed))
        return x + y


class PyramidNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8)
        self.blocks = nn.Sequential(PyramidBlock(8), PyramidBlock(8))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.silu(self.norm(self.stem(x))), 3, 2, 1)
        logits: Tensor = self.fc(self.blocks(x).mean((2, 3)))
        return logits


class EncoderBlock(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 24)
        self.down = nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        down: Tensor = self.down(functional.gelu(self.up(self.norm2(x))))
        return x + down


class EncoderNet(nn.Module):
    """Patches behind a class token, as a vision transformer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.position = nn.Parameter(torch.zeros(1, 5, 16))
        self.layers = nn.Sequential(EncoderBlock(16), EncoderBlock(16))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        logits: Tensor = self.head(self.norm(self.layers(x))[:, 0])
        return logits


class ChannelsLastNet(nn.Module):
    """Norms over channels that lie last, as ConvNeXt has them, and lengths of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        y = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.scale * self.down(functional.gelu(self.up(self.norm(y))))
        x = self.pool(functional.normalize(x, dim=-1).permute(0, 3, 1, 2))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


class PoolingNet(nn.Module):
    """Poolings of cut windows, norms across channels, and a feature map that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.mix = nn.Conv2d(6, 6, 3, padding=1)
        self.grow = nn.ConvTranspose2d(6, 8, 3, 2, 1, 1)
        self.rows = nn.Conv1d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.avg_pool2d(self.stem(x), 3, 2, 1, ceil_mode=True)
        x = functional.local_response_norm(self.mix(x), 3)
        x = functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        x = functional.mish(functional.adaptive_max_pool2d(self.grow(x), (3, 5)))
        x = functional.max_pool1d(self.rows(x.flatten(2)), 3)
        logits: Tensor = self.fc(x.amax(2) + x.max(2)[0])
        return logits


# Every strategy and every operator on some network: deriving is what takes long here.
STRATEGIES: dict[Kind, tuple[str, ...]] = {
    ConvNet: ("linear-probe", "norm", "full"),
    ResidualNet: ("last-k:1", "adapters:2"),
    AttentionNet: ("bias", "norm"),
    MobileNet: ("bias", "full"),
    PyramidNet: ("full",),
    EncoderNet: ("full",),
    ChannelsLastNet: ("full",),
    PoolingNet: ("full",),
}
CASES = [(kind, text) for kind, texts in STRATEGIES.items() for text in texts]
every_case = pytest.mark.parametrize(
    ("kind", "text"), CASES, ids=[f"{kind.__name__}-{text}" for kind, text in CASES]
)


@cache
def split(kind: Kind, text: str) -> Program:
    """The network under a strategy; only adapters need a capture of their own."""
    chosen = strategy.parse(text)
    if isinstance(chosen, strategy.Adapters):
        return prepared(make_program(settled(kind()), text))
    module, program = captured(kind)
    return prepared(retarget(program, text, zoo.trained(chosen, module, program)))


def prepared(program: Program) -> Program:
    return run_passes(program, MarkTrainable(), SplitPrefix())


def head_axes(program: Program) -> dict[str, int]:
    return dict.fromkeys(program.network.head.parameters, 0)


@cache
def derived(kind: Kind, text: str) -> Gradient:
    """The gradient of a body whose class count the device decides."""
    program = split(kind, text)
    return differentiate(graph_of(program, "body/0"), head_axes(program))


# ---- values --------------------------------------------------------------------------------


def batch_of(program: Program, count: int, classes: int, smoothing: float) -> dict[str, Tensor]:
    """Everything that a step may read, by name, float64; no parameter is zero."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, *program.network.input.shape, generator=generator)
    with torch.no_grad():
        features = program.levels[0].features(images)
    values = {name: value.double() for name, value in features.items()}
    head = head_axes(program)
    for name in parameter_names(graph_of(program, "body/0")):
        value = program.parameters[name].detach()
        shape = (classes, *value.shape[1:]) if name in head else value.shape
        noise = 0.3 * torch.randn(shape, generator=generator)
        values[name] = (noise if name in head else value + noise).double()
    values[LABELS] = torch.randint(classes, (count,), generator=generator)
    values[SMOOTHING] = torch.tensor(smoothing, dtype=torch.float64)
    return values


def run(graph: GraphModule, values: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        results = graph(*[values[name] for name in graph_inputs(graph)])
    return dict(zip(graph_outputs(graph), results, strict=True))


def torch_step(body: GraphModule, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, losses, logits and the gradients that autograd finds, by name."""
    theta = {name: values[name].clone().requires_grad_() for name in parameter_names(body)}
    (logits,) = body(*[(values | theta)[name] for name in graph_inputs(body)])
    losses = functional.cross_entropy(
        logits, values[LABELS], reduction="none", label_smoothing=float(values[SMOOTHING])
    )
    losses.mean().backward()
    found = {name: value.grad for name, value in theta.items() if value.grad is not None}
    return {LOSS: losses.mean(), LOSSES: losses, LOGITS: logits, **found}


def assert_steps(
    program: Program, gradient: Gradient, batches: Iterable[tuple[int, int, float]]
) -> None:
    """Compare the two at each batch size, class count and label smoothing."""
    body = graph_of(program, "body/0")
    # torch's kernels of these compute with a sixth in float32, also in float64.
    rough = "hardswish" in body.code or "hardsigmoid" in body.code
    tolerance = 1e-6 if rough else 1e-9
    exact, forward, backward = map(in_float64, (body, gradient.forward, gradient.backward))
    for count, classes, smoothing in batches:
        values = batch_of(program, count, classes, smoothing)
        expected = torch_step(exact, values)
        found = run(forward, values)
        assert found[LOGITS].shape == (count, classes)
        found |= run(backward, values | found)
        assert {name for name in found if not name.startswith(SAVED)} == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == torch.float64
            assert found[name].shape == value.shape, name
            scale = max(1e-3, float(value.detach().abs().max()))
            error = float((found[name] - value.detach()).abs().max()) / scale
            assert error <= tolerance, f"{name}, batch {count}, {classes} classes: {error:.1e}"


@every_case
def test_losses_and_every_gradient_are_autograd_s(kind: Kind, text: str) -> None:
    program, gradient = split(kind, text), derived(kind, text)
    assert set(gradient.parameters) == set(parameter_names(graph_of(program, "body/0")))
    assert_steps(program, gradient, [(1, 7, 0.0), (2, 2, 0.1), (5, 7, 0.3)])


def test_a_closed_head_keeps_its_classes() -> None:
    program = split(ConvNet, "full")
    gradient = differentiate(graph_of(program, "body/0"))
    assert_steps(program, gradient, [(1, 10, 0.1), (2, 10, 0.0), (5, 10, 0.1)])
    (logits,) = (node for node in gradient.forward.graph.nodes if node.name == logits_of(gradient))
    assert isinstance(logits.meta["val"].shape[0], torch.SymInt)
    assert logits.meta["val"].shape[1] == 10


def logits_of(gradient: Gradient) -> str:
    return output_names(gradient.forward)[2]


def test_a_batch_of_ten_is_not_taken_for_ten_classes() -> None:
    """Sizes that happen to be equal while tracing stay apart."""
    program, gradient = split(ConvNet, "full"), derived(ConvNet, "full")
    assert_steps(program, gradient, [(10, 10, 0.1), (24, 16, 0.1), (7, 24, 0.1)])


# ---- what is saved, and what is not --------------------------------------------------------


def saved_nodes(gradient: Gradient) -> dict[str, Node]:
    names = graph_outputs(gradient.forward)
    nodes = gradient.forward.graph.output_node().args[0]
    assert isinstance(nodes, tuple)
    pairs = zip(names, nodes, strict=True)
    return {name: node for name, node in pairs if name.startswith(SAVED) and isinstance(node, Node)}


def values_per_sample(node: Node) -> int:
    """Values that one more image adds, at two classes."""
    sizes = [2 if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape]
    return prod(sizes)


def test_a_linear_probe_saves_next_to_nothing() -> None:
    gradient = derived(ConvNet, "linear-probe")
    for name, node in saved_nodes(gradient).items():
        assert values_per_sample(node) <= 4, name  # batch by classes
    # The features are given to both halves.
    assert "feature_0" in graph_inputs(gradient.forward)
    assert "feature_0" in graph_inputs(gradient.backward)


MADE_FOR_NOTHING = {
    aten.expand.default,
    aten.permute.default,
    aten.reshape.default,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.alias.default,
    aten.detach.default,
    aten.view.default,
}


@every_case
def test_nothing_is_saved_that_is_given_or_recomputed(kind: Kind, text: str) -> None:
    gradient = derived(kind, text)
    saved = saved_nodes(gradient)
    for name, node in saved.items():
        assert node.op == "call_function", name
        assert node.target not in MADE_FOR_NOTHING, name
        # Nothing that only depends on frozen tensors: engines work that out ahead of time.
        assert any(source.op == "placeholder" for source in sources(node)), name
    # All of it is read.
    read = graph_inputs(gradient.backward)
    assert set(saved) == {name for name in read if name.startswith(SAVED)}
    assert len(set(saved)) == len(saved)


def test_attention_keeps_no_weights_of_tokens_by_tokens() -> None:
    """And the gradients of query, key and value are put together, not added up."""
    gradient = derived(EncoderNet, "full")
    (tokens,) = {
        node.meta["val"].shape[-1]
        for node in gradient.forward.graph.nodes
        if node.target == aten._softmax.default
    }
    for name, node in saved_nodes(gradient).items():
        assert tuple(node.meta["val"].shape[-2:]) != (tokens, tokens), name
    targets = [node.target for node in gradient.backward.graph.nodes]
    assert aten._softmax.default in targets
    assert not {aten.select_scatter.default, aten.where.self} & set(
        targets[targets.index(aten._softmax.default) :]
    )


def sources(node: Node) -> Iterator[Node]:
    """Nodes that a node is made of, itself included."""
    waiting, seen = [node], {node}
    while waiting:
        found = waiting.pop()
        yield found
        for source in found.all_input_nodes:
            if source not in seen:
                seen.add(source)
                waiting.append(source)


@every_case
def test_the_forward_alone_holds_no_backward(kind: Kind, text: str) -> None:
    """A mini-batch that is not learnt from costs what inference and the losses do."""
    forward = derived(kind, text).forward
    results = forward.graph.output_node().args[0]
    assert isinstance(results, tuple)
    needed = {found for node in results[:3] if isinstance(node, Node) for found in sources(node)}
    extra = [node for node in forward.graph.nodes if node not in needed and node.op != "output"]
    # What only the backward reads is no work: views, and parts of results that are there anyway.
    work = [n for n in extra if n.op != "placeholder" and n.target is not operator.getitem]
    # Or it is one pass over a tensor that would be saved otherwise, and is larger.
    saved = set(saved_nodes(derived(kind, text)).values())
    for node in work:
        assert node in saved
        (source,) = node.all_input_nodes
        assert source in needed - saved
        assert node.meta["val"].dtype.itemsize < source.meta["val"].dtype.itemsize
    assert "backward" not in forward.code


def test_of_a_relu_before_frozen_weights_the_mask_is_saved() -> None:
    """One byte for each value instead of four (TinyTL, NeurIPS 2020, section 3.1, keeps a bit)."""
    dtypes = {
        source.target: node.meta["val"].dtype
        for node in saved_nodes(derived(ConvNet, "norm")).values()
        for source in node.all_input_nodes
        if source.target == aten.relu.default
    }
    assert dtypes == {aten.relu.default: torch.bool}


@every_case
def test_no_tensor_is_saved_for_its_size_alone(kind: Kind, text: str) -> None:
    gradient = derived(kind, text)
    for node in placeholders(gradient.backward):
        if node.meta.get(NAME, "").startswith(SAVED):
            readers = {user.target for user in node.users}
            assert not readers <= {aten.sym_size.int, aten.sym_numel.default}, node.name
    # Neither are the results, which are there anyway.
    nodes = gradient.forward.graph.output_node().args[0]
    assert isinstance(nodes, tuple)
    assert len(set(nodes)) == len(nodes)


def test_a_norm_scales_the_trained_kernel_before_it() -> None:
    """Results of a convolution are then read by what follows the norm alone."""
    forward = derived(MobileNet, "full").forward
    activations = [n for n in forward.graph.nodes if n.target == aten.hardswish.default]
    of_feature_maps = [n.args[0] for n in activations if n.meta["val"].dim() == 4]
    assert len(of_feature_maps) == 5
    # The depthwise ones are matrix products here, whose shift is an addition.
    shifts = [n for n in of_feature_maps if n.target != aten.convolution.default]
    assert [n.target for n in shifts] == [aten.add.Tensor] * 2
    assert not [n for shift in shifts for n in shift.all_input_nodes if n.target == aten.mul.Tensor]


def test_a_norm_behind_a_frozen_kernel_leaves_it_a_constant() -> None:
    forward = derived(ConvNet, "norm").forward
    kernels = [n.args[1] for n in forward.graph.nodes if n.target == aten.convolution.default]
    assert kernels
    assert all(kernel.op == "get_attr" for kernel in kernels)


def test_operators_repeat_a_mean_s_gradient_by_themselves() -> None:
    """No feature map is made of what is the same at all of its positions."""
    for node in derived(ConvNet, "full").backward.graph.nodes:
        if node.target == aten.expand.default and node.meta["val"].dim() == 4:
            readers = {user.target for user in node.users}
            assert not readers & {aten.add.Tensor, aten.mul.Tensor, aten.div.Scalar}, node.name


VIEWS = {
    aten.permute.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dims,
    aten.t.default,
    aten.transpose.int,
}


@pytest.mark.parametrize(
    ("kind", "text"), [case for case in CASES if case[0] in (AttentionNet, EncoderNet)]
)
def test_no_weight_is_copied_per_sample(kind: Kind, text: str) -> None:
    gradient = derived(kind, text)
    for graph in (gradient.forward, gradient.backward):
        for node in graph.graph.nodes:
            if node.target is not aten.expand.default:
                continue
            source = node.args[0]
            while source.target in VIEWS:
                source = source.args[0]
            weight = source.op == "get_attr" or PARAMETER in source.meta
            # A class token is one row, and every sample has to begin with it.
            assert not weight or source.meta["val"].numel() <= 16, node.format_node()


@pytest.mark.parametrize(
    ("kind", "text"), [(ResidualNet, "adapters:2"), (AttentionNet, "bias"), (MobileNet, "bias")]
)
def test_frozen_tensors_are_the_body_s_own(kind: Kind, text: str) -> None:
    body, gradient = graph_of(split(kind, text), "body/0"), derived(kind, text)
    frozen = set(tensor_names(body))
    assert frozen
    for graph in (gradient.forward, gradient.backward):
        shared = frozen & set(tensor_names(graph))
        assert all(get_tensor(graph, name) is get_tensor(body, name) for name in shared)
    # A constant that a decomposition makes is no weight of the model.
    assert frozen >= {n for n in tensor_names(gradient.forward) if "_tensor_constant" not in n}


def test_the_body_is_left_as_it_was() -> None:
    body = graph_of(split(MobileNet, "bias"), "body/0")
    before = copy_graph(body)
    differentiate(body, head_axes(split(MobileNet, "bias")))
    assert body.code == before.code
    metas = [sorted(node.meta) for node in placeholders(body)]
    assert metas == [sorted(node.meta) for node in placeholders(before)]


# ---- what has no gradient ------------------------------------------------------------------


class Gated(nn.Module):
    """The loss depends on the sign of `gate`, and on none of `unread` but its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.gate = nn.Parameter(torch.ones(8))
        self.unread = nn.Parameter(torch.ones(8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3)) * (self.gate > 0) + torch.zeros_like(self.unread)
        logits: Tensor = self.fc(x)
        return logits


def test_a_parameter_that_the_loss_does_not_depend_on_is_left_out() -> None:
    program = prepared(make_program(settled(Gated()), "full"))
    body = graph_of(program, "body/0")
    assert "gate" in parameter_names(body)
    gradient = differentiate(body, head_axes(program))
    assert set(gradient.parameters) == {"conv.weight", "conv.bias", "fc.weight", "fc.bias"}
    assert graph_outputs(gradient.backward) == list(gradient.parameters)
    # The gradients of the others are autograd's, which is None for this one.
    assert_steps(program, gradient, [(1, 4, 0.1), (3, 2, 0.1)])


class Wave(nn.Module):
    """torch knows no derivative of this by its first argument."""

    def forward(self, x: Tensor) -> Tensor:
        waves: Tensor = torch.special.zeta(x.square() + 2, 1.5)
        return waves


class Zeta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.wave = Wave()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.wave(self.conv(x).mean((2, 3))))
        return logits


class Causal(nn.Module):
    """Attention to what came before only."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        logits: Tensor = self.fc(x.mean(1))
        return logits


class Longest(nn.Module):
    """Lengths by the largest of all values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        logits: Tensor = self.fc(x / torch.linalg.vector_norm(x, 3, 1, keepdim=True))
        return logits


class Pool(nn.Module):
    """Means over volumes, for which channels are an axis."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.adaptive_avg_pool3d(x[:, None], 4)[:, 0]


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.pool = Pool()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool(self.conv(x)).mean((2, 3)))
        return logits


HERE = 'test_autodiff.py", line '
REFUSED = [
    (Zeta, rf"aten.special_zeta.other_scalar in wave \(.*{HERE}\d+\)", "the derivative for 'zeta'"),
    (
        Causal,
        rf"aten.scaled_dot_product_attention.default \(.*{HERE}\d+\)",
        "the gradient of causal or grouped attention",
    ),
]


@pytest.mark.parametrize(("kind", "operator", "reason"), REFUSED)
def test_an_operator_without_a_gradient_is_named(kind: Kind, operator: str, reason: str) -> None:
    program = split(kind, "full")
    with pytest.raises(
        PbcError,
        match=rf"^operator {operator} has no gradient that could be derived: {reason}.*; replace "
        r"it in the model, freeze everything before it, or add a decomposition to \S+$",
    ) as caught:
        differentiate(graph_of(program, "body/0"), head_axes(program))
    assert "\n" not in str(caught.value)


def test_what_torch_computes_by_writing_into_memory_is_refused() -> None:
    """A graph of functions would lose what was written."""
    program = split(Longest, "full")
    with pytest.raises(PbcError, match=r"aten.linalg_vector_norm.* apart into aten\.\w+_\b"):
        differentiate(graph_of(program, "body/0"), head_axes(program))


def test_an_operator_of_a_gradient_says_what_it_is_the_gradient_of() -> None:
    gradient = derived(MobileNet, "full")
    nodes = [n for n in gradient.backward.graph.nodes if n.target == aten.hardsigmoid.default]
    assert nodes
    for node in nodes:
        assert re.fullmatch(
            rf" in the gradient of (the model|blocks\.\d) \(.*{HERE}\d+\)", origin(node)
        )


def test_an_engine_that_lacks_an_operator_of_a_gradient_names_the_module() -> None:
    program = split(Pooled, "full")
    gradient = differentiate(graph_of(program, "body/0"), head_axes(program))
    with pytest.raises(
        PbcError,
        match=r"^operator aten._adaptive_avg_pool3d_backward.default in the gradient of pool "
        rf"\(.*{HERE}\d+\) is not supported by the onnxruntime engine; freeze everything before "
        r"it, replace it in the model, or compile with another --engine$",
    ):
        Converter()("update", gradient.backward)


@pytest.mark.parametrize("kind", [kind for kind, _, _ in REFUSED])
def test_it_may_stand_in_what_is_frozen(kind: Kind) -> None:
    program = split(kind, "linear-probe")
    gradient = differentiate(graph_of(program, "body/0"), head_axes(program))
    assert_steps(program, gradient, [(3, 4, 0.1)])
