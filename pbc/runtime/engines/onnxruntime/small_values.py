"""Values of small constants that shapes are computed from, such as a size doubled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np

from pbc.runtime.engines.onnxruntime.declared import MOST_KNOWN, Shape
from pbc.runtime.engines.onnxruntime.sizes import Call
from pbc.runtime.engines.onnxruntime.wire import DATA_TYPES

_DTYPES = {code: np.dtype(name) for name, code in DATA_TYPES.items()}
_BINARY: Mapping[str, Callable[[Any, Any], Any]] = MappingProxyType(
    {
        "Add": np.add, "And": np.logical_and, "Equal": np.equal, "Greater": np.greater,
        "GreaterOrEqual": np.greater_equal, "Less": np.less, "LessOrEqual": np.less_equal,
        "Max": np.maximum, "Min": np.minimum, "Mul": np.multiply, "Or": np.logical_or,
        "Sub": np.subtract,
    }
)  # fmt: skip
_UNARY: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "Abs": np.abs, "Ceil": np.ceil, "Floor": np.floor, "Identity": np.asarray,
        "Neg": np.negative, "Not": np.logical_not, "Round": np.round, "Sqrt": np.sqrt,
    }
)  # fmt: skip
_REDUCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"ReduceMax": np.max, "ReduceMin": np.min, "ReduceProd": np.prod, "ReduceSum": np.sum}
)
_SHAPED = ("Expand", "Flatten", "Reshape", "Squeeze", "Tile", "Unsqueeze")


def constant(attributes: Mapping[str, Any]) -> np.ndarray:
    """Return what a Constant is; raises ValueError for one that is no tensor of numbers."""
    for name, dtype in (("value", None), ("value_int", np.int64), ("value_ints", np.int64),
                        ("value_float", np.float32), ("value_floats", np.float32)):  # fmt: skip
        if attributes.get(name) is not None:
            return np.asarray(attributes[name], dtype)
    raise ValueError("a constant without a value")


def value(op: str, call: Call, shape: Shape) -> np.ndarray | None:
    """Return the result of an operator of this shape, where its inputs and it are small."""
    if op == "Shape":
        start = call.attributes.get("start", 0)
        return np.array(call.shape(0)[start : call.attributes.get("end")], np.int64)
    if op == "Size":
        return np.array(prod(call.shape(0)), np.int64)
    given = [known for known in call.values if known is not None]
    if len(given) < len(call.values) or not given or prod(shape) > MOST_KNOWN:
        return None
    with np.errstate(all="ignore"):
        result = _computed(op, call, given, shape)
    return None if result is None else np.asarray(result)


def _computed(op: str, call: Call, given: list[np.ndarray], shape: Shape) -> Any:
    first, axis = given[0], call.attributes.get("axis", 0)
    if op in _UNARY:
        return _UNARY[op](first)
    if op in _BINARY and len(given) == 2:
        return _BINARY[op](*given)
    if op in ("Div", "Mod") and len(given) == 2 and np.all(given[1] != 0):
        whole = first.dtype.kind in "iu"
        if op == "Mod":
            return (np.fmod if call.attributes.get("fmod") else np.mod)(*given)
        return np.fix(first / given[1]).astype(first.dtype) if whole else first / given[1]
    if op in _REDUCTIONS:
        axes = tuple(call.attributes.get("axes") or (given[1].ravel() if given[1:] else ())) or None
        kept = bool(call.attributes.get("keepdims", 1))
        return np.asarray(_REDUCTIONS[op](first, axis=axes, keepdims=kept), first.dtype)
    if op in _SHAPED:
        if op == "Tile":
            return np.tile(first, given[1])
        return np.broadcast_to(first, shape) if op == "Expand" else first.reshape(shape)
    if op == "Cast":
        return first.astype(_DTYPES[call.attributes["to"]])
    if op == "Concat":
        return np.concatenate(given, axis)
    if op == "ConstantOfShape":
        filling = call.attributes.get("value", np.zeros(1, np.float32))
        return np.full(shape, np.asarray(filling).ravel()[0])
    if op == "Gather":
        return np.take(first, given[1], axis)
    if op == "Range":
        return np.arange(*(limit.item() for limit in given)).astype(first.dtype)
    if op == "Slice":
        return _sliced(given)
    if op == "Where":
        return np.where(*given)
    return None


def _sliced(given: list[np.ndarray]) -> np.ndarray:
    data, starts, ends = given[0], given[1].ravel(), given[2].ravel()
    axes = given[3].ravel() if len(given) > 3 else np.arange(len(starts))
    steps = given[4].ravel() if len(given) > 4 else np.ones(len(starts), np.int64)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        kept = range(*slice(int(start), int(end), int(step)).indices(data.shape[axis]))
        data = np.take(data, list(kept), axis)
    return data
