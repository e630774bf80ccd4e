"""Strategies: which parameters train, and what is inserted into the model to train."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pbc import plugins
from pbc.errors import PbcError, UsageError
from pbc.frontend.axes import channel_axis
from pbc.frontend.head import append
from pbc.frontend.traced_network import TracedNetwork
from pbc.ir.program import Program


class Strategy(Protocol):
    """A parameter-efficient training method; entry point group `pbc.strategies`."""

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Build it of its text, such as `last-k:3`; raises UsageError saying what would be right.

        What is before the colon is a name that the class is installed under.
        """

    def insert(self, network: TracedNetwork, example: Tensor) -> None:
        """Add to the eager module, in place, what this strategy trains besides its own weights.

        example: float32 [batch, channels, height, width], an input of the module.
        """

    def trainable(self, network: TracedNetwork) -> frozenset[str]:
        """The names of the module's parameters that train, besides the head's, which always do."""


@dataclass(frozen=True)
class Decision:
    """The text of a strategy that leaves nothing open, and a note why it is this one."""

    strategy: str
    note: str


@runtime_checkable
class Undecided(Protocol):
    """A strategy, too, which leaves it to the compiler what exactly trains."""

    def decided(
        self,
        network: TracedNetwork,
        program: Callable[[str], Program],
        contributions: Path | None,
        seed: int,
    ) -> Decision:
        """Decide for a network.

        program: of a strategy's text, the network captured for it, split, with norms folded.
        contributions: a file of what parts of the network are worth to train.
        """


def parse(text: str) -> Strategy:
    """Build the strategy that `last-k:3` names; raises UsageError saying what would be right."""
    kind: type[Strategy] = plugins.load("pbc.strategies", text.partition(":")[0])
    return kind.parse(text)


def without_argument(text: str) -> None:
    """Refuse a strategy's text that goes on behind its name."""
    name, colon, _ = text.partition(":")
    if colon:
        raise UsageError(f"strategy {name!r} takes no argument, got {text!r}")


def whole_number(text: str, symbol: str) -> int:
    """Return the positive whole number behind the colon; symbol: its letter in documents."""
    name, _, argument = text.partition(":")
    if not argument.isdigit() or int(argument) < 1:
        raise UsageError(
            f"strategy {text!r} needs a positive whole number: {name}:{symbol}, "
            f"for example {name}:3"
        )
    return int(argument)


