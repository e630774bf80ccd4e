"""Taps: what blocks put out, pooled, brought to the head, for methods that only read a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pbc.errors import PbcError
from pbc.frontend.axes import REDUCTIONS, channel_axis
from pbc.frontend.head import PooledLinear
from pbc.frontend.trace import LAYOUT, Value
from pbc.frontend.traced_network import TracedNetwork

MOST = 4096
"""Values of all taps together: what a closed-form head of them takes of a small board's memory."""

# For a vector of zeros.
_LEAST_SQUARE = 1e-12

Read = Callable[[nn.Linear, Tensor, Tensor], Tensor]
"""From the head's layer, what it read before and the taps to what it reads."""


@dataclass(frozen=True)
class Tap:
    """A block whose output is read: its name, the axis of channels, and how many there are."""

    block: str
    axis: int
    width: int


@dataclass(frozen=True)
class Taps:
    """Where a network is read, and the linear layer that makes its scores."""

    taps: tuple[Tap, ...]
    head: nn.Linear

    @property
    def width(self) -> int:
        return sum(tap.width for tap in self.taps)

    @classmethod
    def of(cls, network: TracedNetwork, strategy: str) -> Taps:
        """Choose the blocks; raises PbcError where the head is not one layer of one vector.

        Those that pooled are the head's input are left out. Where all together are wider than MOST,
        of neighbours of the same width the last alone is read, and of these the last ones.
        """
        head, reads = _head(network, strategy)
        outputs = {call.name: call.outputs for call in network.trace.calls()}
        found = []
        for name in network.blocks:
            output = outputs[name][0] if outputs[name] else None
            if output is None or len(output.shape) < 2 or _is_pooled(reads, output):
                continue
            axis = channel_axis(output)
            found.append(Tap(name, axis, output.shape[axis]))
        if sum(tap.width for tap in found) > MOST:
            following = [*found[1:], None]
            found = [
                tap
                for tap, after in zip(found, following, strict=True)
                if after is None or after.width != tap.width
            ]
        while found and sum(tap.width for tap in found) > MOST:
            del found[0]
        if not found:
            raise PbcError(
                f"{type(network.module).__name__} has no block beside its last whose output could "
                f"be read: {strategy} has nothing to add (--blocks PATTERN names others)"
            )
        return cls(tuple(found), head)

    def connect(self, network: TracedNetwork, read: Read) -> None:
        """Let the head's layer read what `read` makes of its input and of the taps.

        Those are f32[b, width]: each block's output averaged over positions or tokens and scaled
        to a root mean square of one, one block beside the other.
        """
        latest: dict[str, Tensor] = {}

        def keep(tap: Tap) -> Callable[[nn.Module, object, object], None]:
            def hook(owner: nn.Module, inputs: object, output: object) -> None:
                first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
                latest[tap.block] = _mean(first, tap.axis)

            return hook

        for tap in self.taps:
            network.module.get_submodule(tap.block).register_forward_hook(keep(tap))
        pooled = self.head.axis if isinstance(self.head, PooledLinear) else None

        def before(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            x = inputs[0]
            if pooled is not None:
                x = _mean(x, pooled)
            together = torch.cat([scaled(latest.pop(tap.block)) for tap in self.taps], 1)
            return (read(layer, x, together),)

        if isinstance(self.head, PooledLinear):
            self.head.axis = 1  # what it reads now is pooled
        self.head.register_forward_pre_hook(before)


def _head(network: TracedNetwork, strategy: str) -> tuple[nn.Linear, Value]:
    """The layer that makes the scores, and what it reads."""
    owners = {name.rpartition(".")[0] for name in network.head.parameters}
    for call in network.trace.calls():
        plain = isinstance(call.module, nn.Linear) and owners == {call.name}
        if plain and (len(call.inputs[0].shape) == 2 or isinstance(call.module, PooledLinear)):
            assert isinstance(call.module, nn.Linear)
            return call.module, call.inputs[0]
    raise PbcError(
        f"the head of {type(network.module).__name__} ({', '.join(network.head.parameters)}) is "
        f"not one linear layer that reads one vector an image, which {strategy} widens"
    )


def _is_pooled(value: Value, output: Value) -> bool:
    """Whether nothing but a mean and a change of layout lies between a block and a value."""
    while value is not output:
        operator = value.made_by
        if operator is None or operator.word not in LAYOUT | REDUCTIONS | {"dropout"}:
            return False
        value = operator.inputs[0]
    return True


def _mean(value: Tensor, axis: int) -> Tensor:
    others = [other for other in range(1, value.dim()) if other != axis]
    return value.mean(others) if others else value


def scaled(rows: Tensor) -> Tensor:
    """Return f32[b, d] rows of a root mean square of one."""
    return rows * ((rows * rows).mean(1, keepdim=True) + _LEAST_SQUARE).rsqrt()
