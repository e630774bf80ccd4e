"""Let an optimised graph read the weights that its optimiser left alone from their own files.

onnxruntime saves an optimised graph with a copy of every weight. A level's forward and update read
the same frozen weights; from one file, which both map, they lie in memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pbc.runtime.engines.onnxruntime.wire import element_type_and_shape, field_bytes, fields

# The field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
_TENSOR_NAME = 8
_TENSOR_EXTERNAL = 13
_ENTRY_KEY = 1
_ENTRY_VALUE = 2

_ALIGNMENT = 64
# Of a file that is kept for less than this share of it, the copies take less room.
_WORTH = 0.5


@dataclass(frozen=True)
class Place:
    """The place of a tensor's bytes."""

    file: str
    offset: int
    length: int

    def read(self, folder: Path) -> np.ndarray:
        """Map the bytes."""
        return np.memmap(folder / self.file, np.uint8, "r", self.offset, (self.length,))


@dataclass(frozen=True)
class Weight:
    """A tensor that is not in the model."""

    place: Place
    dtype: str
    shape: tuple[int, ...]


def outside(model: bytes) -> dict[str, Weight]:
    """Return by name the tensors of a model that are not in the model."""
    found = {}
    for tensor in _initializers(model):
        entries = _external(tensor)
        if entries:
            place = Place(
                entries["location"], int(entries.get("offset", 0)), int(entries["length"])
            )
            if Path(place.file).name != place.file:
                raise ValueError(f"a tensor lies in {place.file!r}, which is no file beside it")
            found[_text(tensor, _TENSOR_NAME)] = Weight(place, *element_type_and_shape(tensor))
    return found


def moved(model: bytes, new: Mapping[str, Place]) -> bytes:
    """Return the model with these of its tensors elsewhere."""

    def graph(message: bytes) -> bytes:
        return _replaced(message, _GRAPH_INITIALIZER, lambda tensor: _placed(tensor, new))

    return _replaced(model, _MODEL_GRAPH, graph)


def share(graph: Path, weights: Path, source: Path) -> None:
    """Have a saved graph read what `source`, of which it was made, reads too from the same files.

    weights: the file with the graph's own tensors; it keeps only what is its own. The files that
    are read from now on move to the graph's folder. Does nothing where that would spare little.
    """
    model = graph.read_bytes()
    own, given = outside(model), outside(source.read_bytes())
    same = {
        name: given[name].place
        for name, weight in own.items()
        if name in given
        and _is_readable(given[name])
        and (weight.dtype, weight.shape) == (given[name].dtype, given[name].shape)
        and np.array_equal(weight.place.read(graph.parent), given[name].place.read(source.parent))
    }
    read_bytes = dict.fromkeys((place.file for place in same.values()), 0)
    for place in same.values():
        read_bytes[place.file] += place.length
    worth = {
        file
        for file, count in read_bytes.items()
        if count >= _WORTH * (source.parent / file).stat().st_size
    }
    new = {name: place for name, place in same.items() if place.file in worth}
    if not new:
        return
    kept = weights.with_suffix(".kept")
    with kept.open("wb") as file:
        for name, weight in own.items():
            if name not in new:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                new[name] = Place(weights.name, file.tell(), weight.place.length)
                file.write(weight.place.read(graph.parent).tobytes())
    kept.replace(weights)
    if not weights.stat().st_size:
        weights.unlink()
    for name in worth:
        (source.parent / name).rename(graph.parent / name)
    graph.write_bytes(moved(model, new))


def _is_readable(weight: Weight) -> bool:
    """Return whether numpy can view the bytes where they lie."""
    return bool(weight.dtype) and weight.place.offset % np.dtype(weight.dtype).itemsize == 0


def _initializers(model: bytes) -> Iterator[bytes]:
    for graph in _messages(model, _MODEL_GRAPH):
        yield from _messages(graph, _GRAPH_INITIALIZER)


def _messages(message: bytes, field: int) -> Iterator[bytes]:
    for number, value in fields(message):
        if number == field and isinstance(value, bytes):
            yield value


def _text(message: bytes, field: int) -> str:
    return next(_messages(message, field)).decode()


def _external(tensor: bytes) -> dict[str, str]:
    """Return what a tensor says about where it lies."""
    entries = _messages(tensor, _TENSOR_EXTERNAL)
    return {_text(entry, _ENTRY_KEY): _text(entry, _ENTRY_VALUE) for entry in entries}


def _replaced(message: bytes, field: int, change: Callable[[bytes], bytes]) -> bytes:
    """Return a message with every message of a field changed."""
    return b"".join(
        field_bytes(
            number, change(value) if number == field and isinstance(value, bytes) else value
        )
        for number, value in fields(message)
    )


def _placed(tensor: bytes, new: Mapping[str, Place]) -> bytes:
    place = new.get(_text(tensor, _TENSOR_NAME))
    if place is None:
        return tensor
    entries = {"location": place.file, "offset": str(place.offset), "length": str(place.length)}
    rest = [field_bytes(n, value) for n, value in fields(tensor) if n != _TENSOR_EXTERNAL]
    for key, value in entries.items():
        entry = field_bytes(_ENTRY_KEY, key.encode()) + field_bytes(_ENTRY_VALUE, value.encode())
        rest.append(field_bytes(_TENSOR_EXTERNAL, entry))
    return b"".join(rest)