def inserted(network: TracedNetwork, kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of all parameters of the modules of a kind."""
    return frozenset(
        f"{name}.{parameter}"
        for name, layer in network.module.named_modules()
        if isinstance(layer, kind)
        for parameter, _ in layer.named_parameters()
    )


@dataclass(frozen=True)
class LinearProbe:
    """Train the classifier alone."""

    @classmethod
    def parse(cls, text: str) -> LinearProbe:
        without_argument(text)
        return cls()

    def insert(self, network: TracedNetwork, example: Tensor) -> None:
        pass

    def trainable(self, network: TracedNetwork) -> frozenset[str]:
        return frozenset()


@dataclass(frozen=True)
class LastK:
    """Train the last K blocks, in the order of execution, and what runs after their start."""

    count: int

    @classmethod
    def parse(cls, text: str) -> LastK:
        return cls(whole_number(text, "K"))

    def insert(self, network: TracedNetwork, example: Tensor) -> None:
        pass

    def trainable(self, network: TracedNetwork) -> frozenset[str]:
        start = network.start(network.last_blocks(self.count)[0])
        return frozenset(name for name, first in network.trace.read.items() if first >= start)


@dataclass(frozen=True)
class Norm:
    """Train the scale and shift of every normalisation layer, and the classifier: «BN + last».

    Running statistics stay frozen (Cai et al., TinyTL, NeurIPS 2020, section 4, compares it so).
    """

    @classmethod
    def parse(cls, text: str) -> Norm:
        without_argument(text)
        return cls()

    def insert(self, network: TracedNetwork, example: Tensor) -> None:
        pass

    def trainable(self, network: TracedNetwork) -> frozenset[str]:
        affine = {
            f"{name}.{parameter}"
            for name, layer in network.module.named_modules()
            if is_norm(layer)
            for parameter, _ in layer.named_parameters(recurse=False)
        }
        if not affine:
            raise PbcError(
                f"{type(network.module).__name__} has no normalisation layer with a scale to train"
            )
        return frozenset(affine)


@dataclass(frozen=True)
class Bias:
    """Train every bias, and the classifier (Zaken et al., BitFit, ACL 2022)."""

    @classmethod
    def parse(cls, text: str) -> Bias:
        without_argument(text)
        return cls()

    def insert(self, network: TracedNetwork, example: Tensor) -> None:
        pass

    def trainable(self, network: TracedNetwork) -> frozenset[str]:
        names = (name for name, _ in network.module.named_parameters())
        return frozenset(name for name in names if name.rpartition(".")[2].endswith("bias"))


@dataclass(frozen=True)
class Adapters:
    """Train a bottleneck inserted after each of the last N blocks, and the classifier.

    x + up(relu(down(x))), of an eighth of the width (Houlsby et al., ICML 2019): linear layers
    where channels are the last axis, else 1x1 convolutions. `up` starts at zero, so the model
    starts unchanged.
    """

    count: int

    @classmethod
    def parse(cls, text: str) -> Adapters:
        return cls(whole_number(text, "N"))

    def insert(self, network: TracedNetwork, example: Tensor) -> None:
        module, names = network.module, network.last_blocks(self.count)
        outputs = {call.name: call.outputs for call in network.trace.calls()}
        for name, output in block_outputs(module, names, example).items():
            adapter = Adapter(output, channel_axis(outputs[name][0]))
            append(module.get_submodule(name), "adapter", adapter)

    def trainable(self, network: TracedNetwork) -> frozenset[str]:
        return inserted(network, Adapter)


@dataclass(frozen=True)
class Full:
    """Train everything (running statistics stay frozen): the baseline, with nothing to prune."""

    @classmethod
    def parse(cls, text: str) -> Full:
        without_argument(text)
        return cls()

    def insert(self, network: TracedNetwork, example: Tensor) -> None:
        pass

    def trainable(self, network: TracedNetwork) -> frozenset[str]:
        return frozenset(name for name, _ in network.module.named_parameters())


class Adapter(nn.Module):
    """A residual bottleneck for outputs shaped like `like`: 3 or 4 axes, of which one channels."""

    def __init__(self, like: Tensor, axis: int) -> None:
        super().__init__()
        channels = like.shape[axis]
        width = max(8, channels // 8)
        self.down: nn.Module
        self.up: nn.Module
        if axis == like.dim() - 1:
            self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        else:
            layer = nn.Conv1d if like.dim() == 3 else nn.Conv2d
            self.down, self.up = layer(channels, width, 1), layer(width, channels, 1)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = self.up(torch.relu(self.down(x)))
        return x + up


def is_norm(layer: nn.Module) -> bool:
    """Whether the layer is a normalisation, also one of a library's own, with an activation in it.

    A layer around a normalisation and a convolution, which may be called after both, is none.
    """
    inside = [weight for child in layer.children() for weight in child.parameters()]
    return "Norm" in type(layer).__name__ and not inside


def block_outputs(module: nn.Module, names: Iterable[str], example: Tensor) -> dict[str, Tensor]:
    """Run the module once and return what each named block puts out."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        if not isinstance(output, Tensor) or output.dim() not in (3, 4):
            found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise PbcError(
                f"block {name} puts out {found}; adapters need one tensor of "
                "shape [batch, tokens, channels] or [batch, channels, height, width]"
            )
        outputs[name] = output

    hooks = [
        module.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: keep(name, output)
        )
        for name in names
    ]
    with torch.no_grad():
        module.eval()(example)
    for hook in hooks:
        hook.remove()
    return outputs
