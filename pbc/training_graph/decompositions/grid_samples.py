"""Samples of maps between their pixels, of gathers alone: what every engine has, gradients too."""

from __future__ import annotations

import itertools
import math
import operator
from functools import reduce

import torch
from torch import Tensor

# The operator's numbers for how values are interpolated, and what lies outside of a map.
_BILINEAR, _NEAREST, _BICUBIC = range(3)
_ZEROS, _BORDER, _REFLECTION = range(3)


def grid_sampler(
    x: Tensor, grid: Tensor, interpolation: int, outside: int, align_corners: bool
) -> Tensor:
    """aten.grid_sampler (Jaderberg et al., NeurIPS 2015, §3.3), over any number of axes.

    x: [b, channels, *sizes]. grid: [b, *outputs, axes], from -1 to 1, the last axis of x first.
    Returns [b, channels, *outputs]. The gradients, too, are torch's: none where a coordinate was
    brought back to the border, and none through rounding.
    """
    sizes, outputs = x.shape[2:], grid.shape[1:-1]
    samples = grid.flatten(1, -2)
    axes = []
    for axis, size in enumerate(sizes):
        stride, neighbours = math.prod(sizes[axis + 1 :]), []
        at = _in_pixels(samples[:, :, -1 - axis], size, align_corners)
        for place, weight in _neighbours(at, size, interpolation, outside, align_corners):
            inside = (place >= 0) & (place < size)
            # Clamped as whole numbers, so that not even NaN leads out of the map.
            offset = place.to(torch.int64).clamp(0, size - 1) * stride
            neighbours.append((offset, torch.where(inside, weight, 0.0)))
        axes.append(neighbours)
    corners = [tuple(zip(*corner, strict=True)) for corner in itertools.product(*axes)]
    offsets = torch.stack([reduce(operator.add, offsets) for offsets, _ in corners], 1)
    weights = torch.stack([reduce(operator.mul, weights) for _, weights in corners], 1)
    index = offsets.flatten(1)[:, None].expand(-1, x.shape[1], -1)
    values = x.flatten(2).gather(2, index).unflatten(2, weights.shape[1:])
    made: Tensor = (values * weights[:, None]).sum(2).unflatten(2, outputs)
    return made


def _in_pixels(coordinate: Tensor, size: int, align_corners: bool) -> Tensor:
    """A coordinate whose ends are the centres of the outer pixels, or their outer edges."""
    if align_corners:
        return (coordinate + 1) * ((size - 1) / 2)
    return (coordinate + 1) * (size / 2) - 0.5


def _neighbours(
    at: Tensor, size: int, interpolation: int, outside: int, align_corners: bool
) -> list[tuple[Tensor, Tensor]]:
    """Pixels along an axis that count in a sample, whole numbers as floats, and their weights."""
    if interpolation != _BICUBIC:
        at = _brought_in(at, size, outside, align_corners)
    if interpolation == _NEAREST:
        nearest = at.detach().round()
        return [(nearest, torch.ones_like(nearest))]
    below = at.detach().floor()
    share = at - below
    if interpolation == _BILINEAR:
        return [(below, 1 - share), (below + 1, share)]
    cubics = (_far(1 + share), _near(share), _near(1 - share), _far(2 - share))
    return [
        (_brought_in(below + step, size, outside, align_corners), weight)
        for step, weight in enumerate(cubics, -1)
    ]


def _brought_in(at: Tensor, size: int, outside: int, align_corners: bool) -> Tensor:
    """Coordinates of pixels that lie in the map, where those outside of it are not zeros."""
    if outside == _ZEROS:
        return at
    if outside == _REFLECTION:
        at = _reflected(at, size, align_corners)
    # Not a clamp: whose gradient is one at the very border.
    return torch.where(at <= 0, 0.0, torch.where(at >= size - 1, size - 1.0, at))


def _reflected(at: Tensor, size: int, align_corners: bool) -> Tensor:
    """Coordinates reflected at the centres of the outer pixels, or at their outer edges."""
    edge, period = (0.0, 2.0 * size - 2) if align_corners else (0.5, 2.0 * size)
    if not period:
        return torch.zeros_like(at)
    away = at + edge
    away = torch.where(away < 0, -away, away)
    away = away - (away / period).detach().floor() * period
    return torch.where(away > period - away, period - away, away) - edge


def _near(distance: Tensor) -> Tensor:
    """The weight of a pixel less than one away (Keys, IEEE TASSP 1981, with a = -0.75)."""
    return (1.25 * distance - 2.25) * distance * distance + 1


def _far(distance: Tensor) -> Tensor:
    """The weight of a pixel from one to two away."""
    return ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
