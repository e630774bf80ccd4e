"""Pool: how much memory an engine takes from the system for what it allocates and frees.

It is the arena of onnxruntime (bfc_arena.cc) as pbc's sessions ask for it: it grows by what is
asked for, gives nothing back, and hands out the smallest free chunk that is large enough, the first
of several.
"""

from __future__ import annotations

from dataclasses import dataclass

_ROUNDED_BYTES = 256
# What is left of a chunk is a chunk of its own where it is as large as what is taken, or this.
_LARGE_BYTES = 128 * 2**20


@dataclass(eq=False)
class Chunk:
    """A piece of a block that came from the system; `before` and `after` are its neighbours.

    place: where it lies, in the order in which blocks came.
    """

    size: int
    place: int
    free: bool = False
    before: Chunk | None = None
    after: Chunk | None = None


class Pool:
    """Memory by chunks.

    total_bytes: what was taken from the system, which begins with what others hold. spare_bytes: of
    that, what they gave back, which is taken again first.
    """

    def __init__(self, held_bytes: int = 0) -> None:
        self.total_bytes = held_bytes
        self.spare_bytes = 0
        self._places = 0
        self._free: set[Chunk] = set()

    def allocate(self, size: int) -> Chunk:
        """Return a chunk of at least so many bytes."""
        size = max(1, -(-size // _ROUNDED_BYTES)) * _ROUNDED_BYTES
        chunk = min((c for c in self._free if c.size >= size), key=_order, default=None)
        if chunk is None:
            if size <= self.spare_bytes:
                self.spare_bytes -= size
            else:
                self.total_bytes += size
            self._places += size
            return Chunk(size, self._places - size)
        self._free.remove(chunk)
        chunk.free = False
        rest = chunk.size - size
        if rest >= min(size, _LARGE_BYTES):
            chunk.size = size
            behind = Chunk(rest, chunk.place + size, before=chunk, after=chunk.after)
            if chunk.after is not None:
                chunk.after.before = behind
            chunk.after = behind
            self.release(behind)
        return chunk

    def release(self, chunk: Chunk) -> None:
        """Take a chunk back, and join it with its free neighbours."""
        if chunk.after is not None and chunk.after.free:
            self._free.remove(chunk.after)
            self._swallow(chunk)
        if chunk.before is not None and chunk.before.free:
            chunk = chunk.before
            self._free.remove(chunk)
            self._swallow(chunk)
        chunk.free = True
        self._free.add(chunk)

    def _swallow(self, chunk: Chunk) -> None:
        """Join a chunk with the one behind it."""
        assert chunk.after is not None
        chunk.size += chunk.after.size
        chunk.after = chunk.after.after
        if chunk.after is not None:
            chunk.after.before = chunk


def _order(chunk: Chunk) -> tuple[int, int]:
    return chunk.size, chunk.place
