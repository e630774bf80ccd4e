"""Layers of a network as sparse back-propagation sees them: what of each one can train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from pbc.frontend.trace import Operator, Trace, Value
from pbc.frontend.traced_network import TracedNetwork
from pbc.scheme.scheme import FRACTIONS


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer that runs as a module of its own.

    bias: the name of the parameter that shifts its results: its own, or that of the norm behind it.
    axis: of its weight, the one of which a part can train: input channels, of a depthwise
    convolution the channels; None where only all of it can (other groups tie them together).
    channels: the size of that axis.
    """

    name: str
    module: nn.Conv2d | nn.Linear
    bias: str | None
    axis: int | None
    channels: int

    @property
    def fractions(self) -> Sequence[Fraction]:
        """Those of FRACTIONS at which it can train: no two of the same number of channels."""
        if self.axis is None:
            return FRACTIONS[-1:]
        by_count = {self.count(fraction): fraction for fraction in FRACTIONS}
        return tuple(by_count.values())

    def count(self, fraction: Fraction) -> int:
        """Return how many channels a share is, at least one."""
        return max(1, round(self.channels * fraction))


def layers(network: TracedNetwork) -> tuple[Layer, ...]:
    """Return the layers before the head, in the order in which they run first."""
    read = network.trace.read
    readers = _readers(network.trace)
    heads = {name.rpartition(".")[0] for name in network.head.parameters}
    found: dict[str, Layer] = {}
    for operator in network.trace.operators:
        name = operator.module
        if not operator.is_layer or name in found or name in heads:
            continue
        module = network.module.get_submodule(name)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            shifts = [f"{name}.bias", *(f"{norm}.bias" for norm in _norms(operator, readers))]
            bias = next((shift for shift in shifts if shift in read), None)
            axis = _axis(module)
            channels = module.weight.shape[0 if axis is None else axis]
            found[name] = Layer(name, module, bias, axis, channels)
    return tuple(found.values())


def _axis(module: nn.Conv2d | nn.Linear) -> int | None:
    if isinstance(module, nn.Linear) or module.groups == 1:
        return 1
    return 0 if module.groups == module.in_channels == module.out_channels else None


def _readers(trace: Trace) -> dict[Value, list[Operator]]:
    found: dict[Value, list[Operator]] = {}
    for operator in trace.operators:
        for value in operator.inputs:
            found.setdefault(value, []).append(operator)
    return found


def _norms(layer: Operator, readers: dict[Value, list[Operator]]) -> list[str]:
    """Names of the batch norms that read a layer's result."""
    return [
        reader.module
        for result in layer.results
        for reader in readers.get(result, ())
        if "batch_norm" in reader.word
    ]
