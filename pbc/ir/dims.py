"""Dimension variables: which sizes of a network are tied together, and which are free to shrink.

Every axis of every tensor in the captured graphs is a product of dimension variables; a
union-find joins those that must stay equal (dim_rules.py has the rule of each operator). What no
trainable parameter, input or output fixes is trainable-independent and may be pruned (PieBridge,
SenSys 2024, «structural pruning along trainable-independent dimensions»).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pbc.ir.levels import Keep

CHANNELS = "channels"
HEADS = "heads"
HEAD_SIZE = "head size"
WINDOW = "window"


class Variable:
    """One dimension variable, a node of the union-find.

    fixed: why it cannot shrink, None while nothing says so.
    """

    __slots__ = ("fixed", "kind", "parent", "parts", "size")

    def __init__(self, size: int, fixed: str | None = None, kind: str = CHANNELS) -> None:
        self.size = size
        self.fixed = fixed
        self.kind = kind
        self.parent: Variable | None = None
        self.parts: tuple[Variable, Variable] | None = None


Axis = list[Variable]
"""An axis is the product of its variables, outermost first; size 1 is the empty product."""


def atoms(axis: Iterable[Variable]) -> Axis:
    """The axis in terms of variables that are neither joined into another nor split."""
    found: Axis = []
    for variable in axis:
        while variable.parent is not None:
            variable = variable.parent
        found += [variable] if variable.parts is None else atoms(variable.parts)
    return found


def size(axis: Iterable[Variable]) -> int:
    return math.prod(variable.size for variable in atoms(axis))


def channel_axes(axes: Iterable[Axis]) -> tuple[int, ...]:
    """The axes of a value, behind the batch's, that count more than positions."""
    return tuple(
        number
        for number, axis in enumerate(axes)
        if number > 0 and any(variable.kind != WINDOW for variable in atoms(axis))
    )


def fix(axis: Iterable[Variable], why: str) -> None:
    """Say why no variable of this axis may shrink; the first reason stays."""
    for variable in atoms(axis):
        variable.fixed = variable.fixed or why


def split(variable: Variable, outer: int) -> Axis:
    """Refine one atom into outer x inner."""
    inner = variable.size // outer
    variable.parts = (
        Variable(outer, variable.fixed, variable.kind),
        Variable(inner, variable.fixed, variable.kind),
    )
    return list(variable.parts)


def join(left: Iterable[Variable], right: Iterable[Variable]) -> None:
    """Make two axes of equal size the same, splitting the coarser one where they differ."""
    a, b = atoms(left), atoms(right)
    while a and b:
        one, other = a.pop(0), b.pop(0)
        if one is other:
            continue
        if one.size == other.size:
            one.fixed = one.fixed or other.fixed
            one.kind = one.kind if one.kind != CHANNELS else other.kind
            other.parent = one
        elif one.size % other.size == 0:
            a, b = atoms(split(one, other.size)) + a, [other, *b]
        elif other.size % one.size == 0:
            a, b = [one, *a], atoms(split(other, one.size)) + b
        else:
            why = (
                f"sizes {one.size} and {other.size} meet in one axis and neither divides the other"
            )
            fix([one, other, *a, *b], why)
            return
        a, b = atoms(a), atoms(b)


@dataclass(frozen=True)
class Slot:
    """A place where a dimension shows in a frozen tensor: part `part` of axis `axis`."""

    tensor: str
    axis: int
    part: int


