"""Where an ONNX model says that its tensors lie, checked before onnxruntime reads it.

A tensor may name any file, and a place in it. A bundle's may name the files of weights that its
manifest gives the graph, by their plain names, and only as initializers of a graph.
"""

from __future__ import annotations

from collections.abc import Mapping

from pbc.runtime.engines.onnxruntime.wire import parts

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
    for number, value in parts(message):
        if kind == _MODEL and number == _MODEL_TRAINING:
            raise ValueError("it holds training information, which nothing here reads")
        inner = _INSIDE[kind].get(number)
        if inner is not None and isinstance(value, memoryview):
            _check(value, inner, sizes, depth + 1)


def _check_tensor(message: memoryview, kind: str, sizes: Mapping[str, int]) -> None:
    entries: dict[str, str] = {}
    elsewhere = False
    for number, value in parts(message):
        if number == _TENSOR_LOCATION:
            elsewhere = elsewhere or value != 0
        elif number == _TENSOR_EXTERNAL and isinstance(value, memoryview):
            entry = {field: bytes(text).decode() for field, text in parts(value)
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
