"""What a lowering is: how a program becomes an engine's artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch.fx import GraphModule

from pbc.program import Program


@dataclass(frozen=True)
class Candidate:
    """One trial level: its `prefix/0` (where there is one) and `body/0`, and their precisions."""

    graphs: Mapping[str, GraphModule]
    precisions: Mapping[str, str]


class Lowering(Protocol):
    """Entry point group `pbc.lowerings`, under the engine's name."""

    def lower(self, program: Program) -> dict[str, bytes]:
        """The bundle's graph and weight files; raises PbcError for an operator it cannot run."""

    def graph_file(self, graph: str) -> str:
        """The name of the bundle's file that holds the graph of this name."""

    def requires(self) -> dict[str, str]:
        """What the device must have installed to run the artifacts, by name."""

    def latency_ms(self, program: Program, candidates: Sequence[Candidate]) -> list[float]:
        """Milliseconds of one training visit of a batch, all candidates measured interleaved.

        That is the prefix forward, at the batch size that suits it best (features do not depend on
        what shares a batch), and the body forward and backward.
        """
