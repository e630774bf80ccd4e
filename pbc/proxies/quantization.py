"""Quantisation to eight bits: which tensors, in which ranges, and the graphs that compute so.

A quantised graph holds int8 weights and says at which tensors a value is rounded to eight bits
(quantize, then dequantize); an engine that multiplies integers fuses the pairs into its integer
kernels. Scheme, chosen for ONNX Runtime's CPU kernels:

- Weights: int8, symmetric, one scale for each output channel, and of seven bits only. x86 without
  VNNI adds products of uint8 and int8 in pairs, in 16 bits: 2 * 255 * 64 fits, 2 * 255 * 127
  saturates, silently. ONNX Runtime's way out (`session.x64quantprecision`) made a processor that
  has VNNI 2.5 times slower; the bit costs less than 0.001 of fidelity (docs/alignment.md).
- Activations: uint8 with a zero point, one scale for each tensor. Zero is always exact, since
  padding writes zeros; after a ReLU the zero point is 0, so that clamping is part of rounding.
- Biases and sums stay as they are: the engine adds them in int32 and float32.

uint8 times int8 is what x86 and ARM (dot products) multiply fastest, and what the CPU fuses best.

Only convolutions and products with a frozen weight become integer, where they run at more than one
position (squeeze-excite and layers behind the pool cost little); sums, concatenations and pools
between two such layers follow, everything else (attention, layer norms, sigmoids, squeeze-excite)
stays in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pbc.ir.graph import get_tensor, op_name, put_tensor, shape_of
from pbc.ir.rewrite import copy_graph, drop_unused, fused, replace_tensor
from pbc.ir.slice_graph import refresh_shapes

LOWEST, HIGHEST = 0, 255  # uint8
WEIGHT_HIGHEST = 64  # of int8: see above
BINS = 8192
# Of the range between the extremes, the shares that are tried.
SHARES = tuple(0.88**step for step in range(28))

_FAKE = torch.ops.aten.fake_quantize_per_tensor_affine.default
_FAKE_WEIGHT = torch.ops.aten.fake_quantize_per_channel_affine.default
_QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
_DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
_DEQUANTIZE_WEIGHT = torch.ops.quantized_decomposed.dequantize_per_channel.default


class _Layer(NamedTuple):
    """Positions of an operator's input, weight and bias; the axis of the weight's outputs."""

    input: int
    weight: int
    bias: int | None
    axis: int
    channels: int  # the axis of the output's channels, from the end


_LAYERS = {
    "aten.conv2d.default": _Layer(0, 1, 2, 0, -3),
    "aten.linear.default": _Layer(0, 1, 2, 0, -1),
    "aten.addmm.default": _Layer(1, 2, 0, 1, -1),
    "aten.matmul.default": _Layer(0, 1, None, 1, -1),
    "aten.mm.default": _Layer(0, 1, None, 1, -1),
}
# Clamping that rounding does too, once the range says so.
_CLAMPS = {
    "aten.relu.default",
    "aten.relu_.default",
    "aten.hardtanh.default",
    "aten.hardtanh_.default",
    "aten.relu6.default",
    "aten.clamp.default",
    "aten.clamp_min.default",
}
_SUMS = {"aten.add.Tensor", "aten.add_.Tensor", "aten.cat.default", "aten.avg_pool2d.default"}
# These only choose or move values: the range stays.
_MOVES = {
    "aten.max_pool2d.default",
    "aten.reshape.default",
    "aten.view.default",
    "aten.flatten.using_ints",
    "aten.permute.default",
    "aten.transpose.int",
}


@dataclass(frozen=True)
class Range:
    """A map of a tensor's real numbers to 0…255: value = scale * (integer - zero_point)."""

    scale: float
    zero_point: int

    @staticmethod
    def spanning(low: float, high: float) -> Range:
        """The finest range that holds both ends and zero, which is exact."""
        low, high = min(low, 0.0), max(high, 0.0)
        # float32 is what kernels compute in: a scale must not vanish there.
        scale = max((high - low) / (HIGHEST - LOWEST), 1e-12)
        return Range(scale, min(max(round(-low / scale), LOWEST), HIGHEST))

    @property
    def low(self) -> float:
        return self.scale * (LOWEST - self.zero_point)

    @property
    def high(self) -> float:
        return self.scale * (HIGHEST - self.zero_point)


