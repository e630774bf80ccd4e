"""Keys of cached features: hashes of all that decides a row to the last bit.

Rows are computed in canonical chunks, and a row's key covers its whole chunk: the last bits of a
float depend on what shares a batch, and a refilled cache must hold the bits that were lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import PIL

from pbc.bundle import Bundle
from pbc.bundle.graph_name import PREFIX
from pbc.data import InputSpec

KEY_BYTES = 32


def level_key(bundle: Bundle, spec: InputSpec, engine: str, dtype: str) -> Callable[[int], bytes]:
    """Return the function from a level to the hash of all that decides its features.

    engine: name, version and threads. The prefix counts with its graph and every file of weights
    it reads, the level with all that the manifest says about how it computes, the decoder of photos
    by Pillow's version.
    """

    def key(level: int) -> bytes:
        graph = PREFIX.at(level)
        row = bundle.manifest["levels"][level]
        weights = bundle.weight_files(graph)
        if weights is None:  # all that the bundle holds may count
            weights = list(bundle.manifest["files"])
        files = sorted({bundle.graph_file(graph), *weights})
        parts = [str(level), *(bundle.sha256(file) for file in files)]
        parts += [str(row["precision"]), str(row["resolution"]), spec.hash(), engine, dtype]
        parts.append(f"Pillow {PIL.__version__}")
        return hashlib.sha256("\n".join(parts).encode()).digest()

    return key


def chunk_keys(level_key: bytes, size: int, contents: Sequence[bytes]) -> list[bytes]:
    """Return the 32-byte keys of the rows that are computed together.

    size: of a whole chunk, up to which a call for fewer rows may be padded.
    """
    chunk = hashlib.sha256(level_key + size.to_bytes(4, "little"))
    for content in contents:
        chunk.update(content)
    return [
        hashlib.sha256(chunk.digest() + position.to_bytes(4, "little")).digest()
        for position in range(len(contents))
    ]