@dataclass(frozen=True)
class Dimension:
    """A dimension variable as users see it.

    name: the first slot that it has, `tensor:axis` or `tensor:axis.part`: stable across runs.
    reason: why it is not trainable-independent; None if it is.
    """

    name: str
    size: int
    kind: str
    reason: str | None
    slots: tuple[Slot, ...]

    @property
    def independent(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Cost:
    """The multiply-accumulates of one operator for one sample: constant x product of variables."""

    node: str
    constant: float
    axis: Axis


@dataclass
class Dims:
    """The dimension variables of a program's level-0 graphs.

    axes: of every value, by node name (prefix and body share one name space, in which a feature has
    a name of its own); `tensors`: of every frozen tensor, by its name. dimensions: the variables
    that frozen tensors have, numbered; `variables` finds a dimension's by its name. unknown:
    operators without a rule, with a node.
    """

    batch: Variable
    axes: dict[str, list[Axis]] = field(default_factory=dict)
    tensors: dict[str, list[Axis]] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    dimensions: tuple[Dimension, ...] = ()
    variables: dict[str, Variable] = field(default_factory=dict)

    def macs(self, sizes: Mapping[str, int] | None = None) -> float:
        """Multiply-accumulates of one sample with the named dimensions at the given sizes."""
        given = {self.variables[name]: value for name, value in (sizes or {}).items()}
        return sum(
            cost.constant * math.prod(given.get(v, v.size) for v in atoms(cost.axis))
            for cost in self.costs
        )

    def bytes(self, sizes: Mapping[str, int] | None = None) -> int:
        """The frozen float32 tensors' size with the named dimensions at the given sizes."""
        given = {self.variables[name]: value for name, value in (sizes or {}).items()}
        return 4 * sum(
            math.prod(given.get(v, v.size) for axis in axes for v in atoms(axis))
            for axes in self.tensors.values()
        )

    def independent(self) -> list[Dimension]:
        return [dimension for dimension in self.dimensions if dimension.independent]

    def prunable_share(self) -> float:
        """The share of MACs in operators that at least one independent dimension scales."""
        free = {self.variables[dimension.name] for dimension in self.independent()}
        touched = sum(
            cost.constant * size(cost.axis) for cost in self.costs if free & set(atoms(cost.axis))
        )
        return touched / max(self.macs(), 1.0)

    def number_dimensions(self) -> None:
        """Name every variable that frozen tensors have, by the first slot that it has."""
        slots: dict[Variable, list[Slot]] = {}
        for tensor, axes in self.tensors.items():
            for position, axis in enumerate(axes):
                for part, variable in enumerate(atoms(axis)):
                    slots.setdefault(variable, []).append(Slot(tensor, position, part))
        found = []
        for variable, where in slots.items():
            if variable.kind == WINDOW or variable.size == 1:
                continue
            first = where[0]
            parts = len(atoms(self.tensors[first.tensor][first.axis]))
            name = f"{first.tensor}:{first.axis}" + (f".{first.part}" if parts > 1 else "")
            found.append(
                Dimension(name, variable.size, variable.kind, variable.fixed, tuple(where))
            )
            self.variables[name] = variable
        self.dimensions = tuple(found)

    def slice(self, name: str, tensor: Tensor, keep: Keep, present: Keep | None = None) -> Tensor:
        """The part of a frozen tensor that a plan keeps.

        present: the plan that `tensor` was already sliced by, a superset of `keep`.
        """
        present = present or {}
        wanted = {self.variables[n]: torch.tensor(i) for n, i in keep.items()}
        given = {self.variables[n]: torch.tensor(i) for n, i in present.items()}
        result = tensor.detach()
        for position, axis in enumerate(self.tensors[name]):
            parts = atoms(axis)
            if not any(variable in wanted for variable in parts):
                continue
            index = torch.zeros(1, dtype=torch.long)
            for variable in parts:
                have = given.get(variable, torch.arange(variable.size))
                stay = torch.searchsorted(have, wanted.get(variable, have))
                index = (index[:, None] * len(have) + stay[None]).reshape(-1)
            result = result.index_select(position, index)
        return (
            result.clone() if result is tensor or result.data_ptr() == tensor.data_ptr() else result
        )

    def touched(self, name: str, keep: Keep) -> bool:
        """Whether a plan shrinks this frozen tensor."""
        kept = {self.variables[n] for n in keep}
        return any(v in kept for axis in self.tensors[name] for v in atoms(axis))
