"""The interface between what is frozen and what trains, and how faithful a proxy is there.

The interface is the tensors that cross from frozen computation into a trainable operator.
Fidelity of a level: over held-out calibration images, subtract level 0's per-channel mean, divide
by its standard deviation, take the cosine per sample over the flattened tensor, the mean over
samples, and the minimum over the interface's tensors, all at the initial trainable parameters.
Which axes are channels, in front of the positions or behind, is read from level 0's dimensions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pbc.bundle.graph_name import BODY, PREFIX, GraphName
from pbc.bundle.ladder import FLOAT32, INT8
from pbc.ir.dim_rules import analyse
from pbc.ir.dims import channel_axes
from pbc.ir.graph import PARAMETER, output_names, output_nodes, parameter_names, tensor_names
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.rewrite import copy_graph, cut_at, to_buffer
from pbc.proxies.resolution import brought_back, reduced_role
from pbc.proxies.tokens import cut_unmerged


class UpToInterface(nn.Module):
    """One level cut off at the interface: images in, the interface's tensors out, in float32.

    Its graph modules are copies that share their tensors with the level until they are trained.

    inside: a node of the prefix whose value follows the interface's tensors. logits: whether the
    scores at the initial trainable parameters come last.
    """

    def __init__(
        self,
        program: Program,
        level: LevelGraphs,
        inside: str | None = None,
        logits: bool = False,
    ) -> None:
        super().__init__()
        self.prefix = None if level.prefix is None else copy_graph(level.prefix)
        self._sent = len(level.sent)
        if level.prefix is not None and inside is not None:
            self.prefix = cut_unmerged(level.prefix, [*output_names(level.prefix), inside])
        self.body: GraphModule | None = None
        self.theta: list[Tensor] = []
        boundary = boundary_nodes(program.levels[0].body)
        self._read = len(boundary)
        if boundary or logits:
            scores = output_names(level.body) if logits else []
            self.body = cut_whole(program, level, [*boundary, *scores])
            # What lies behind the interface is every level's alike.
            before = tensor_names(cut_at(level.body, boundary)) if boundary else []
            for name in set(tensor_names(self.body)) - set(before):
                to_buffer(self.body, name)
            names = parameter_names(self.body)
            self.theta = [program.parameters[name].detach() for name in names]

    @property
    def graphs(self) -> list[GraphModule]:
        """Those of the two that there are."""
        return [graph for graph in (self.prefix, self.body) if graph is not None]

    def forward(self, images: Tensor) -> list[Tensor]:
        values = [images] if self.prefix is None else list(self.prefix(images))
        sent, inside = values[: self._sent], values[self._sent :]
        tensors = [] if self.prefix is None else sent
        read: list[Tensor] = []
        if self.body is not None:
            theta = [value.to(images.device) for value in self.theta]
            read = list(self.body(*sent, *theta))
        return [*tensors, *read[: self._read], *inside, *read[self._read :]]


def cut_whole(program: Program, level: LevelGraphs, names: Sequence[str]) -> GraphModule:
    """Return a level's body that returns the named nodes with all tokens, height and width."""
    original, cut = program.levels[0], cut_unmerged(level.body, names)
    if level.resolution is None or reduced_role(original) != BODY:
        return cut
    return brought_back(cut, cut_at(original.body, names), level.resolution, original.prefix)


def precision_of(original: LevelGraphs, role: GraphName, precision: str) -> str:
    """Return in what a graph of a level of this precision computes.

    A body of nothing but trainable layers is the same at every level: it stays in float32. So does
    every body of an int8 level: gradients pass through it.
    """
    if precision == INT8:
        return precision if role == PREFIX else FLOAT32
    whole = role == PREFIX or original.prefix is None
    return precision if whole or boundary_nodes(original.body) else FLOAT32


def dtype_of(precision: str) -> torch.dtype:
    """Return the type of a graph's real numbers; an int8 graph rounds by its own operators."""
    dtype: torch.dtype = torch.float32 if precision == INT8 else getattr(torch, precision)
    return dtype


def in_precision(graph: GraphModule, dtype: torch.dtype) -> GraphModule:
    """Return the graph with its real numbers in this type."""
    # A copy of its own: converting a module converts the tensors that it shares.
    return graph if dtype == torch.float32 else copy.deepcopy(graph).to(dtype)


def boundary_nodes(graph: GraphModule) -> list[str]:
    """The nodes of the body that a trainable operator reads after frozen layers changed them."""
    changed: dict[Node, bool] = {}
    found: list[str] = []
    for node in graph.graph.nodes:
        if node.op != "call_function":
            changed[node] = node.op == "get_attr" and _is_weight(graph, node)
            continue
        sources = node.all_input_nodes
        trained = any(PARAMETER in source.meta for source in sources)
        if trained:
            found += [s.name for s in sources if s.op == "call_function" and changed[s]]
        changed[node] = not trained and any(changed[source] for source in sources)
    return list(dict.fromkeys(found))


def _is_weight(graph: GraphModule, node: Node) -> bool:
    return str(node.target) in dict(graph.named_parameters())


@dataclass(frozen=True)
class Standard:
    """Per-channel mean and standard deviation of one interface tensor at level 0, broadcastable."""

    mean: Tensor
    std: Tensor

    def __call__(self, tensor: Tensor) -> Tensor:
        return (tensor - self.mean) / self.std


def interface_channels(program: Program) -> list[tuple[int, ...]]:
    """For each interface tensor the axes that count channels, the batch's never among them."""
    original = program.levels[0]
    sent = [] if original.prefix is None else [node.name for node in output_nodes(original.prefix)]
    known = analyse(original).axes
    return [channel_axes(known[name]) for name in (*sent, *boundary_nodes(original.body))]


def standards(program: Program, batches: Iterable[Sequence[Tensor]]) -> list[Standard]:
    """Measure level 0's statistics at the interface, of what it has there for batches of images."""
    sums = [_Sums(channels) for channels in interface_channels(program)]
    with torch.no_grad():
        for tensors in batches:
            for total, tensor in zip(sums, tensors, strict=True):
                total.add(tensor)
    return [total.standard() for total in sums]


@dataclass
class _Sums:
    """Running sums of one tensor, its square and its size per channel, in float64."""

    channels: tuple[int, ...]
    count: int = 0
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0

    def add(self, tensor: Tensor) -> None:
        axes = [axis for axis in range(tensor.dim()) if axis not in self.channels]
        values = tensor.double()
        self.count += math.prod(tensor.shape[axis] for axis in axes)
        self.first = self.first + values.sum(axes, keepdim=True)
        self.second = self.second + values.square().sum(axes, keepdim=True)

    def standard(self) -> Standard:
        assert isinstance(self.first, Tensor)
        assert isinstance(self.second, Tensor)
        mean = self.first / self.count
        variance = (self.second / self.count - mean.square()).clamp_min(0)
        # A channel that hardly moves carries nothing; do not let its noise dominate.
        std = variance.sqrt().clamp_min(float(variance.mean().sqrt()) * 1e-2 + 1e-8)
        return Standard(mean.float(), std.float())


def cosine(proxy: Tensor, original: Tensor, standard: Standard) -> Tensor:
    """[batch]: cosine of two interface tensors, centred and standardised."""
    return torch.cosine_similarity(standard(proxy).flatten(1), standard(original).flatten(1), dim=1)
