"""The strategy that trains codebooks: the few values that a layer's weights share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pbc.errors import PbcError, UsageError
from pbc.frontend.strategy import whole_number
from pbc.frontend.traced_network import TracedNetwork
from pbc.proxies.codebooks import MOST_BITS, bits_of, codebook, is_large


@dataclass(frozen=True)
class Centroids:
    """Train the 2**BITS values that each layer's weights share, and the classifier.

    Deep Compression (Han et al., ICLR 2016), section 3: weights are clustered by k-means with
    linear initialisation, and a value's gradient is the mean of its members': the paper has their
    sum, which at a weight's usual rate is thousands of times too long a step. So θ is a few numbers
    a layer, and the bundle's indices pack into few bits (pbc.bundle.packing). Which layers, and
    that depthwise ones get 256 values, is as for the pass cluster-weights. The network starts as
    the clustered one. Gradients pass through everything: a step costs what full training's does.
    """

    bits: int

    @classmethod
    def parse(cls, text: str) -> Centroids:
        bits = whole_number(text, "BITS")
        if bits > MOST_BITS:
            raise UsageError(f"strategy {text!r} needs 1 to {MOST_BITS} bits, such as centroids:4")
        return cls(bits)

    def insert(self, network: TracedNetwork, example: Tensor) -> None:
        """Compute each weight from its codebook, which takes its place as a parameter."""
        read = network.trace.read.keys() - network.head.parameters.keys()
        layers = [
            layer
            for name, layer in network.module.named_modules()
            if isinstance(layer, (nn.Conv2d, nn.Linear))
            and f"{name}.weight" in read
            and is_large(layer.weight)
        ]
        if not layers:
            raise PbcError(
                f"{type(network.module).__name__} has no convolution or linear layer that is large "
                "enough to share values"
            )
        for layer in layers:
            shared = _SharedValues(layer.weight, bits_of(layer.weight, self.bits))
            parametrize.register_parametrization(layer, "weight", shared, unsafe=True)

    def trainable(self, network: TracedNetwork) -> frozenset[str]:
        return frozenset(
            f"{name}.original"
            for name, layer in network.module.named_modules()
            if isinstance(layer, parametrize.ParametrizationList)
            and any(isinstance(step, _SharedValues) for step in layer)
        )


class _SharedValues(nn.Module):
    """A weight as values and indices; of the weight it was made for, the start of the values.

    Gradients are divided by the numbers of members, which leaves the values themselves alone: a
    step then moves them as the same step of the weight would, projected on what they can be.
    """

    indices: Tensor
    members: Tensor
    start: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        values, indices = codebook(weight, bits)
        self._shape = weight.shape
        self.register_buffer("indices", indices.flatten())
        counts = torch.bincount(indices.flatten(), minlength=len(values))
        self.register_buffer("members", counts.clamp_min(1).float())
        self.register_buffer("start", values, persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        still = values.detach()
        values = still + (values - still) / self.members
        return torch.index_select(values, 0, self.indices).reshape(self._shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self.start.clone()
