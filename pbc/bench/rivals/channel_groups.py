"""Channels of an eager network that go together, and their removal (by Torch-Pruning).

A group is what a dimension variable of pbc.ir.dims is to a captured graph: the outputs of layers
that are added to each other, and the inputs of all that read them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_pruning import DependencyGraph

Removal = Mapping[str, Tensor]
"""Channels that go, int64, by the name of one layer that puts them out."""

_LAYERS = (nn.Conv2d, nn.Linear)
_SMOOTHING = 1e-8


@dataclass(frozen=True)
class Channels:
    """A network's channels; inputs of its first layers and outputs of its head are none.

    head: names of the head's parameters. example: float32 [1, channels, height, width].
    """

    module: nn.Module
    head: frozenset[str]
    example: Tensor

    def norms(self) -> Tensor:
        """Sum of the norms of each layer's output channels and input channels (group lasso).

        Depthwise and other grouped layers have no part in it. A norm is √(Σw² + 1e-8), as in the
        published code: below 1e-4 its gradient falls with the weights, so that a channel that is
        not needed goes to zero, and does not hover about it by a step's length.
        """
        total = torch.zeros(())
        for name, layer in _dense(self.module):
            weight = layer.weight
            if f"{name}.weight" not in self.head:
                total = total + _norms(weight).sum()
            if weight.shape[1] != self.example.shape[1]:
                total = total + _norms(weight.transpose(0, 1)).sum()
        return total

    def below(self, threshold: float) -> Removal:
        """Return the channels whose largest weight is below a threshold in all of their layers.

        One channel of each group stays, whatever its weights.
        """
        graph, names = self._graph(), {layer: name for name, layer in self.module.named_modules()}
        found: dict[str, Tensor] = {}
        heads = [layer for name, layer in _dense(self.module) if f"{name}.weight" in self.head]
        for group in graph.get_all_groups(ignored_layers=heads, root_module_types=list(_LAYERS)):
            root = group[0].dep.target.module
            largest = torch.zeros(max(group[0].root_idxs) + 1)
            for item in group:
                layer = item.dep.target.module
                if not isinstance(layer, _LAYERS) or getattr(layer, "groups", 1) > 1:
                    continue
                axis = 0 if graph.is_out_channel_pruning_fn(item.dep.handler) else 1
                sizes = layer.weight.detach().abs().transpose(0, axis).flatten(1).amax(1)
                members = torch.tensor(item.root_idxs)
                largest.scatter_reduce_(0, members, sizes[torch.tensor(item.idxs)], "amax")
            dead = largest < threshold
            dead[largest.argmax()] = False
            if dead.any():
                found[names[root]] = dead.nonzero().flatten()
        return found

    def remove(self, removal: Removal) -> None:
        """Remove channels from every layer of their groups, in place: parameters are other ones."""
        graph = self._graph()
        for name, channels in removal.items():
            layer = self.module.get_submodule(name)
            prune = graph.get_pruner_of_module(layer).prune_out_channels
            graph.get_pruning_group(layer, prune, channels.tolist()).prune()
        for parameter in self.module.parameters():
            parameter.grad = None

    def removed_from(self, values: Mapping[str, Tensor], removal: Removal) -> dict[str, Tensor]:
        """Return values like the parameters, such as their momentum, without these channels."""
        shadow = copy.deepcopy(self.module)
        with torch.no_grad():
            for name, parameter in shadow.named_parameters():
                parameter.copy_(values[name])
        Channels(shadow, self.head, self.example).remove(removal)
        return {name: value.detach().clone() for name, value in shadow.named_parameters()}

    def count(self) -> int:
        """Return how many channels the layers put out that are not the head's."""
        dense = _dense(self.module)
        return sum(len(la.weight) for name, la in dense if f"{name}.weight" not in self.head)

    def _graph(self) -> DependencyGraph:
        return DependencyGraph().build_dependency(self.module, self.example)


def _norms(channels: Tensor) -> Tensor:
    return (channels.flatten(1).square().sum(1) + _SMOOTHING).sqrt()


def _dense(module: nn.Module) -> Iterable[tuple[str, nn.Conv2d | nn.Linear]]:
    """Layers of which every output reads every input."""
    for name, layer in module.named_modules():
        if isinstance(layer, _LAYERS) and getattr(layer, "groups", 1) == 1:
            yield name, layer