@dataclass(frozen=True)
class Scheme:
    """The parts of a graph that become integer, by the names of its nodes.

    layers: those whose weights are stored in eight bits.
    points: those whose values are rounded to eight bits; each by the node whose range it has, which
        is its own but for operators that only move values.
    """

    layers: tuple[str, ...]
    points: dict[str, str]


def scheme(graph: GraphModule) -> Scheme:
    """Choose what to quantise in a folded graph.

    Layers that run at a single position (squeeze-excite) are left alone.
    """
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    layers = [node for node in nodes if _is_layer(node)]
    points: dict[Node, Node] = {}
    inputs = {_input(layer) for layer in layers}
    wanted = _wanted(nodes, inputs)
    for node in graph.graph.nodes:
        name = op_name(node)
        if node in layers and (name == "aten.conv2d.default" or _clamped(node) in wanted):
            # A convolution is integer only if its output is; a product is not so particular.
            points[_clamped(node)] = _clamped(node)
        elif name in _MOVES and node in wanted and _first(node) in points:
            points[node] = points[_first(node)]
        elif name in _SUMS and _clamped(node) in wanted and _plain_sum(node):
            if all(source in points for source in _tensors(node)):
                points[_clamped(node)] = _clamped(node)
        elif node in inputs:
            points.setdefault(node, node)
    return Scheme(
        tuple(node.name for node in layers),
        {node.name: source.name for node, source in points.items()},
    )


def _is_layer(node: Node) -> bool:
    """Whether the node multiplies what varies by a frozen weight, at more than one position."""
    kind = _LAYERS.get(op_name(node))
    if kind is None or len(node.args) <= kind.weight:
        return False
    source, weight = node.args[kind.input], node.args[kind.weight]
    if not isinstance(source, Node) or not isinstance(weight, Node):
        return False
    if weight.op != "get_attr" or source.op == "get_attr":
        return False
    shape = shape_of(node)
    if op_name(node) == "aten.conv2d.default":
        return math.prod(shape[2:]) > 1
    return math.prod(shape[1:-1]) > 1 and len(shape_of(weight)) == 2


def _wanted(nodes: Sequence[Node], inputs: set[Node]) -> set[Node]:
    """Nodes whose values reach a quantised layer through nothing but what passes integers on."""
    wanted: set[Node] = set()
    for node in reversed(nodes):
        for user in node.users:
            name = op_name(user)
            through = name in _MOVES or name in _CLAMPS or (name in _SUMS and _plain_sum(user))
            if through and user in wanted:
                wanted.add(node)
        if node in inputs:
            wanted.add(node)
    return wanted


def _clamped(node: Node) -> Node:
    """The clamp behind a node where that alone reads it, else the node."""
    users = list(node.users)
    if len(users) == 1 and op_name(users[0]) in _CLAMPS:
        return users[0]
    return node


def _input(layer: Node) -> Node:
    source = layer.args[_LAYERS[op_name(layer)].input]
    assert isinstance(source, Node)
    return source


