"""A network and photos on which it is tried what training a part of it is worth."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from pbc.data import Samples
from pbc.data.held_out import default_validation, train_and_validation
from pbc.errors import PbcError
from pbc.frontend import models, start
from pbc.frontend.capture import capture
from pbc.frontend.traced_network import TracedNetwork
from pbc.ir.graph import PARAMETER, placeholders
from pbc.ir.rewrite import copy_graph, tensors_to_inputs
from pbc.ir.split import split_at_parameters
from pbc.scheme.layers import Layer, layers

Tensors = Mapping[str, Tensor]

# Features of a candidate that take more are computed anew in each epoch.
_MOST_BYTES = 1 << 30
_CALL = 64


@dataclass(frozen=True)
class Learning:
    """How a candidate learns: SGD with momentum, in the same order of photos for all of them."""

    epochs: int = 3
    learning_rate: float = 0.01
    batch: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Subject:
    """graph: the network for the classes of the photos, from images to logits, nothing marked.

    layers: those that may train, in the order in which they run. head: its parameters. train,
    held_out: the photos.
    """

    graph: GraphModule
    layers: tuple[Layer, ...]
    head: tuple[str, ...]
    train: Samples
    held_out: Samples

    @classmethod
    def open(cls, source: models.Source, data: Path | str, photos: int | None) -> Subject:
        """Read the photos, and capture the network with a new head for their classes.

        photos: how many to train on at most. Raises PbcError where none can be held out.
        """
        train, held_out = train_and_validation(data, source.input, default_validation(data))
        if held_out is None:
            raise PbcError(f"{data} has too few photos of each class to hold some out")
        if photos is not None and photos < len(train):
            train = train.subset(np.linspace(0, len(train) - 1, photos).round().astype(np.int64))
        example = torch.zeros(2, *source.input.shape)
        source = start.resized(source, len(train.classes), example)
        network = TracedNetwork.of(source.module, source.head, example)
        graph = capture(source.module, source.input.shape)
        read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
        found = tuple(layer for layer in layers(network) if f"{layer.name}.weight" in read)
        return cls(graph, found, tuple(source.head.parameters), train, held_out)

    def candidate(self, names: Collection[str]) -> Candidate:
        """Return the network with these parameters to train, and features for all else."""
        marked = copy_graph(self.graph)
        theta = tensors_to_inputs(marked, {*names, *self.head})
        prefix, body = split_at_parameters(marked, least_share=0.0)
        train, held_out = _Features(prefix, self.train), _Features(prefix, self.held_out)
        return Candidate(body, theta, train, held_out)


class _Features:
    """What a frozen prefix sends for photos; kept, where there is room, since it never changes."""

    def __init__(self, prefix: GraphModule | None, samples: Samples) -> None:
        self._prefix, self._samples = prefix, samples
        self._kept: list[Tensor] | None = None
        first = self._computed(np.arange(min(len(samples), 1)))
        if sum(value.nbytes for value in first) * len(samples) <= _MOST_BYTES:
            parts = [self._computed(rows) for rows in _calls(np.arange(len(samples)))]
            self._kept = [torch.cat(each) for each in zip(*parts, strict=True)]

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(self._samples.labels)

    def of(self, rows: np.ndarray) -> list[Tensor]:
        """f32 [rows, …], as the body takes them."""
        if self._kept is None:
            return self._computed(rows)
        return [value[torch.from_numpy(rows)] for value in self._kept]

    def _computed(self, rows: np.ndarray) -> list[Tensor]:
        images = torch.from_numpy(self._samples.images(rows)).contiguous()
        if self._prefix is None:
            return [images]
        with torch.no_grad():
            return list(self._prefix(images))


@dataclass(frozen=True)
class Candidate:
    """A body with what trains of it, and the features that never change."""

    body: GraphModule
    theta: Tensors
    train: _Features
    held_out: _Features

    def learnt(self, start: Tensors, learning: Learning, masks: Tensors) -> dict[str, Tensor]:
        """Train from the network's values, of `start` where it has others; return all of θ.

        masks: by parameter, 1 where it trains and 0 where it stays.
        """
        theta = {
            name: start.get(name, value).detach().clone().requires_grad_()
            for name, value in self.theta.items()
        }
        rule = torch.optim.SGD(list(theta.values()), learning.learning_rate, momentum=0.9)
        order = np.random.default_rng(learning.seed)
        labels = self.train.labels
        for _ in range(learning.epochs):
            rows = order.permutation(len(labels))
            for first in range(0, len(rows), learning.batch):
                chosen = rows[first : first + learning.batch]
                rule.zero_grad()
                logits = self._logits(self.train, chosen, theta)
                torch.nn.functional.cross_entropy(logits, labels[chosen]).backward()
                for name, mask in masks.items():
                    gradient = theta[name].grad
                    assert gradient is not None
                    gradient.mul_(mask)
                rule.step()
        return {name: value.detach() for name, value in theta.items()}

    def accuracy(self, theta: Tensors) -> float:
        """Per cent of the held-out photos."""
        labels, right = self.held_out.labels, 0
        with torch.no_grad():
            for rows in _calls(np.arange(len(labels))):
                logits = self._logits(self.held_out, rows, theta)
                right += int((logits.argmax(1) == labels[rows]).sum())
        return 100.0 * right / len(labels)

    def gradients(self, theta: Tensors, photo: int) -> dict[str, Tensor]:
        """Of the loss of one photo."""
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        rows = np.array([photo])
        logits = self._logits(self.train, rows, leaves)
        loss = torch.nn.functional.cross_entropy(logits, self.train.labels[rows])
        found = torch.autograd.grad(loss, list(leaves.values()))
        return dict(zip(leaves, found, strict=True))

    def _logits(self, features: _Features, rows: np.ndarray, theta: Tensors) -> Tensor:
        given = iter(features.of(rows))
        inputs = [
            theta[node.meta[PARAMETER]] if PARAMETER in node.meta else next(given)
            for node in placeholders(self.body)
        ]
        (logits,) = self.body(*inputs)
        result: Tensor = logits
        return result


def _calls(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[first : first + _CALL] for first in range(0, len(rows), _CALL))
