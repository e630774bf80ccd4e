"""Packing: a file of tensors that have few values or many zeros, entropy-coded.

A tensor of at most 256 values becomes those and a byte for each element, one of many zeros becomes
a bit for each element and the others, and bytes are Huffman-coded (Deep Compression, Han et al.,
ICLR 2016, sections 3 and 4). That loses nothing: whoever made tensors so says what that cost. What
is unpacked is the file as it was, to the byte, so that engines know nothing of all this.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from pbc.util import strict_json

MOST_RATIO = 64
"""No file is packed to less than this share of its size, and none that claims so is unpacked."""

_MOST_VALUES = 256
_WORTH = 0.75
_WORTH_BYTES = 4096
_HEADER, _VALUES, _INDICES = "header", "values/", "indices/"
_PLAIN, _PLACES = "plain/", "places/"
_SAMPLE = 4096


def packed(file: bytes) -> bytes | None:
    """Return a safetensors file packed; None where that takes less than a quarter off."""
    if len(file) < _WORTH_BYTES:
        return None
    begin = 8 + int.from_bytes(file[:8], "little")
    parts = {_HEADER: np.frombuffer(file[:begin], np.uint8)}
    for name, words in _words(file[:begin], file[begin:]).items():
        values = np.unique(words[:_SAMPLE])
        if len(values) <= _MOST_VALUES:
            values, indices = np.unique(words, return_inverse=True)
        if len(values) <= _MOST_VALUES and words.itemsize > 1:
            parts[_VALUES + name] = values
            parts[_INDICES + name] = indices.astype(np.uint8)
        elif np.count_nonzero(words) < _WORTH * len(words):
            parts[_PLACES + name] = np.packbits(words != 0)
            parts[_PLAIN + name] = words[words != 0].view(np.uint8)
        else:
            parts[_PLAIN + name] = words.view(np.uint8)
    if sum(part.nbytes for part in parts.values()) > _WORTH * len(file):
        return None
    # Indices have no strings that repeat; zlib's and LZMA's search for them makes them larger.
    coder = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    data = coder.compress(safetensors.numpy.save(parts)) + coder.flush()
    return data if len(file) <= MOST_RATIO * len(data) else None


def unpacked(data: bytes, size_bytes: int) -> bytes:
    """Return the file that was packed; raises ValueError where it is none of this size."""
    # Values and indices are fewer than what they stand for; the rest is names.
    most_bytes = 2 * size_bytes + (1 << 16)
    decoder = zlib.decompressobj()
    try:
        content = decoder.decompress(data, most_bytes)
        parts = safetensors.numpy.load(content)
        header = parts[_HEADER].tobytes()
        names = _places(header)
        if len(header) + sum(end - start for start, end, _ in names.values()) != size_bytes:
            raise ValueError(f"it does not hold {size_bytes} bytes")
        ordered = sorted(names.items(), key=lambda item: item[1])
        found = [header, *(_unpacked(parts, name, place) for name, place in ordered)]
    except (zlib.error, SafetensorError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(str(error) or "it is cut short") from error
    if not decoder.eof or sum(map(len, found)) != size_bytes:
        raise ValueError(f"it does not hold {size_bytes} bytes")
    return b"".join(found)


def _unpacked(parts: dict[str, np.ndarray], name: str, place: tuple[int, int, int]) -> bytes:
    plain, places = parts.get(_PLAIN + name), parts.get(_PLACES + name)
    if plain is None:
        plain = parts[_VALUES + name][parts[_INDICES + name]]
    if places is None:
        return plain.tobytes()
    start, end, count = place
    words = np.zeros(count, f"u{(end - start) // max(count, 1)}")
    words[np.unpackbits(places, count=count).astype(bool)] = plain.view(words.dtype)
    return words.tobytes()


def _words(header: bytes, content: bytes) -> dict[str, np.ndarray]:
    """Return the elements of every tensor, as integers of their size: bits are all that counts."""
    words = {}
    for name, (start, end, count) in _places(header).items():
        size = (end - start) // count if count else 1
        words[name] = np.frombuffer(content[start:end], np.dtype(f"u{size}"))
    return words


def _places(header: bytes) -> dict[str, tuple[int, int, int]]:
    """Return of each tensor where it begins and ends behind the header, and how many values."""
    rows = strict_json.loads(header[8:])
    rows.pop("__metadata__", None)
    return {name: (*row["data_offsets"], math.prod(row["shape"])) for name, row in rows.items()}
