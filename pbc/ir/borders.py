"""Borders around tensors, made of their own rows: gradients of slices are what every engine has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_SOURCES: dict[str, Callable[[int, int], int]] = {
    "circular": lambda row, rows: row % rows,
    "reflect": lambda row, rows: rows - 1 - abs(rows - 1 - abs(row)),
    "replicate": lambda row, rows: min(max(row, 0), rows - 1),
}


def bordered(x: Tensor, sizes: Sequence[int], mode: str) -> Tensor:
    """Put a border around the last axes, of the rows that `mode` names.

    sizes: before and after the last axis, the one before it, …, as in torch.nn.functional.pad.
    """
    source = _SOURCES[mode]
    for number in range(len(sizes) // 2):
        axis, (before, after) = -1 - number, sizes[2 * number : 2 * number + 2]
        rows = x.shape[axis]
        kept = x.narrow(axis, max(0, -before), rows - max(0, -before) - max(0, -after))
        new = [
            [x.narrow(axis, source(row, rows), 1) for row in border]
            for border in (range(-before, 0), range(rows, rows + after))
        ]
        if before or after:
            x = torch.cat([*new[0], kept, *new[1]], axis)
    return x


def pad(x: Tensor, sizes: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """aten.pad."""
    if mode == "constant":
        return aten.constant_pad_nd.default(x, sizes, value or 0.0)
    return bordered(x, sizes, mode)


def _reflected(x: Tensor, sizes: Sequence[int]) -> Tensor:
    return bordered(x, sizes, "reflect")


def _replicated(x: Tensor, sizes: Sequence[int]) -> Tensor:
    return bordered(x, sizes, "replicate")


TABLE: dict[Any, Callable[..., Any]] = {
    aten.pad.default: pad,
    aten.reflection_pad1d.default: _reflected,
    aten.reflection_pad2d.default: _reflected,
    aten.reflection_pad3d.default: _reflected,
    aten.replication_pad1d.default: _replicated,
    aten.replication_pad2d.default: _replicated,
    aten.replication_pad3d.default: _replicated,
}
"""By operator, a function of the same arguments."""
