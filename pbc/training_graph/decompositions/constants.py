"""The tensors that no step changes, known to decompositions while a gradient is traced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

# By their identities; engines work their constants up ahead of time.
_frozen: ContextVar[frozenset[int]] = ContextVar("pbc_frozen", default=frozenset())


@contextmanager
def frozen(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let decompositions inside the block prefer what is fast for these constants."""
    token = _frozen.set(frozenset(id(tensor) for tensor in tensors))
    try:
        yield
    finally:
        _frozen.reset(token)


def is_frozen(tensor: Tensor) -> bool:
    """Return whether this very tensor is one of the block's constants."""
    return id(tensor) in _frozen.get()
