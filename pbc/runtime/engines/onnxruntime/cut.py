"""Cut a graph to some of its outputs: onnxruntime runs all of a graph, whatever is fetched."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from pbc.runtime.engines.onnxruntime.wire import field_bytes, fields

# The field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE = 1
_GRAPH_INITIALIZER = 5
_GRAPH_INPUT = 11
_GRAPH_OUTPUT = 12
_GRAPH_VALUE_INFO = 13
_NODE_INPUT = 1
_NODE_OUTPUT = 2
_NODE_NAME = 3
_TENSOR_NAME = 8
_VALUE_NAME = 1


def cut(model: bytes, outputs: Collection[str]) -> tuple[bytes, list[str]]:
    """Return the model that computes these outputs alone, and the inputs that it reads.

    What none of them needs is gone: operators, inputs, tensors. Types of values in between go too.
    """
    parts = list(fields(model))
    graph = next(part for number, part in parts if number == _MODEL_GRAPH)
    assert isinstance(graph, bytes)
    shorter, inputs = _cut_graph(graph, outputs)
    whole = (shorter if number == _MODEL_GRAPH else part for number, part in parts)
    numbers = (number for number, _ in parts)
    return b"".join(map(field_bytes, numbers, whole)), inputs


class Operator(NamedTuple):
    """A node of a graph, by names."""

    name: str
    inputs: list[str]
    outputs: list[str]


def operators(model: bytes) -> list[Operator]:
    """Return a model's nodes, in order."""
    graph = next(part for number, part in fields(model) if number == _MODEL_GRAPH)
    assert isinstance(graph, bytes)
    return [
        Operator(
            "".join(_texts(part, _NODE_NAME)), _texts(part, _NODE_INPUT), _texts(part, _NODE_OUTPUT)
        )
        for number, part in fields(graph)
        if number == _GRAPH_NODE
    ]


def output_names(model: bytes) -> list[str]:
    """Return the names of what a model returns, in order."""
    graph = next(part for number, part in fields(model) if number == _MODEL_GRAPH)
    assert isinstance(graph, bytes)
    return [
        _texts(part, _VALUE_NAME)[0] for number, part in fields(graph) if number == _GRAPH_OUTPUT
    ]


def _cut_graph(graph: bytes, outputs: Collection[str]) -> tuple[bytes, list[str]]:
    parts = list(fields(graph))
    needed = set(outputs)
    kept: set[int] = set()
    # Nodes are in an order in which each comes before its readers.
    for place in reversed(range(len(parts))):
        number, part = parts[place]
        if number == _GRAPH_NODE and not needed.isdisjoint(_texts(part, _NODE_OUTPUT)):
            kept.add(place)
            needed.update(_texts(part, _NODE_INPUT))
    names = {
        _GRAPH_INITIALIZER: _TENSOR_NAME,
        _GRAPH_INPUT: _VALUE_NAME,
        _GRAPH_OUTPUT: _VALUE_NAME,
    }
    inputs, written = [], []
    for place, (number, part) in enumerate(parts):
        if number == _GRAPH_VALUE_INFO or (number == _GRAPH_NODE and place not in kept):
            continue
        if number in names:
            (name,) = _texts(part, names[number])
            if name not in (outputs if number == _GRAPH_OUTPUT else needed):
                continue
            if number == _GRAPH_INPUT:
                inputs.append(name)
        written.append(field_bytes(number, part))
    return b"".join(written), inputs


def _texts(message: int | bytes, field: int) -> list[str]:
    """Return the strings of a repeated field."""
    assert isinstance(message, bytes)
    found = (value for number, value in fields(message) if number == field)
    return [value.decode() for value in found if isinstance(value, bytes)]
