"""A convolution without its values: sizes and windows, over any number of spatial axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class ConvolutionLayer:
    """Shapes and windows of a convolution, as torch has them; nothing of its values."""

    x: Sequence[int]
    weight: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    @property
    def kernel(self) -> Sequence[int]:
        return self.weight[2:]

    @property
    def taps(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*(range(size) for size in self.kernel)))

    @property
    def outputs(self) -> list[int]:
        """The sizes of the result's spatial axes."""
        return [
            (size + 2 * p - d * (k - 1) - 1) // step + 1
            for size, p, d, k, step in zip(
                self.x[2:], self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        ]

    def seen(self, x: Tensor, tap: Sequence[int], outputs: Sequence[int]) -> Tensor:
        """Return what one tap of the kernel multiplies at every output position; x is padded."""
        for axis, (index, size) in enumerate(zip(tap, outputs, strict=True)):
            start, step = index * self.dilation[axis], self.stride[axis]
            if (start, step) != (0, 1) or size != x.shape[2 + axis]:
                stop = start + (size - 1) * step + 1
                x = aten.slice.Tensor(x, 2 + axis, start, stop, step)
        return x

    def padded(self, x: Tensor) -> Tensor:
        """Return x with the layer's own padding."""
        return pad(x, [(p, p) for p in self.padding])


def pad(x: Tensor, margins: Sequence[tuple[int, int]]) -> Tensor:
    """Add zeros before and after each spatial axis."""
    if not any(any(margin) for margin in margins):
        return x
    flat = [size for margin in reversed(margins) for size in margin]
    padded: Tensor = aten.constant_pad_nd.default(x, flat, 0.0)
    return padded


def spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Put stride - 1 zeros between neighbours."""
    for axis, step in enumerate(stride, 2):
        if step > 1:
            shape = list(x.shape)
            # A padding begins with the last axis: none for those behind the one that is inserted.
            behind = [0, 0] * (x.dim() - 1 - axis)
            wide = aten.constant_pad_nd.default(x.unsqueeze(axis + 1), [*behind, 0, step - 1], 0.0)
            shape[axis] = shape[axis] * step
            x = aten.slice.Tensor(wide.reshape(shape), axis, 0, shape[axis] - step + 1)
    return x


def inner(x: Tensor, margins: Sequence[int], size: Sequence[int]) -> Tensor:
    for axis, (margin, length) in enumerate(zip(margins, size, strict=True), 2):
        if margin or x.shape[axis] != length:
            x = aten.slice.Tensor(x, axis, margin, margin + length)
    return x


def pair(value: Sequence[int]) -> tuple[int, int]:
    first, second = value if len(value) == 2 else (value[0], value[0])
    return first, second


def connections(layer: ConvolutionLayer, outputs: Sequence[int]) -> Tensor:
    """Return f32 [taps, inputs x outputs]: 1 where a tap connects the two."""
    size = layer.x[2:]
    table = [[0.0] * (math.prod(size) * math.prod(outputs)) for _ in layer.taps]
    for row, tap in zip(table, layer.taps, strict=True):
        for number, output in enumerate(itertools.product(*(range(count) for count in outputs))):
            at = [
                o * step + t * d - p
                for o, step, t, d, p in zip(
                    output, layer.stride, tap, layer.dilation, layer.padding, strict=True
                )
            ]
            if all(0 <= a < s for a, s in zip(at, size, strict=True)):
                place = 0
                for a, s in zip(at, size, strict=True):
                    place = place * s + a
                row[place * math.prod(outputs) + number] = 1.0
    return torch.tensor(table, device="cpu")
