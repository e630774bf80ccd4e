"""Read ONNX files, and append tensors and notes to them, without the onnx package.

An ONNX file is one protobuf message, and protobuf messages merge when their bytes are joined:
lists grow, a message inside is merged with its like. So a second, partial model after the first
adds initializers to its graph and properties to its metadata.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

# The field numbers of onnx.proto.
_MODEL_GRAPH = 7
_MODEL_METADATA = 14
_ENTRY_KEY = 1
_ENTRY_VALUE = 2
_GRAPH_INITIALIZER = 5
_TENSOR_DIMS = 1
_TENSOR_DATA_TYPE = 2
_TENSOR_NAME = 8
_TENSOR_RAW_DATA = 9
_KIND_NUMBER = 0
_KIND_EIGHT = 1
_KIND_BYTES = 2
_KIND_FOUR = 5

DATA_TYPES: Mapping[str, int] = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "uint16": 4,
    "int16": 5,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
}
"""TensorProto.DataType by numpy's name."""


def initializer(name: str, value: np.ndarray) -> bytes:
    """Return what, appended to a model, gives its graph this tensor."""
    stored = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    head = b"".join(_number(_TENSOR_DIMS, size) for size in value.shape)
    head += _number(_TENSOR_DATA_TYPE, DATA_TYPES[value.dtype.name])
    head += _bytes(_TENSOR_NAME, name.encode())
    tensor = head + _bytes(_TENSOR_RAW_DATA, stored.tobytes())
    return _bytes(_MODEL_GRAPH, _bytes(_GRAPH_INITIALIZER, tensor))


def metadata(properties: Mapping[str, str]) -> bytes:
    """Return what, appended to a model, adds these properties."""
    entries = (
        _bytes(_ENTRY_KEY, key.encode()) + _bytes(_ENTRY_VALUE, value.encode())
        for key, value in properties.items()
    )
    return b"".join(_bytes(_MODEL_METADATA, entry) for entry in entries)


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Read the fields of a message in order: numbers, or bytes for all that has a length.

    Raises ValueError for the kinds that ONNX's models, graphs and tensors do not have.
    """
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        kind = tag & 7
        if kind not in (_KIND_NUMBER, _KIND_BYTES):
            raise ValueError(f"field {tag >> 3} is of kind {kind}")
        value, at = _read_varint(message, at)
        if kind == _KIND_BYTES:
            yield tag >> 3, message[at : at + value]
            at += value
        else:
            yield tag >> 3, value


def parts(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Read the fields of a message of any kind; raises ValueError where it is cut short."""
    at, size = 0, len(message)
    while at < size:
        tag, at = _checked_varint(message, at)
        kind = tag & 7
        if kind == _KIND_NUMBER:
            value, at = _checked_varint(message, at)
            yield tag >> 3, value
            continue
        length = {_KIND_EIGHT: 8, _KIND_FOUR: 4}.get(kind)
        if kind == _KIND_BYTES:
            length, at = _checked_varint(message, at)
        if length is None or at + length > size:
            raise ValueError("it is no ONNX model, or cut short")
        yield tag >> 3, message[at : at + length]
        at += length


def element_type_and_shape(tensor: bytes) -> tuple[str, tuple[int, ...]]:
    """Return what the message of a tensor holds, the type by numpy's name."""
    dtype, shape = "", []
    for number, value in fields(tensor):
        if number == _TENSOR_DATA_TYPE:
            dtype = next((name for name, code in DATA_TYPES.items() if code == value), "")
        elif number == _TENSOR_DIMS and isinstance(value, int):
            shape.append(value)
        elif number == _TENSOR_DIMS and isinstance(value, bytes):  # packed
            at = 0
            while at < len(value):
                size, at = _read_varint(value, at)
                shape.append(size)
    return dtype, tuple(shape)


def field_bytes(field: int, value: int | bytes) -> bytes:
    """Write a field as it was read."""
    return _bytes(field, value) if isinstance(value, bytes) else _number(field, value)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _KIND_NUMBER) + _varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _KIND_BYTES) + _varint(len(content)) + content


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """Return a number and where the next one begins."""
    value = shift = 0
    while message[at] > 0x7F:
        value |= (message[at] & 0x7F) << shift
        shift += 7
        at += 1
    return value | message[at] << shift, at + 1


def _checked_varint(message: memoryview, at: int) -> tuple[int, int]:
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


def _varint(value: int) -> bytes:
    """Encode a number that is not negative: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
