"""Where an ONNX model says that its tensors lie, checked before onnxruntime reads it.

A tensor may name any file, and a place in it. A bundle's may name the files of weights that its
manifest gives the graph, by their plain names, and only as initializers of a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

# The field numbers of onnx.proto, by message: where messages with tensors are inside.
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR = "model", "graph", "node", "attribute", "tensor"
_SPARSE, _FUNCTION, _FOREIGN = "sparse tensor", "function", "foreign tensor"
_INSIDE: Mapping[str, Mapping[int, str]] = {
    _MODEL: {7: _GRAPH, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _FUNCTION: {7: _NODE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _FOREIGN, 6: _GRAPH, 10: _FOREIGN, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _FOREIGN, 2: _FOREIGN},
}
_MODEL_TRAINING = 20
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_KEYS = {"location", "offset", "length", "checksum"}
_MOST_DEPTH = 32
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


def check_external(model: bytes, sizes: Mapping[str, int]) -> None:
    """Refuse a model whose tensors lie elsewhere than in these files, by their sizes in bytes.

    Raises ValueError, also for what is no ONNX model.
    """
    _check(memoryview(model), _MODEL, sizes, 0)


def _check(message: memoryview, kind: str, sizes: Mapping[str, int], depth: int) -> None:
    if depth > _MOST_DEPTH:
        raise ValueError("its graphs are nested too deep")
    if kind in (_TENSOR, _FOREIGN):
        _check_tensor(message, kind, sizes)
        return
    for number, value in _fields(message):
        if kind == _MODEL and number == _MODEL_TRAINING:
            raise ValueError("it holds training information, which nothing here reads")
        inner = _INSIDE[kind].get(number)
        if inner is not None and isinstance(value, memoryview):
            _check(value, inner, sizes, depth + 1)


def _check_tensor(message: memoryview, kind: str, sizes: Mapping[str, int]) -> None:
    entries: dict[str, str] = {}
    elsewhere = False
    for number, value in _fields(message):
        if number == _TENSOR_LOCATION:
            elsewhere = elsewhere or value != 0
        elif number == _TENSOR_EXTERNAL and isinstance(value, memoryview):
            entry = {field: bytes(text).decode() for field, text in _fields(value)
                     if isinstance(text, memoryview)}  # fmt: skip
            key = entry.get(_ENTRY_KEY, "")
            if key in entries or key not in _KEYS:
                raise ValueError(f"a tensor says {key[:40]!r} about its place")
            entries[key] = entry.get(_ENTRY_VALUE, "")
    if not entries and not elsewhere:
        return
    if kind == _FOREIGN:
        raise ValueError("a tensor inside a node lies in another file")
    name = entries.get("location", "")
    if name not in sizes:
        raise ValueError(
            f"a tensor lies in {name[:80]!r}, which is no file of this graph's weights"
        )
    offset, length = (_number(entries.get(key, "")) for key in ("offset", "length"))
    if offset + length > sizes[name]:
        raise ValueError(f"a tensor lies behind the end of {name[:80]!r}")


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ValueError(f"a tensor lies at {text[:40]!r}; expected a number of bytes")
    return int(text)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Read the fields of a message; raises ValueError where it is cut short."""
    at, size = 0, len(message)
    while at < size:
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        length = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind)
        if kind == _BYTES:
            length, at = _varint(message, at)
        if length is None or at + length > size:
            raise ValueError("it is no ONNX model, or cut short")
        yield tag >> 3, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it is no ONNX model, or cut short")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("it is no ONNX model: a number is too long")
