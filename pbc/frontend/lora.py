"""Low-rank adaptation: what a layer makes of its input is corrected by two thin matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from pbc.errors import PbcError
from pbc.frontend.strategy import inserted, whole_number
from pbc.frontend.trace import LAYOUT, PRODUCTS, Operator, Trace, Value
from pbc.frontend.traced_network import TracedNetwork


@dataclass(frozen=True)
class Lora:
    """Train a correction of rank R beside attention projections and 1x1 convolutions, and the head.

    y + up(down(x)), with `up` at zero, so that the model starts unchanged (Hu et al., LoRA,
    ICLR 2022, section 4.1, equation 3). An ONNX file that is exported has no such branch: its
    weight is W + up·down. Of an nn.MultiheadAttention, whose projections are weights and no layers,
    these are corrected as weights, each of a stack by itself. Deviations: the paper scales the
    branch by a constant, which the learning rate does as well; it adapts query and value alone, and
    no convolutions.
    """

    rank: int

    @classmethod
    def parse(cls, text: str) -> Lora:
        return cls(whole_number(text, "R"))

    def insert(self, network: TracedNetwork, example: Tensor) -> None:
        layers, attentions = list(_adapted(network)), list(_attentions(network))
        if not (layers or attentions):
            raise PbcError(
                f"{type(network.module).__name__} has no attention projection and no 1x1 "
                "convolution that runs as a module of its own: lora has nothing to correct"
            )
        for attention in attentions:
            for owner, name, parts in _weights(attention):
                low_rank = LowRankWeight(getattr(owner, name), parts, self.rank)
                register_parametrization(owner, name, low_rank)
        for layer in layers:
            layer.add_module("lora", LowRank(layer, self.rank))
            layer.register_forward_hook(lambda owner, inputs, y: y + owner.lora(inputs[0]))

    def trainable(self, network: TracedNetwork) -> frozenset[str]:
        return inserted(network, LowRank) | inserted(network, LowRankWeight)


class LowRank(nn.Module):
    """A linear layer or a 1x1 convolution like another one, of a lower rank, zero at the start."""

    def __init__(self, like: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        out, width = like.weight.shape[:2]
        rank = min(rank, out, width)
        if isinstance(like, nn.Linear):
            self.down: nn.Module = nn.Linear(width, rank, bias=False)
            self.up: nn.Module = nn.Linear(rank, out, bias=False)
        else:
            places: dict[str, Any] = {"stride": like.stride, "padding": like.padding}
            self.down = nn.Conv2d(width, rank, 1, bias=False, **places)
            self.up = nn.Conv2d(rank, out, 1, bias=False)
        for weight in self.up.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = self.up(self.down(x))
        return up


class LowRankWeight(nn.Module):
    """A stack of weights [parts · out, in], each corrected by a product that is zero at the start.

    It is a parametrization: whoever reads the weight gets the corrected one.
    """

    def __init__(self, like: Tensor, parts: int, rank: int) -> None:
        super().__init__()
        out, width = len(like) // parts, like.shape[1]
        rank = min(rank, out, width)
        bound = width**-0.5  # as nn.Linear begins
        self.down = nn.Parameter(like.new_empty(parts, rank, width).uniform_(-bound, bound))
        self.up = nn.Parameter(like.new_zeros(parts, out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).reshape(weight.shape)


def _attentions(network: TracedNetwork) -> Iterator[nn.MultiheadAttention]:
    """Attention layers of torch itself, in the order in which they run first."""
    for name in dict.fromkeys(call.name for call in network.trace.calls()):
        layer = network.module.get_submodule(name)
        if isinstance(layer, nn.MultiheadAttention):
            yield layer


def _weights(attention: nn.MultiheadAttention) -> Iterator[tuple[nn.Module, str, int]]:
    """What projects, by its owner and name, and how many projections it stacks."""
    if attention.in_proj_weight is not None:
        yield attention, "in_proj_weight", 3
    else:
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            yield attention, name, 1
    yield attention.out_proj, "weight", 1


def _adapted(network: TracedNetwork) -> Iterator[nn.Linear | nn.Conv2d]:
    """The layers that are corrected, in the order in which they run first."""
    projections = _projections(network.trace)
    for name in dict.fromkeys(call.name for call in network.trace.calls()):
        layer = network.module.get_submodule(name)
        if f"{name}.weight" in network.head.parameters:
            continue
        if type(layer) is nn.Linear and name in projections:
            yield layer
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
            yield layer


def _projections(trace: Trace) -> set[str]:
    """Names of the modules whose layers an attention reads, or whose layer reads an attention."""
    readers: dict[Value, list[Operator]] = {}
    for operator in trace.operators:
        for value in operator.inputs:
            readers.setdefault(value, []).append(operator)
    attentions = [operator for operator in trace.operators if _is_attention(operator)]

    def makers(operator: Operator) -> list[Operator]:
        made = [value.made_by for value in operator.inputs if not value.constant]
        return [maker for maker in made if maker is not None]

    def takers(operator: Operator) -> list[Operator]:
        if operator.word not in LAYOUT and not _is_attention(operator):
            return []
        return [reader for value in operator.results for reader in readers.get(value, ())]

    return _first_layers(attentions, makers) | _first_layers(attentions, takers)


def _first_layers(
    start: list[Operator], following: Callable[[Operator], list[Operator]]
) -> set[str]:
    """The modules of the layers that are met first on every way."""
    waiting, seen, found = list(start), set(start), set()
    while waiting:
        for other in following(waiting.pop()):
            if other.is_layer:
                found.add(other.module)
            elif other not in seen:
                seen.add(other)
                waiting.append(other)
    return found


def _is_attention(operator: Operator) -> bool:
    """Whether it multiplies data by data."""
    known = operator.word in PRODUCTS or "scaled_dot_product" in operator.word
    return known and not any(value.constant for value in operator.inputs)