def _first(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _tensors(node: Node) -> list[Node]:
    return node.all_input_nodes


def _plain_sum(node: Node) -> bool:
    """Not a sum with a number or a factor: those stay in float32."""
    return op_name(node) not in ("aten.add.Tensor", "aten.add_.Tensor") or (
        len(node.all_input_nodes) == 2
        and not node.kwargs
        and all(source.op != "get_attr" for source in node.all_input_nodes)
    )


def calibrated(
    graph: GraphModule, chosen: Scheme, batches: Callable[[], Iterable[Tensor]]
) -> dict[str, Range]:
    """The range of every point: the one with the least squared error over the batches of images.

    Tried are the extremes seen and the percentiles 99.999, 99.99 and 99.9, each shrunk by steps.
    batches: gives the images anew for each of two passes: extremes, then histograms.
    """
    own = [name for name, source in chosen.points.items() if name == source]
    extremes: dict[str, tuple[float, float]] = {}

    def widen(name: str, value: Tensor) -> None:
        low, high = (float(end) for end in torch.aminmax(value))
        known = extremes.get(name, (0.0, 0.0))
        extremes[name] = (min(low, known[0]), max(high, known[1]))

    _observe(graph, own, batches(), widen)
    histograms = {name: _Histogram(*extremes[name]) for name in own}
    _observe(graph, own, batches(), lambda name, value: histograms[name].add(value))
    ranges = {name: histograms[name].best() for name in own}
    return {name: ranges[source] for name, source in chosen.points.items()}


def _observe(
    graph: GraphModule,
    names: Iterable[str],
    batches: Iterable[Tensor],
    see: Callable[[str, Tensor], None],
) -> None:
    observer = _Observer(graph, set(names), see)
    with torch.no_grad():
        for images in batches:
            observer.run(images)


class _Observer(torch.fx.Interpreter):
    """Runs a graph and shows the values of some nodes."""

    def __init__(
        self, graph: GraphModule, names: set[str], see: Callable[[str, Tensor], None]
    ) -> None:
        super().__init__(graph)
        self._names = names
        self._see = see

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names:
            self._see(n.name, value)
        return value


class _Histogram:
    """Counts of values between two extremes, each sample weighted by one over its energy.

    So weighted, the squared error is that relative to each sample: a few images with values a
    hundred times as large as usual do not decide alone. Zeros are left out: they are always exact.
    """

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, max(high, low + 1e-12)
        self._counts = torch.zeros(BINS, dtype=torch.float64)
        self._width = (self._high - self._low) / BINS
        self._centres = self._low + self._width * (torch.arange(BINS, dtype=torch.float64) + 0.5)

    def add(self, value: Tensor) -> None:
        zero = int(-self._low / self._width)
        for sample in value.flatten(1).float():
            counts = torch.histc(sample, BINS, self._low, self._high).double()
            if 0 <= zero < BINS:
                counts[zero] = max(0.0, float(counts[zero]) - float((sample == 0).sum()))
            self._counts += counts / float(sample.square().sum().clamp_min(1e-12))

    def best(self) -> Range:
        tried = [Range.spanning(self._low * share, self._high * share) for share in SHARES]
        return min(tried, key=self.error)

    def error(self, tried: Range) -> float:
        """The sum of squared errors: the variance of rounding inside, the distance outside."""
        above = (self._centres - tried.high).clamp_min(0)
        below = (tried.low - self._centres).clamp_min(0)
        squared = (above + below).square() + tried.scale**2 / 12
        return float((self._counts * squared).sum())


def simulated(graph: GraphModule, chosen: Scheme, ranges: Mapping[str, Range]) -> GraphModule:
    """Return the graph with its rounding simulated in float32, which differentiates.

    Its weights stay float32 parameters; what rounds them has the scales that they have now. Nodes
    keep their names: what read a tensor reads the rounded one.
    """
    graph = copy_graph(graph)
    by_name = {node.name: node for node in graph.graph.nodes}
    for name in chosen.layers:
        _round_weight(graph, by_name[name])
    # What these compute exists in eight bits alone, and they read nothing else; other operators
    # have float32 values, which float32 operators go on reading.
    integer = {by_name[name] for name in chosen.layers} | {
        _unclamped(by_name[name])
        for name in chosen.points
        if op_name(_unclamped(by_name[name])) in (_SUMS | _MOVES)
    }
    made = {name: _unclamped(by_name[name]) in integer for name in chosen.points}
    for name, from_integers in made.items():
        node, found = by_name[name], ranges[name]
        with graph.graph.inserting_after(node):
            rounded = graph.graph.call_function(
                _FAKE, (node, found.scale, found.zero_point, LOWEST, HIGHEST)
            )
        rounded.meta = {"val": node.meta["val"]}
        for user in list(node.users):
            if user is not rounded and (from_integers or user in integer):
                user.replace_input_with(node, rounded)
    graph.recompile()
    return graph


def _unclamped(node: Node) -> Node:
    """The node that a clamp alone reads; the node itself where it is no clamp."""
    if op_name(node) in _CLAMPS and _clamped(_first(node)) is node:
        return _first(node)
    return node


def _round_weight(graph: GraphModule, layer: Node) -> None:
    kind = _LAYERS[op_name(layer)]
    read = layer.args[kind.weight]
    assert isinstance(read, Node)
    name = str(read.target)
    weight = get_tensor(graph, name)
    with graph.graph.inserting_before(layer):
        if f"{name}_scale" not in dict(graph.named_buffers()):
            scale = _weight_scale(weight.detach(), kind.axis)
            put_tensor(graph, f"{name}_scale", scale)
            put_tensor(graph, f"{name}_zero", torch.zeros(len(scale), dtype=torch.int32))
        others = [graph.graph.get_attr(f"{name}{suffix}") for suffix in ("_scale", "_zero")]
        rounded = graph.graph.call_function(
            _FAKE_WEIGHT, (read, *others, kind.axis, -WEIGHT_HIGHEST, WEIGHT_HIGHEST)
        )
    rounded.meta = {"val": read.meta["val"]}
    layer.update_arg(kind.weight, rounded)


def _weight_scale(weight: Tensor, axis: int) -> Tensor:
    others = [other for other in range(weight.dim()) if other != axis]
    scale: Tensor = weight.float().abs().amax(others) / WEIGHT_HIGHEST
    return scale.clamp_min(1e-12)


def correct_biases(simulation: GraphModule, graph: GraphModule, images: Tensor) -> None:
    """Take each output channel's usual error out of the biases of a simulated graph, in place.

    One layer after the other, each behind the layers corrected before it (Nagel et al.,
    «Data-free quantization through weight equalization and bias correction», ICCV 2019). The error
    is the median over images of the mean over positions: the mean over images would be that of
    the few whose values are cut off. graph: the float32 graph that was simulated; a layer without
    a bias is left alone.
    """
    means: dict[str, Tensor] = {}
    layers = {
        node.name: _LAYERS[op_name(node)].channels
        for node in simulation.graph.nodes
        if _rounded_weight(node) is not None
    }

    def keep(name: str, value: Tensor) -> None:
        means[name] = _channel_means(value, layers[name])

    _observe(graph, layers, [images], keep)
    with torch.no_grad():
        _BiasCorrection(simulation, means).run(images)


class _BiasCorrection(torch.fx.Interpreter):
    """Runs a simulated graph; each layer's bias is moved until its output has the wanted means."""

    def __init__(self, simulation: GraphModule, means: Mapping[str, Tensor]) -> None:
        super().__init__(simulation)
        self._means = means

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        wanted = self._means.get(n.name)
        kind = _LAYERS.get(op_name(n))
        if wanted is None or kind is None or kind.bias is None or len(n.args) <= kind.bias:
            return value
        bias = n.args[kind.bias]
        if not isinstance(bias, Node) or bias.op != "get_attr":
            return value
        error = (_channel_means(value, kind.channels) - wanted).median(0).values
        assert isinstance(self.module, GraphModule)
        kept = get_tensor(self.module, str(bias.target)).detach()
        replace_tensor(self.module, str(bias.target), kept - error)
        return value - error.reshape(-1, *[1] * (-kind.channels - 1))


def _channel_means(value: Tensor, channels: int) -> Tensor:
    """[images, channels]: the means over positions."""
    axis = value.dim() + channels
    others = [other for other in range(1, value.dim()) if other != axis]
    return value.mean(others) if others else value


def _rounded_weight(node: Node) -> Node | None:
    """The node that simulates the rounding of a layer's weight; None for any other node."""
    kind = _LAYERS.get(op_name(node)) if node.op == "call_function" else None
    weight = None if kind is None or len(node.args) <= kind.weight else node.args[kind.weight]
    if isinstance(weight, Node) and weight.target is _FAKE_WEIGHT:
        return weight
    return None


def integers(simulation: GraphModule) -> GraphModule:
    """The simulated graph with int8 weights, and quantize and dequantize where it rounded."""
    graph = copy_graph(simulation)
    for node in list(graph.graph.nodes):
        if node.target is _FAKE:
            _to_pair(graph, node)
        elif node.target is _FAKE_WEIGHT:
            _to_stored(graph, node)
    drop_unused(graph)
    refresh_shapes(graph)
    return graph


def _to_pair(graph: GraphModule, node: Node) -> None:
    source, *mapping = node.args
    with graph.graph.inserting_before(node):
        low = graph.graph.call_function(_QUANTIZE, (source, *mapping, torch.uint8))
        back = graph.graph.call_function(_DEQUANTIZE, (low, *mapping, torch.uint8))
    node.replace_all_uses_with(back)
    graph.graph.erase_node(node)


def unrounded(graph: GraphModule) -> GraphModule:
    """Return a copy that clamps to the ranges in which it was quantised, and rounds no value."""
    graph = copy_graph(graph)
    for node in list(graph.graph.nodes):
        if node.target is _DEQUANTIZE:
            value, *mapping = _first(node).args[:5]
            scale, zero, lowest, highest = (float(number) for number in mapping)  # type: ignore[arg-type]
            ends = (scale * (lowest - zero), scale * (highest - zero))
            with graph.graph.inserting_before(node):
                clamped = graph.graph.call_function(torch.ops.aten.clamp.default, (value, *ends))
            node.replace_all_uses_with(clamped)
    drop_unused(graph)
    return graph


def _to_stored(graph: GraphModule, node: Node) -> None:
    weight, scale, _, axis, lowest, highest = node.args
    assert isinstance(weight, Node)
    assert isinstance(scale, Node)
    assert isinstance(axis, int)
    name = f"{weight.target}_int8"
    if name not in dict(graph.named_buffers()):
        value, scales = (get_tensor(graph, str(n.target)).detach() for n in (weight, scale))
        shape = [-1 if other == axis else 1 for other in range(value.dim())]
        rounded = torch.round(value / scales.reshape(shape))
        put_tensor(graph, name, rounded.clamp(-WEIGHT_HIGHEST, WEIGHT_HIGHEST).to(torch.int8))
    with graph.graph.inserting_before(node):
        stored = graph.graph.get_attr(name)
        back = graph.graph.call_function(
            _DEQUANTIZE_WEIGHT, (stored, scale, None, axis, lowest, highest, torch.int8)
        )
    node.replace_all_uses_with(back)
    graph.graph.erase_node(node)


def quantized(graph: GraphModule, images: Tensor) -> GraphModule:
    """Return a copy of the graph, folded and quantised with the ranges of these images."""
    graph = folded(graph)
    chosen = scheme(graph)
    simulation = simulated(graph, chosen, calibrated(graph, chosen, lambda: [images]))
    correct_biases(simulation, graph, images)
    return integers(simulation)


def folded(graph: GraphModule) -> GraphModule:
    """A copy in which every layer is one that has an integer kernel.

    Batch norms are folded: they would stand between a layer and its rounding. A frozen linear layer
    over several positions becomes a product with the transposed weight and a sum: onnxruntime finds
    no integer product behind a transposition, and would dequantize the weight in every run.
    """
    graph = fused(graph)
    for node in list(graph.graph.nodes):
        if op_name(node) == "aten.linear.default" and _is_layer(node):
            _to_product(graph, node)
    drop_unused(graph)
    return graph


def _to_product(graph: GraphModule, linear: Node) -> None:
    source, weight, *bias = linear.args
    assert isinstance(weight, Node)
    name = f"{weight.target}_transposed"
    kept = get_tensor(graph, str(weight.target))
    transposed = kept.detach().t().contiguous()
    put_tensor(graph, name, nn.Parameter(transposed, requires_grad=False))
    with graph.graph.inserting_before(linear):
        read = graph.graph.get_attr(name)
        read.meta = {"val": weight.meta["val"].t()}
        product = graph.graph.call_function(torch.ops.aten.matmul.default, (source, read))
        product.meta = dict(linear.meta)
        result = product
        if bias and bias[0] is not None:
            result = graph.graph.call_function(torch.ops.aten.add.Tensor, (product, bias[0]))
            result.meta = dict(linear.meta)
    linear.replace_all_uses_with(result)
    graph.graph.erase_node(linear)
