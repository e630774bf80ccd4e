"""The frozen tensors of a bundle: equal ones stored once, in safetensors files fit for mapping."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pbc.bundle.graph_name import POLICY, GraphName

# A vector register of any CPU in sight, and a cache line.
ALIGNMENT = 64
DTYPES = {  # that a file of tensors holds
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


@dataclass(frozen=True)
class Stored:
    """The place of a tensor; as text, `weights/level-0.safetensors#conv1.weight`."""

    file: str
    key: str

    def __str__(self) -> str:
        return f"{self.file}#{self.key}"


class TensorStore:
    """Collects tensors; one that is equal to another, of whatever name and file, is not kept."""

    def __init__(self) -> None:
        self._stored: dict[tuple[str, bytes], Stored] = {}
        self._files: dict[str, dict[str, Tensor]] = {}
        # Graphs of a level share tensor objects: each is read and hashed once.
        self._known: dict[int, tuple[Tensor, Stored]] = {}

    def add(self, file: str, name: str, tensor: Tensor) -> Stored:
        """Return where the tensor is kept: in `file` under `name`, or where its equal came first.

        A name that another tensor of the file has gets a number.
        """
        if id(tensor) in self._known:
            return self._known[id(tensor)][1]
        value = tensor.detach().clone(memory_format=torch.contiguous_format)
        content = (f"{value.dtype}{list(value.shape)}", hashlib.sha256(_bytes(value)).digest())
        if content not in self._stored:
            tensors = self._files.setdefault(file, {})
            stored = Stored(file, unused(name, tensors))
            tensors[stored.key] = value
            self._stored[content] = stored
        self._known[id(tensor)] = (tensor, self._stored[content])
        return self._stored[content]

    def files(self) -> dict[str, bytes]:
        """The safetensors files by name."""
        return {file: safetensors_bytes(tensors) for file, tensors in self._files.items()}


def unused(name: str, taken: Mapping[str, object] | set[str]) -> str:
    """The name, with a number where it is taken."""
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file in which tensors are aligned, as far as the format allows.

    It allows no gaps. So the header is filled up with blanks, and the tensors whose lengths keep
    the alignment come first, those that keep half of it next, and so on.
    """
    contents = {name: _bytes(tensor) for name, tensor in tensors.items()}
    order = sorted(contents, key=lambda name: (-_keeps(len(contents[name])), name))
    header: dict[str, dict[str, object]] = {}
    start = 0
    for name in order:
        end = start + len(contents[name])
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return b"".join((len(text).to_bytes(8, "little"), text, *(contents[name] for name in order)))


def byte_ranges(file: bytes) -> dict[str, tuple[int, int]]:
    """Return of each tensor of a safetensors file its offset in the file, and its length."""
    begin = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:begin])
    header.pop("__metadata__", None)
    return {
        name: (begin + start, end - start)
        for name, (start, end) in ((n, row["data_offsets"]) for n, row in header.items())
    }


def weight_file(folder: str, graph: GraphName) -> str:
    """Return the file of a graph's tensors: a device loads only the levels that it uses."""
    part = POLICY.kind if graph.level is None else f"level-{graph.level}"
    return f"{folder}/{part}.safetensors"


def _keeps(length: int) -> int:
    """The largest alignment that the end of `length` bytes still has."""
    return min(length & -length or ALIGNMENT, ALIGNMENT)


def _bytes(tensor: Tensor) -> bytes:
    # By way of bytes, since numpy has no bfloat16.
    return tensor.flatten().view(torch.uint8).numpy().tobytes()
