"""Networks whose gradient can be differentiated: the bundle's own, and the controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from pbc.audit.pixel_tables import CONVNET, LENET
from pbc.audit.pixels.attacks import Gradient
from pbc.bundle import Bundle
from pbc.frontend import original

CONTROL_PIXELS = 32


class _Hardsigmoid(nn.Module):
    """torch's hard sigmoid has no second derivative; the same function from others has one."""

    def forward(self, x: Tensor) -> Tensor:
        return (x / 6 + 0.5).clamp(0, 1)


def of_bundle(
    bundle: Bundle, weights: Path | None, theta: dict[str, np.ndarray], bias: str | None
) -> Gradient:
    """Return the gradient of θ, in the order of its names, of the bundle's own network.

    weights: what the bundle was compiled from, if it moved. bias: the head's, if it has one.
    Raises PbcError where the network cannot be rebuilt.
    """
    network = original.module(bundle, weights, theta).eval()
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Hardsigmoid):
                setattr(module, name, _Hardsigmoid())
            elif getattr(child, "inplace", False):
                child.inplace = False  # type: ignore[assignment]
    return _gradient(network, sorted(theta), bias)


def lenet(channels: int, classes: int, seed: int) -> Gradient:
    """Return the gradient of all of DLG's LeNet: an attack that fails on it fails by itself."""
    network = _convolutions(channels, 12, (2, 2, 1), nn.Sigmoid, classes, seed)
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return _all(network)


def convnet(channels: int, classes: int, seed: int) -> Gradient:
    """Return the gradient of all of a wider network of ReLUs, for attacks by signs of steps.

    Geiping et al. attack a ConvNet of 64 channels. On LeNet's few and flat sigmoids such steps end
    far from the photo, though the directions agree.
    """
    return _all(_convolutions(channels, 64, (1, 2, 2), nn.ReLU, classes, seed))


CONTROLS = {LENET: lenet, CONVNET: convnet}


def _convolutions(
    channels: int,
    width: int,
    strides: Sequence[int],
    activation: Callable[[], nn.Module],
    classes: int,
    seed: int,
) -> nn.Sequential:
    torch.manual_seed(seed)
    network, pixels = nn.Sequential(), CONTROL_PIXELS
    for index, stride in enumerate(strides):
        network.add_module(f"conv{index}", nn.Conv2d(channels, width, 5, stride, padding=2))
        network.add_module(f"activation{index}", activation())
        channels, pixels = width, pixels // stride
    network.add_module("flat", nn.Flatten())
    network.add_module("head", nn.Linear(width * pixels**2, classes))
    return network


def _all(network: nn.Module) -> Gradient:
    names = sorted(name for name, _ in network.named_parameters())
    return _gradient(network, names, "head.bias")


@dataclass(frozen=True)
class _Gradient:
    network: nn.Module
    theta: list[Tensor]
    bias: slice | None

    def __call__(self, images: Tensor, shares: Tensor) -> Tensor:
        loss = -(shares * log_softmax(self.network(images), 1)).sum(1).mean()
        parts = torch.autograd.grad(loss, self.theta, create_graph=True)
        return torch.cat([part.reshape(-1) for part in parts])


def _gradient(network: nn.Module, names: list[str], bias: str | None) -> Gradient:
    by_name = dict(network.named_parameters())
    for parameter in by_name.values():
        parameter.requires_grad_(False)
    theta = [by_name[name].requires_grad_() for name in names]
    ends = np.cumsum([parameter.numel() for parameter in theta]).tolist()
    where = dict(zip(names, zip([0, *ends], ends, strict=False), strict=True))
    return _Gradient(network, theta, slice(*where[bias]) if bias is not None else None)
