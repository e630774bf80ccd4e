"""Strategies: which parameters train, and what is inserted into the model to train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from pbc import plugins
from pbc.errors import PbcError, UsageError


class Strategy(Protocol):
    """A parameter-efficient training method; entry point group `pbc.strategies`."""

    argument: ClassVar[str | None]
    """What follows the colon in the strategy's text (`K` in last-k:K), None if nothing does."""

    def insert(self, module: nn.Module, example: Tensor) -> None:
        """Add to the eager module, in place, what this strategy trains besides its own weights.

        example: float32 [batch, channels, height, width], an input of the module.
        """

    def trainable(self, module: nn.Module, classifier: str) -> frozenset[str]:
        """The names of the module's parameters that train (the classifier's always do)."""


def parse(text: str) -> Strategy:
    """Build the strategy that `last-k:3` names; raises UsageError saying what would be right."""
    name, colon, argument = text.partition(":")
    kind = plugins.load("pbc.strategies", name)
    if kind.argument is None:
        if colon:
            raise UsageError(f"strategy {name!r} takes no argument, got {text!r}")
        strategy: Strategy = kind()
        return strategy
    if not argument.isdigit() or int(argument) < 1:
        raise UsageError(
            f"strategy {text!r} needs a positive whole number: {name}:{kind.argument}, "
            f"for example {name}:3"
        )
    strategy = kind(int(argument))
    return strategy


@dataclass(frozen=True)
class LinearProbe:
    """Train the classifier alone."""

    argument: ClassVar[str | None] = None

    def insert(self, module: nn.Module, example: Tensor) -> None:
        pass

    def trainable(self, module: nn.Module, classifier: str) -> frozenset[str]:
        return head_names(module, classifier)


@dataclass(frozen=True)
class LastK:
    """Train the last K residual blocks or encoder layers and everything after them."""

    count: int
    argument: ClassVar[str | None] = "K"

    def insert(self, module: nn.Module, example: Tensor) -> None:
        pass

    def trainable(self, module: nn.Module, classifier: str) -> frozenset[str]:
        first = last_blocks(module, self.count)[0] + "."
        names = [name for name, _ in module.named_parameters()]
        start = next(i for i, name in enumerate(names) if name.startswith(first))
        return frozenset(names[start:]) | head_names(module, classifier)


@dataclass(frozen=True)
class Norm:
    """Train the scale and shift of every normalisation layer, and the classifier.

    Running statistics stay frozen.
    """

    argument: ClassVar[str | None] = None

    def insert(self, module: nn.Module, example: Tensor) -> None:
        pass

    def trainable(self, module: nn.Module, classifier: str) -> frozenset[str]:
        affine = {
            f"{name}.{parameter}"
            for name, layer in module.named_modules()
            if is_norm(layer)
            for parameter, _ in layer.named_parameters(recurse=False)
        }
        if not affine:
            raise PbcError(
                f"{type(module).__name__} has no normalisation layer with a scale to train"
            )
        return frozenset(affine) | head_names(module, classifier)


@dataclass(frozen=True)
class Bias:
    """Train every bias, and the classifier (Zaken et al., BitFit, ACL 2022)."""

    argument: ClassVar[str | None] = None

    def insert(self, module: nn.Module, example: Tensor) -> None:
        pass

    def trainable(self, module: nn.Module, classifier: str) -> frozenset[str]:
        biases = {n for n, _ in module.named_parameters() if n.rpartition(".")[2].endswith("bias")}
        return frozenset(biases) | head_names(module, classifier)


@dataclass(frozen=True)
class Adapters:
    """Train a bottleneck inserted after each of the last N blocks, and the classifier.

    x + up(relu(down(x))), of an eighth of the width (Houlsby et al., ICML 2019): linear layers on
    token sequences, 1x1 convolutions on images. `up` starts at zero, so the model starts unchanged.
    """

    count: int
    argument: ClassVar[str | None] = "N"

    def insert(self, module: nn.Module, example: Tensor) -> None:
        names = last_blocks(module, self.count)
        for name, output in block_outputs(module, names, example).items():
            block = module.get_submodule(name)
            block.add_module("adapter", Adapter(output))
            block.register_forward_hook(lambda owner, inputs, x: owner.adapter(x))

    def trainable(self, module: nn.Module, classifier: str) -> frozenset[str]:
        inserted = {
            f"{name}.{parameter}"
            for name, layer in module.named_modules()
            if isinstance(layer, Adapter)
            for parameter, _ in layer.named_parameters()
        }
        return frozenset(inserted) | head_names(module, classifier)


@dataclass(frozen=True)
class Full:
    """Train everything (running statistics stay frozen): the baseline, with nothing to prune."""

    argument: ClassVar[str | None] = None

    def insert(self, module: nn.Module, example: Tensor) -> None:
        pass

    def trainable(self, module: nn.Module, classifier: str) -> frozenset[str]:
        return frozenset(name for name, _ in module.named_parameters())


class Adapter(nn.Module):
    """A residual bottleneck for outputs shaped like `like`: [b, tokens, c] or [b, c, h, w]."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        channels = like.shape[-1] if like.dim() == 3 else like.shape[1]
        width = max(8, channels // 8)
        self.down: nn.Module
        self.up: nn.Module
        if like.dim() == 3:
            self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        else:
            self.down, self.up = nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = self.up(torch.relu(self.down(x)))
        return x + up


def head_names(module: nn.Module, classifier: str) -> frozenset[str]:
    """The parameter names of the classifier."""
    layer = module.get_submodule(classifier)
    return frozenset(f"{classifier}.{name}" for name, _ in layer.named_parameters())


def is_norm(layer: nn.Module) -> bool:
    """Whether the layer is a normalisation, also one of a library's own, with an activation in it.

    A layer around a normalisation and a convolution, which may be called after both, is none.
    """
    inside = [weight for child in layer.children() for weight in child.parameters()]
    return "Norm" in type(layer).__name__ and not inside


def blocks(module: nn.Module) -> list[str]:
    """The residual blocks or encoder layers of a network, by name, in order.

    A block is a module with layers of its own, and something to train in them, that stands in a
    sequence (nn.Sequential, nn.ModuleList), outermost first: Bottleneck, InvertedResidual,
    EncoderBlock, and whatever a user's model has in their place.
    """
    found: list[str] = []

    def visit(parent: nn.Module, path: str) -> None:
        sequence = isinstance(parent, (nn.Sequential, nn.ModuleList))
        for name, child in parent.named_children():
            inner = f"{path}.{name}" if path else name
            container = isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
            layers, weights = list(child.children()), list(child.parameters())
            if sequence and not container and layers and weights:
                found.append(inner)
            else:
                visit(child, inner)

    visit(module, "")
    return found


def last_blocks(module: nn.Module, count: int) -> list[str]:
    """The names of the last `count` blocks; raises PbcError when there are fewer."""
    names = blocks(module)
    if count > len(names):
        raise PbcError(
            f"{type(module).__name__} has {len(names)} residual blocks or encoder layers; "
            f"the strategy asks for the last {count}"
        )
    return names[-count:]


def block_outputs(module: nn.Module, names: Iterable[str], example: Tensor) -> dict[str, Tensor]:
    """Run the module once and return what each named block puts out."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        if not isinstance(output, Tensor) or output.dim() not in (3, 4):
            raise PbcError(
                f"block {name} puts out {type(output).__name__}; adapters need one tensor of "
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
