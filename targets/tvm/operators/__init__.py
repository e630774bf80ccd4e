"""The operators that TVM modules are written of: for each of torch's, one that computes the same.

Relax's own operators where they do, simpler ones where they do not: the statistics of a layer norm,
say. A new operator is one function in the file of its family, entered with
`@OPERATORS.converts(aten.name.overload)`.
"""

from __future__ import annotations

from typing import Any

from pbc.targets.tvm.operators import (
    activations,
    convolutions,
    creation,
    indexing,
    matrices,
    normalisation,
    padding,
    pointwise,
    pooling,
    reductions,
    resizing,
    shapes,
    sizes,
    slices,
)
from pbc.targets.tvm.operators.family import Family
from pbc.targets.tvm.scope import Converter

_FAMILIES: tuple[Family, ...] = (
    sizes.OPERATORS,
    pointwise.OPERATORS,
    activations.OPERATORS,
    creation.OPERATORS,
    shapes.OPERATORS,
    slices.OPERATORS,
    padding.OPERATORS,
    indexing.OPERATORS,
    reductions.OPERATORS,
    matrices.OPERATORS,
    convolutions.OPERATORS,
    normalisation.OPERATORS,
    pooling.OPERATORS,
    resizing.OPERATORS,
)


def _joined() -> dict[Any, Converter]:
    table = Family()
    for family in _FAMILIES:
        for operator, converter in family.items():
            table.enter(operator, converter)
    return table


TABLE = _joined()
"""Every conversion, by torch's operator."""
