"""Find the trainable-independent dimensions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from pbc.ir.dim_rules import analyse
from pbc.ir.program import Program
from pbc.proxies.tokens import tokens_of


@dataclass(frozen=True)
class IndependentDims:
    """Attach to the program which dimensions of its frozen tensors may shrink.

    Graphs stay as they are; `program.dims` gains every dimension of every frozen tensor, whether it
    is trainable-independent, and the reason for each that is not. Where nothing is independent
    (batch-norm tuning of a convnet trains something on every channel) the program is told so once,
    in `program.notes`, and gets no proxies, unless it is a transformer, whose tokens can be merged.
    """

    stage: ClassVar[str] = "analyse"

    def __call__(self, program: Program) -> Program:
        dims = analyse(program.levels[0])
        notes = program.notes
        if not dims.independent() and tokens_of(program.levels[0], dims) is None:
            notes += (nothing_to_prune(program),)
        for operator, node in dims.unknown.items():
            notes += (
                f"operator {operator} (at {node}) has no dimension rule: "
                "what it touches is not pruned",
            )
        return replace(program.copy(), dims=dims, notes=notes)


def nothing_to_prune(program: Program) -> str:
    """Return one line that says why a strategy leaves nothing to prune, and what would."""
    return (
        f"strategy {program.request.strategy} leaves nothing to prune in {program.network.name}: "
        "every channel dimension of the frozen part is read or written by a trained parameter; "
        "all levels keep all channels (linear-probe, last-k or adapters leave dimensions free)"
    )
