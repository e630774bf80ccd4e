"""An open batch: functions that would fix the number of images are written as others, or named."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class OpenBatch(TorchFunctionMode):
    """Keeps the batch of an export a symbol.

    torch composes a few functions of others by sizes as numbers: those of `_OPEN` are called in
    their place. Where whatever else makes a number of the symbol, raises ValueError.
    """

    def __init__(self) -> None:
        super().__init__()
        self._batch: torch.SymInt | None = None
        self._told = False  # what runs on the way out of an error raises no other

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = _OPEN.get(func, func)(*args, **(kwargs or {}))
        if self._batch is None:
            sizes = map(_open_size, tree_leaves((args, result)))
            self._batch = next((size for size in sizes if size is not None), None)
        elif not self._told and (self._is_fixed() or _is_length(func, result)):
            self._told = True
            raise ValueError(
                "its forward is made for one number of images, where a network has to take any: "
                "len(x), int(x.shape[0]) or a loop over images makes it so; x.shape[0] and what "
                "torch does to all images at once do not"
            )
        return result

    def _is_fixed(self) -> bool:
        return self._batch is not None and self._batch.node.maybe_as_int() is not None


def _is_length(func: Callable[..., Any], result: object) -> bool:
    """Whether Python is about to make a number of an open size, for `len`."""
    return func is Tensor.__len__ and isinstance(result, torch.SymInt)


def _open_size(value: object) -> torch.SymInt | None:
    """The first size of a tensor that is open."""
    sizes: Iterable[Any] = value.shape if isinstance(value, Tensor) else ()
    return next((size for size in sizes if isinstance(size, torch.SymInt)), None)


def _kron(input: Tensor, other: Tensor) -> Tensor:
    """torch.kron: each value of a tensor times the whole of the other."""
    rank = max(input.dim(), other.dim())
    one, two = (value[(None,) * (rank - value.dim())] for value in (input, other))
    sizes = [a * b for a, b in zip(one.shape, two.shape, strict=True)]
    for axis in range(rank):
        one, two = one.unsqueeze(2 * axis + 1), two.unsqueeze(2 * axis)
    return (one * two).reshape(sizes)


def _take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """torch.take_along_dim: a gather whose other axes are broadcast."""
    if dim is None:
        return input.flatten().gather(0, indices.flatten())
    dim %= input.dim()
    sizes = [
        here if there == 1 else there
        for here, there in zip(input.shape, indices.shape, strict=True)
    ]
    of_input, of_indices = (
        value.expand([-1 if axis == dim else size for axis, size in enumerate(sizes)])
        for value in (input, indices)
    )
    return of_input.gather(dim, of_indices)


def _product(*matrices: Tensor) -> Tensor:
    """torch.chain_matmul, from the left."""
    return functools.reduce(torch.matmul, matrices)


def _multi_dot(tensors: Sequence[Tensor]) -> Tensor:
    """torch.linalg.multi_dot, from the left."""
    return _product(*tensors)


_OPEN: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.chain_matmul: _product,
    torch.kron: _kron,
    torch.linalg.multi_dot: _multi_dot,
    torch.take_along_dim: _take_along_dim,
    Tensor.kron: _kron,
    Tensor.take_along_dim: _take_along_dim,
}
"""By function, one of the same arguments."""
