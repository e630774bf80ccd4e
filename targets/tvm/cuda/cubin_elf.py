"""Read a cubin: its architecture, and what each kernel takes of the GPU."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from pbc.errors import PbcError

_MAGIC = b"\x7fELF"
_MACHINE_CUDA = 190
_ABI_WITH_SM_IN_SECOND_BYTE = 8  # CUDA 13's; until then the lowest byte of the flags holds it

# Formats and attributes of `.nv.info` and `.nv.info.NAME`, as NVIDIA's tools name them.
_FORMAT_SIZED = 4
_MAX_THREADS = 0x05
_REGISTER_COUNT = 0x2F

_SHARED, _INFO = ".nv.shared.", ".nv.info."
_SYMBOLS = ".symtab"
_SYMBOL_BYTES = 24
_NO_CONTENT = 8  # the section type of shared memory: a size, and nothing in the file


@dataclass(frozen=True)
class Resources:
    """Resources that one block of a kernel takes."""

    threads: int
    shared_bytes: int
    registers_per_thread: int


@dataclass(frozen=True)
class Limits:
    """Resources that an architecture gives to one block."""

    threads: int = 1024
    shared_bytes: int = 48 * 1024
    registers: int = 64 * 1024

    @classmethod
    def of(cls, sm: int) -> Limits:
        """Return the limits of an architecture, as the CUDA programming guide has them."""
        if sm in (53, 62):
            return cls(registers=32 * 1024)
        if sm >= 90:
            return cls(shared_bytes=49 * 1024)  # a cubin counts the system's own KiB there
        return cls()

    def exceeded_by(self, kernel: Resources) -> str | None:
        """Say what the kernel takes too much of."""
        registers = kernel.threads * kernel.registers_per_thread
        if kernel.threads > self.threads:
            return f"{kernel.threads} threads of {self.threads}"
        if kernel.shared_bytes > self.shared_bytes:
            return f"{kernel.shared_bytes} bytes of shared memory of {self.shared_bytes}"
        if registers > self.registers:
            return f"{registers} registers of {self.registers}"
        return None


def architecture(cubin: bytes) -> int:
    """Return the sm number that the machine code is for."""
    if len(cubin) < 64 or cubin[:4] != _MAGIC or _machine(cubin) != _MACHINE_CUDA:
        raise PbcError(f"no machine code of a GPU: it begins with {cubin[:8]!r}")
    flags = int.from_bytes(cubin[48:52], "little")
    return (flags >> 8 if cubin[8] >= _ABI_WITH_SM_IN_SECOND_BYTE else flags) & 0xFF


def kernels(cubin: bytes) -> dict[str, Resources]:
    """Return what each kernel takes, by its name.

    A kernel without launch bounds counts 1024 threads: it may be launched with as many.
    """
    architecture(cubin)
    sections = {section.name: section.content for section in _sections(cubin)}
    symbols, names = sections[_SYMBOLS], sections[".strtab"]
    shared = {
        section.name.removeprefix(_SHARED): section.size
        for section in _sections(cubin)
        if section.name.startswith(_SHARED)
    }
    found = {}
    for value in _attributes(sections.get(".nv.info", b""), _REGISTER_COUNT):
        symbol, count = struct.unpack("<2I", value)
        (start,) = struct.unpack_from("<I", symbols, symbol * _SYMBOL_BYTES)
        name = _text(names, start)
        bounds = [
            math.prod(struct.unpack("<3I", bound))
            for bound in _attributes(sections.get(_INFO + name, b""), _MAX_THREADS)
        ]
        found[name] = Resources(min(bounds, default=1024), shared.get(name, 0), count)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class _Section:
    name: str
    size: int
    content: bytes


def _machine(elf: bytes) -> int:
    return int.from_bytes(elf[18:20], "little")


def _sections(elf: bytes) -> Iterator[_Section]:
    (offset,) = struct.unpack_from("<Q", elf, 40)
    entry_size, count, names_index = struct.unpack_from("<3H", elf, 58)
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", elf, offset + index * entry_size)
        for index in range(count)
    ]
    names_offset = headers[names_index][4]
    for name, kind, _flags, _address, start, size, *_ in headers:
        content = b"" if kind == _NO_CONTENT else elf[start : start + size]
        yield _Section(_text(elf, names_offset + name), size, content)


def _text(table: bytes, start: int) -> str:
    return table[start : table.index(b"\0", start)].decode()


def _attributes(info: bytes, wanted: int) -> Iterator[bytes]:
    """Return the values of one attribute, from the content of a `.nv.info` section."""
    position = 0
    while position + 4 <= len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, position)
        position += 4
        content = info[position : position + value] if form == _FORMAT_SIZED else b""
        position += len(content)
        if attribute == wanted:
            yield content
