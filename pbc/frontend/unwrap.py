"""Unwrapping: the network inside what training loops put around it, and the tensors it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.hooks import RemovableHandle

from pbc.errors import PbcError

# Attributes under which wrappers of torch hold what they wrap.
_HELD = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "AveragedModel": "module",
}
# Where a tensor lies in what a network returns; in structures of structures, from the outside in.
Key = str | int | tuple[str | int, ...]

# What networks call their outputs, best first.
_OUTPUTS = ("logits", "pooler_output", "last_hidden_state")


def unwrapped(module: nn.Module, name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the network that is to be captured, and notes of what was taken off.

    Wrappers of torch go, also those inside; torch.compile in place is undone; so does a module
    without a forward of its own that holds one network. Raises PbcError for a scripted or traced
    module, whose Python code is gone, and for a quantised one, whose weights are.
    """
    taken: list[str] = []
    for path, inner in module.named_modules():
        place = f", its {path}," if path else ""
        if isinstance(inner, torch.jit.ScriptModule):
            raise PbcError(
                f"{name}{place} is a scripted or traced module (torch.jit), which cannot be "
                "captured; return the nn.Module that it was made of"
            )
        if _is_quantized(inner):
            raise PbcError(
                f"{name}{place} is a quantized {type(inner).__name__}: what it was rounded from "
                "is gone; return the network as it was before, in float32"
            )
    module = _without_wrapper(module, taken)
    for owner in list(module.modules()):
        for child_name, child in list(owner.named_children()):
            held = _without_wrapper(child, taken)
            if held is not child:
                setattr(owner, child_name, held)
    for inner in module.modules():
        if inner._compiled_call_impl is not None:
            inner._compiled_call_impl = None
            taken.append("torch.compile")
    return module, tuple(f"{kind} around {name} was taken off" for kind in dict.fromkeys(taken))


def _is_quantized(module: nn.Module) -> bool:
    """Whether a layer computes with packed integers, or has tensors of them.

    Those for training that is aware of rounding, and torch's reference layers, are float32 still.
    """
    words = type(module).__module__.split(".")
    if words[0] == "torch" and "quantized" in words and "reference" not in words:
        return True
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and tensor.is_quantized for tensor in tensors)


def _without_wrapper(module: nn.Module, taken: list[str]) -> nn.Module:
    while True:
        kind = type(module)
        held = getattr(module, _HELD.get(kind.__name__, ""), None)
        if held is None and kind.forward is nn.Module.forward and "forward" not in vars(module):
            weighted = [c for c in module.children() if next(c.parameters(), None) is not None]
            held = weighted[0] if len(weighted) == 1 and not _is_list(module) else None
        if not isinstance(held, nn.Module):
            return module
        taken.append(kind.__name__)
        module = held


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def is_lazy(module: nn.Module) -> bool:
    """Whether a module gets its sizes from its first input."""
    return any(isinstance(inner, LazyModuleMixin) for inner in module.modules())


def outputs(output: Any) -> dict[Key, Tensor]:
    """Return the tensors of a structure that a network returned, by key, attribute or index.

    Those of a structure in it by all of these, from the outside in. Where one of them is what
    networks call their scores, it alone.
    """
    tensors: dict[Key, Tensor] = {}
    for key, value in _items(output).items():
        if isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, (Mapping, tuple, list)) or dataclasses.is_dataclass(value):
            for inner, tensor in outputs(value).items():
                path = inner if isinstance(inner, tuple) else (inner,)
                place = (key, *path)
                tensors[place] = tensor
    best = [key for key in _OUTPUTS if key in tensors]
    return {best[0]: tensors[best[0]]} if best else tensors


def _items(structure: Any) -> dict[str | int, Any]:
    if isinstance(structure, Mapping):
        return dict(structure)
    if isinstance(structure, (tuple, list)):
        names = getattr(structure, "_fields", range(len(structure)))
        return dict(zip(names, structure, strict=True))
    if dataclasses.is_dataclass(structure):  # with slots it has no __dict__
        return {f.name: getattr(structure, f.name) for f in dataclasses.fields(structure)}
    return dict(getattr(structure, "__dict__", {}))


def take(module: nn.Module, key: Key) -> RemovableHandle:
    """Let a network that returns a structure return this tensor of it, in place."""
    return module.register_forward_hook(partial(_item, key if isinstance(key, tuple) else (key,)))


def flatten(module: nn.Module) -> None:
    """Let a network that returns [batch, classes, 1, 1] return [batch, classes], in place."""
    module.register_forward_hook(lambda owner, inputs, output: output.flatten(1))


def _item(path: tuple[str | int, ...], owner: nn.Module, inputs: Any, output: Any) -> Any:
    for key in path:
        named = isinstance(key, str) and not isinstance(output, Mapping)
        output = getattr(output, str(key)) if named else output[key]
    return output
