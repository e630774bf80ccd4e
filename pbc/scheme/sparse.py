"""The strategy of sparse back-propagation: some biases, and shares of some weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pbc.errors import PbcError, UsageError, suggest
from pbc.frontend.strategy import Strategy
from pbc.frontend.traced_network import TracedNetwork
from pbc.scheme.budget import Budget, is_budget
from pbc.scheme.layers import Layer, layers
from pbc.scheme.scheme import Scheme


@dataclass(frozen=True)
class Sparse:
    """Train biases of the last layers, shares of weights by a scheme, and the classifier.

    Lin et al., On-Device Training Under 256KB Memory, NeurIPS 2022, section 3.2: of the last k
    layers the biases, of some layers the weights of a share r of the input channels (of a depthwise
    convolution, of the channels), those of largest pretrained norm. Where a layer has a batch norm
    in place of a bias, that one's shift trains. A weight is its frozen tensor with θ copied to
    where the index says, so that a backward keeps only what those channels read.
    """

    scheme: Scheme

    @classmethod
    def parse(cls, text: str) -> Strategy:
        name, _, argument = text.partition(":")
        if not argument:
            raise UsageError(
                f"strategy {text!r} needs a budget, such as {name}:8MiB, or a scheme, such as "
                f"{name}:b12,features.3.conv=1/4"
            )
        return Budget.parse(text) if is_budget(argument) else cls(Scheme.parse(argument))

    def insert(self, network: TracedNetwork, example: Tensor) -> None:
        """Compute each partly trained weight from what is frozen of it and what trains."""
        for layer, fraction in self._chosen(network):
            if layer.axis is not None and fraction < 1:
                part = SelectedChannels(layer.module.weight, layer.axis, layer.count(fraction))
                parametrize.register_parametrization(layer.module, "weight", part, unsafe=True)

    def trainable(self, network: TracedNetwork) -> frozenset[str]:
        found = layers(network)
        if self.scheme.biases > len(found):
            raise PbcError(
                f"{type(network.module).__name__} has {len(found)} layers before its head; the "
                f"strategy asks for the biases of the last {self.scheme.biases}"
            )
        last = found[len(found) - self.scheme.biases :]
        weights = {
            f"{layer.name}.parametrizations.weight.original"
            if parametrize.is_parametrized(layer.module, "weight")
            else f"{layer.name}.weight"
            for layer, _ in self._chosen(network)
        }
        return frozenset(weights | {layer.bias for layer in last if layer.bias is not None})

    def _chosen(self, network: TracedNetwork) -> Sequence[tuple[Layer, Fraction]]:
        """The layers of the scheme; raises PbcError for one that is not there, or not by parts."""
        known = {layer.name: layer for layer in layers(network)}
        for name, fraction in self.scheme.fractions.items():
            if name not in known:
                raise PbcError(suggest("layer", name, known))
            if fraction < 1 and known[name].axis is None:
                raise PbcError(
                    f"layer {name} has {known[name].module.groups} groups: all of its weight "
                    f"trains, or none; {name}=1"
                )
        return [(known[name], fraction) for name, fraction in self.scheme.fractions.items()]


class SelectedChannels(nn.Module):
    """A weight of which some channels train, those of largest norm; `frozen` has the others."""

    frozen: Tensor
    index: Tensor

    def __init__(self, weight: Tensor, axis: int, count: int) -> None:
        super().__init__()
        weight = weight.detach()
        norms = weight.transpose(0, axis).flatten(1).norm(dim=1)
        self._axis = axis
        self.register_buffer("frozen", weight.clone())
        self.register_buffer("index", norms.topk(count).indices.sort().values)

    def forward(self, theta: Tensor) -> Tensor:
        return torch.index_copy(self.frozen, self._axis, self.index, theta)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.index_select(self._axis, self.index)
