"""Append tensors and notes to an ONNX file without the onnx package.

An ONNX file is one protobuf message, and protobuf messages merge when their bytes are joined:
lists grow, a message inside is merged with its like. So a second, partial model after the first
adds initializers to its graph and properties to its metadata.
"""

from __future__ import annotations

from collections.abc import Mapping

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

_DATA_TYPES: Mapping[str, int] = {
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
    head += _number(_TENSOR_DATA_TYPE, _DATA_TYPES[value.dtype.name])
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


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Encode a number that is not negative: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
