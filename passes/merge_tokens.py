"""Merge the tokens of a transformer's proxies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from pbc.ir.dim_rules import dims_of
from pbc.ir.program import Program
from pbc.proxies.trial import with_merges


@dataclass(frozen=True)
class MergeTokens:
    """Merge tokens after the attentions of every level whose plan says so.

    Before, at a level that merges 4 of 17 tokens, one of them a class token, after an attention::

        %add_4: [b, 17, 192] = add.Tensor(%add_3, %linear_7)
        %layer_norm_3: [b, 17, 192] = layer_norm(%add_4, [192], @norm2.weight, @norm2.bias)

    After (how alike tokens are, ranks and sums are left out)::

        %add_4: [b, 17, 192] = add.Tensor(%add_3, %linear_7)
        %add_4_merged_49: [b, 13, 192] = cat([%class_token, %stay, %mean], 1)
        %layer_norm_3: [b, 13, 192] = layer_norm(%add_4_merged_49, [192], @norm2.weight, …)

    Later attentions weigh a token by how many it stands for (Bolya et al., Token Merging, ICLR
    2023; `pbc.proxies.tokens`). What a graph returns has all tokens again. Parameters stay as they
    are. Does nothing at levels that are planned without, and where there are no proxies.
    """

    stage: ClassVar[str] = "prune"
    after: ClassVar[tuple[str, ...]] = ("prune-dims",)

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        if not any(level.merges for level in program.levels):
            return program
        dims, original = dims_of(program), program.levels[0]
        levels = tuple(with_merges(level, original, dims) for level in program.levels)
        return replace(program, levels=levels)
