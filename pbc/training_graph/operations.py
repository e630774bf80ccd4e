"""Operations: what an engine runs of a graph, in its order, and the memory that this takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pbc.training_graph.pool import Chunk, Pool


@dataclass(frozen=True)
class Operation:
    """An operator as it is run.

    reads, makes: names of tensors; of what is made with its bytes. within: the tensor in whose
    memory its result lies, such as what a view is of. workspace_bytes: held while it works.
    """

    reads: Collection[str]
    makes: Mapping[str, int]
    within: str | None = None
    workspace_bytes: int = 0


def run(operations: Sequence[Operation], results: Collection[str], pool: Pool) -> list[Chunk]:
    """Hold each tensor from its operator to its last reader; return the memory of the results.

    What no operation makes, such as inputs and weights, is there whatever is run.
    """
    owners = _owners(operations)
    reads = [{owners[name] for name in op.reads if name in owners} for op in operations]
    readers = Counter(owner for read in reads for owner in read)
    readers.update({owners[name] for name in results if name in owners})
    chunks: dict[str, Chunk] = {}
    for operation, read in zip(operations, reads, strict=True):
        workspace = pool.allocate(operation.workspace_bytes) if operation.workspace_bytes else None
        made = [name for name in operation.makes if owners.get(name) == name]
        chunks.update({name: pool.allocate(operation.makes[name]) for name in made})
        if workspace is not None:
            pool.release(workspace)
        readers.subtract(read)
        # In a fixed order, by which neighbours are joined.
        for name in sorted({*read, *made}):
            if not readers[name]:
                pool.release(chunks.pop(name))
    return list(chunks.values())


def _owners(operations: Sequence[Operation]) -> dict[str, str]:
    """Whose memory each tensor lies in, of those that are made."""
    owners: dict[str, str] = {}
    for operation in operations:
        for name in operation.makes:
            if operation.within is None:
                owners[name] = name
            elif operation.within in owners:
                owners[name] = owners[operation.within]
    return owners
