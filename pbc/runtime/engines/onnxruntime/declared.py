"""An ONNX graph as data: operators in order, the shapes of constants, and the values of small ones.

It is read without the onnx package. What is not needed to foresee sizes is left out.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np

from pbc.runtime.engines.onnxruntime.wire import DATA_TYPES, parts

Shape: TypeAlias = tuple[int, ...]

MOST_KNOWN = 4096
"""Values of a constant that sizes may depend on; those of larger ones are not kept."""

_BYTES = memoryview
_DTYPES = {code: np.dtype(name) for name, code in DATA_TYPES.items()}
_DOMAINS = ("", "ai.onnx")
_EXTERNAL = 14
# The fields of a tensor that hold its values, with the type that they are written in.
_PACKED: Mapping[int, str] = {4: "<f4", 10: "<f8"}
_NUMBERS = (5, 7, 11)
_RAW = 9


@dataclass(frozen=True)
class Node:
    """One operator. attributes: numbers, texts, lists of numbers, and small tensors as arrays."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class DeclaredGraph:
    """Operators in order. inputs: sizes, None where one is left open."""

    nodes: tuple[Node, ...]
    inputs: Mapping[str, tuple[int | None, ...]]
    outputs: tuple[str, ...]
    shapes: Mapping[str, Shape]
    values: Mapping[str, np.ndarray]


def parse(model: bytes) -> DeclaredGraph:
    """Read a model; raises ValueError for one that is none, and for graphs within its operators."""
    nodes: list[Node] = []
    inputs: dict[str, tuple[int | None, ...]] = {}
    outputs: list[str] = []
    shapes: dict[str, Shape] = {}
    values: dict[str, np.ndarray] = {}
    for number, graph in parts(memoryview(model)):
        if number == 25:
            raise ValueError("it has functions of its own")
        if number != 7 or not isinstance(graph, _BYTES):
            continue
        for field, message in parts(graph):
            if not isinstance(message, _BYTES):
                continue
            if field == 1:
                nodes.append(_node(message))
            elif field == 5:
                name, shape, value = _tensor(message)
                shapes[name] = shape
                if value is not None:
                    values[name] = value
            elif field == 11:
                name, sizes = _value_info(message)
                inputs[name] = sizes
            elif field == 12:
                outputs.append(_value_info(message)[0])
            elif field == 15:
                raise ValueError("it has sparse tensors")
    given = {name: sizes for name, sizes in inputs.items() if name not in shapes}
    return DeclaredGraph(tuple(nodes), given, tuple(outputs), shapes, values)


def _node(message: memoryview) -> Node:
    op, inputs, outputs, attributes = "", [], [], {}
    for number, value in parts(message):
        if not isinstance(value, _BYTES):
            continue
        if number == 1:
            inputs.append(_text(value))
        elif number == 2:
            outputs.append(_text(value))
        elif number == 4:
            op = _text(value)
        elif number == 5:
            name, content = _attribute(value)
            attributes[name] = content
        elif number == 7 and _text(value) not in _DOMAINS:
            raise ValueError(f"it has an operator of {_text(value)[:40]!r}")
    return Node(op, tuple(inputs), tuple(outputs), attributes)


def _attribute(message: memoryview) -> tuple[str, Any]:
    name, value = "", None
    numbers: list[int] = []
    floats: list[float] = []
    for number, content in parts(message):
        if number == 1 and isinstance(content, _BYTES):
            name = _text(content)
        elif number == 2 and isinstance(content, _BYTES):
            (value,) = struct.unpack("<f", content)
        elif number == 3 and isinstance(content, int):
            value = _signed(content)
        elif number == 4 and isinstance(content, _BYTES):
            value = _text(content)
        elif number == 5 and isinstance(content, _BYTES):
            _, shape, value = _tensor(content)
            value = value if value is not None else np.broadcast_to(np.float32(0), shape)
        elif number in (6, 11):
            raise ValueError("it has a graph within an operator")
        elif number == 7:
            floats += _floats(content)
        elif number == 8:
            numbers += _numbers(content)
    return name, numbers or floats or value


def _tensor(message: memoryview) -> tuple[str, Shape, np.ndarray | None]:
    """Return name and shape, and the values of a small tensor that holds them itself."""
    name, code, sizes = "", 0, []
    held: Any = None
    elsewhere = False
    numbers: list[int] = []
    for number, content in parts(message):
        if number == 1:
            sizes += _numbers(content)
        elif number == 2 and isinstance(content, int):
            code = content
        elif number == 8 and isinstance(content, _BYTES):
            name = _text(content)
        elif number in _NUMBERS:
            if isinstance(content, int) or len(content) <= 10 * MOST_KNOWN:
                numbers += _numbers(content)
        elif number in (*_PACKED, _RAW) and isinstance(content, _BYTES):
            held = (_PACKED.get(number), content)
        elif number == _EXTERNAL:
            elsewhere = elsewhere or content != 0
    shape = tuple(sizes)
    if any(size < 0 for size in shape):
        raise ValueError(f"the constant {name[:40]!r} has a size below zero")
    if elsewhere or prod(shape) > MOST_KNOWN or code not in _DTYPES:
        return name, shape, None
    dtype = _DTYPES[code]
    if numbers:
        return name, shape, np.array(numbers).astype(dtype).reshape(shape)
    if held is None:
        return name, shape, np.zeros(shape, dtype) if prod(shape) == 0 else None
    written, content = held
    array = np.frombuffer(content, written or dtype.newbyteorder("<"))
    return name, shape, array.astype(dtype).reshape(shape)


def _value_info(message: memoryview) -> tuple[str, tuple[int | None, ...]]:
    name, sizes = "", []
    for number, content in parts(message):
        if number == 1 and isinstance(content, _BYTES):
            name = _text(content)
        elif number == 2 and isinstance(content, _BYTES):
            for tensor in _inner(content, 1):
                for shape in _inner(tensor, 2):
                    sizes += [_size(dimension) for dimension in _inner(shape, 1)]
    return name, tuple(sizes)


def _size(dimension: memoryview) -> int | None:
    for number, content in parts(dimension):
        if number == 1 and isinstance(content, int):
            return _signed(content)
    return None


def _inner(message: memoryview, field: int) -> list[memoryview]:
    return [value for number, value in parts(message) if number == field
            and isinstance(value, _BYTES)]  # fmt: skip


def _text(message: memoryview) -> str:
    return bytes(message).decode()


def _numbers(content: int | memoryview) -> list[int]:
    """Return whole numbers, of which one or many stand in a field."""
    if isinstance(content, int):
        return [_signed(content)]
    found, value, shift = [], 0, 0
    for byte in content:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            found.append(_signed(value))
            value = shift = 0
    return found


def _floats(content: int | memoryview) -> list[float]:
    if isinstance(content, int):
        raise ValueError("it is no ONNX model: a number is of another kind")
    return [float(value) for value in np.frombuffer(content, "<f4")]


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value
