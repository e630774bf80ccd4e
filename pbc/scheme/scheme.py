"""Scheme: which biases train, and which share of which weights; as text and as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType

from pbc.errors import UsageError

FRACTIONS = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1))
"""Of a weight's input channels (of a depthwise one's channels), how many may train."""


@dataclass(frozen=True)
class Scheme:
    """What sparse back-propagation trains besides the head.

    biases: those of the last so many layers. fractions: by the name of a layer, the share of its
    weight that trains, one of FRACTIONS.
    """

    biases: int = 0
    fractions: Mapping[str, Fraction] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read `b12,features.3.conv=1/4,fc1=1`; raises UsageError saying what would be right."""
        first, *rest = text.split(",")
        biases = 0
        if first[:1] == "b" and first[1:].isdigit():
            biases = int(first[1:])
        else:
            rest = [first, *rest]
        known = {str(fraction): fraction for fraction in FRACTIONS}
        fractions: dict[str, Fraction] = {}
        for part in rest:
            name, sign, share = part.partition("=")
            if not name or not sign or share not in known:
                raise UsageError(
                    f"{part!r} of a sparse scheme is neither bK, the biases of the last K layers, "
                    f"at its beginning, nor LAYER=SHARE, the share one of {', '.join(known)}"
                )
            if name in fractions:
                raise UsageError(f"the sparse scheme has layer {name!r} twice")
            fractions[name] = known[share]
        return cls(biases, fractions)

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        return ",".join([f"b{self.biases}", *(f"{n}={r}" for n, r in self.fractions.items())])
