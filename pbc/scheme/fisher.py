"""A Fisher score of each choice: one backward a photo instead of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from pbc.scheme.layers import Layer
from pbc.scheme.sparse import SelectedChannels
from pbc.scheme.subject import Subject

PHOTOS = 64


def fisher(
    subject: Subject, start: Mapping[str, Tensor], layers: Sequence[Layer]
) -> tuple[dict[str, dict[Fraction, float]], dict[int, float]]:
    """Return by layer and share, and by number of last layers' biases, what Fisher's diagonal is.

    The mean over photos of the squared gradients, summed over what would train (Sung, Nair and
    Raffel, Training Neural Networks with Fixed Sparse Masks, NeurIPS 2021, section 3.1, of labels
    that are there). It ranks what the loss is sensitive to, and is no accuracy.

    start: the head's values. layers: in the order in which they run.
    """
    weights = {layer.name: f"{layer.name}.weight" for layer in layers}
    shifts = [layer.bias for layer in layers if layer.bias is not None]
    candidate = subject.candidate([*weights.values(), *shifts])
    theta = {name: start.get(name, value) for name, value in candidate.theta.items()}
    photos = torch.linspace(0, len(subject.train) - 1, min(PHOTOS, len(subject.train))).round()
    squares = {name: torch.zeros_like(value) for name, value in theta.items()}
    for photo in photos.int().tolist():
        for name, gradient in candidate.gradients(theta, photo).items():
            squares[name] += gradient.square() / len(photos)
    by_layer: dict[str, dict[Fraction, float]] = {}
    for layer in layers:
        found = squares[weights[layer.name]]
        if layer.axis is None:
            by_layer[layer.name] = {share: float(found.sum()) for share in layer.fractions}
            continue
        channels = found.transpose(0, layer.axis).flatten(1).sum(1)
        by_layer[layer.name] = {
            share: float(
                channels[
                    SelectedChannels(layer.module.weight, layer.axis, layer.count(share)).index
                ].sum()
            )
            for share in layer.fractions
        }
    biases: dict[int, float] = {}
    total = 0.0
    for count, layer in enumerate(reversed(layers), 1):
        total += 0.0 if layer.bias is None else float(squares[layer.bias].sum())
        biases[count] = total
    return by_layer, biases
