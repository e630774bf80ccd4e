"""What a graph would take: its calls run once on tensors without memory, before any real run.

On torch's meta device each call gives the shape of its result and nothing else, so that sizes,
work, and calls that do not fit together are known before memory is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pbc.runtime.engines.bounds import TOUCH, Calls

_POOLS = ("aten::avg_pool", "aten::max_pool")
_DISTANCES = ("aten::_cdist_forward", "aten::_pdist_forward")
_META = torch.device("meta")


def without_memory(value: Tensor) -> Tensor:
    """Return a tensor of the same shape, strides and type that has no values."""
    found = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
    return found.requires_grad_(value.requires_grad)


def of_photos(value: Tensor, photos: int) -> Tensor:
    """Return `without_memory` of a batch, with so many photos on its first axis."""
    return torch.empty((photos, *value.shape[1:]), dtype=value.dtype, device=_META)


def of_shape(shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of reals that has no values."""
    return torch.empty(shape, dtype=torch.float32, device=_META)


class Memory:
    """All memory that values share, and what a backward would read."""

    def __init__(self, uncounted: Iterable[Any]) -> None:
        """Take values whose memory does not count, such as frozen tensors."""
        self._uncounted = _storages(uncounted)
        self._saved: dict[int, UntypedStorage] = {}

    def save(self, value: Tensor) -> Tensor:
        """Count a tensor from now on: a backward reads it."""
        self._saved.update(_storages([value]))
        return value

    def bytes_with(self, values: Iterable[Any]) -> int:
        """Return what these values and all that is saved take."""
        counted = {**self._saved, **_storages(values)}
        return sum(s.nbytes() for at, s in counted.items() if at not in self._uncounted)


class Bounded(TorchDispatchMode):
    """Inside, calls of torch on the meta device are counted; a graph's `where` names them."""

    def __init__(self, graph: str, calls: Calls) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where = graph
        self._graph = graph
        self._calls = calls
        self._work = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a call without memory, its parts one by one, and count what it would take."""
        keywords = dict(kwargs or {})
        packet = function._overloadpacket
        if packet not in flop_registry:
            with self:
                result = function.decompose(*args, **keywords)
            if result is not NotImplemented:
                return result
        if any(argument.name == "device" for argument in function._schema.arguments):
            keywords["device"] = _META
        result = self._result(function, args, keywords)
        self._count(packet, args, keywords, result)
        self._calls.check_bytes(Memory(()).bytes_with([result]), self.where)
        return result

    def _result(self, function: Any, args: Any, keywords: Mapping[str, Any]) -> Any:
        """Run on the meta device; where a size depends on values, as if all of them counted."""
        name = function._schema.name
        if name == "aten::nonzero":
            return torch.empty((args[0].numel(), args[0].dim()), dtype=torch.int64, device=_META)
        if name == "aten::index":
            return function(args[0], [place for index in args[1] for place in _places(index)])
        return function(*args, **keywords)

    def _count(self, packet: Any, args: Any, keywords: Mapping[str, Any], result: Any) -> None:
        name = packet._qualified_op_name
        made = sum(tensor.numel() for tensor in _tensors([result]))
        read = sum(tensor.numel() for tensor in _tensors(args))
        self._work += TOUCH * (made + read)
        if packet in flop_registry:
            self._work += flop_registry[packet](*args, **keywords, out_val=result) // 2
        elif name.startswith(_POOLS):
            kernel, axes = args[1], args[0].dim() - 2
            self._work += made * (math.prod(kernel) if len(kernel) > 1 else kernel[0] ** axes)
        elif name in _DISTANCES:
            self._work += made * args[0].shape[-1]
        self._calls.check_work(self._work, self._graph)


def _places(index: Tensor | None) -> list[Tensor | None]:
    """Return what indexes like a mask that picks everything: a position for each of its axes."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    positions = torch.empty(index.numel(), dtype=torch.int64, device=_META)
    return [positions] * index.dim()


def _storages(values: Iterable[Any]) -> dict[int, UntypedStorage]:
    """Return the memory of all tensors among these, each once."""
    found = (tensor.untyped_storage() for tensor in _tensors(values))
    return {storage._cdata: storage for storage in found}


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
