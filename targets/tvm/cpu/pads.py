"""Padding: border and inside are loops of their own, so that no value asks where it is.

A condition per value keeps a copy out of vectors, and a padded tensor is copied whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.ir import Call, Var
from tvm.ir.prim import LE, LT, And, IntImm

from pbc.targets.tvm.cpu.loops import Processor, Sink, loop, parallel, sequence, static_size
from pbc.targets.tvm.cpu.simple import chunks
from pbc.targets.tvm.cpu.stages import CONDITION, Stage, variables


@dataclass(frozen=True)
class Padding:
    """A stage that is `inside` where each axis is within its bounds, and `border` elsewhere."""

    stage: Stage
    bounds: tuple[tuple[int, int] | None, ...]
    inside: Any
    border: Any


def read_padding(stage: Stage) -> Padding | None:
    """Read a stage as a padding; None where it is none."""
    value = stage.value
    if stage.reduced or not isinstance(value, Call):
        return None
    if getattr(value.op, "name", "") != CONDITION or variables(value.args[2]):
        return None
    bounds: dict[Any, tuple[int, int]] = {}
    for condition in _conjuncts(value.args[0]):
        found = _bound(condition)
        if found is None:
            return None
        var, low, high = found
        axis = next((axis for axis in stage.axes if axis.var.same_as(var)), None)
        if axis is None or axis.length is None:
            return None
        least, most = bounds.get(var, (0, axis.length))
        bounds[var] = max(least, low), min(most, axis.length if high is None else high)
    if any(low >= high for low, high in bounds.values()):
        return None
    return Padding(
        stage,
        tuple(bounds.get(axis.var) for axis in stage.axes),
        value.args[1],
        value.args[2],
    )


def _conjuncts(condition: Any) -> list[Any]:
    if isinstance(condition, And):
        return [*_conjuncts(condition.a), *_conjuncts(condition.b)]
    return [condition]


def _bound(condition: Any) -> tuple[Any, int, int | None] | None:
    """A variable, its least value, and the first that is too large."""
    if isinstance(condition, LE | LT):
        strict = int(isinstance(condition, LT))
        if isinstance(condition.a, IntImm) and isinstance(condition.b, Var):
            return condition.b, int(condition.a.value) + strict, None
        if isinstance(condition.a, Var) and isinstance(condition.b, IntImm):
            return condition.a, 0, int(condition.b.value) + 1 - strict
    return None


def pads(stage: Stage, sink: Sink, processor: Processor) -> Any:
    """Rows of a padding: the border before, the source, the border after."""
    padding = read_padding(stage)
    width = stage.axes[-1].length
    if padding is None or width is None:
        return None
    *outer, last = padding.bounds
    low, high = last or (0, width)
    shared = max(len(outer) - 1, 1) if outer else 0

    def span(at: list[Any], start: int, end: int, value: Any) -> Any:
        def one(place: Any) -> Any:
            indices = [*at, place + start]
            return sink.store(indices, replace(stage, value=value).at(indices))

        return [chunks(end - start, processor, one)] if end > start else []

    def row(at: list[Any]) -> Any:
        whole = sequence(
            [
                *span(at, 0, low, padding.border),
                *span(at, low, high, padding.inside),
                *span(at, high, width, padding.border),
            ]
        )
        conditions = [
            tirx.all(place >= bound[0], place < bound[1])
            for place, bound in zip(at, outer, strict=True)
            if bound is not None
        ]
        if not conditions:
            return whole
        empty = sequence(span(at, 0, width, padding.border))
        return tirx.IfThenElse(tirx.all(*conditions), whole, empty)

    extents = [axis.extent for axis in stage.axes[:-1]]
    return parallel(
        extents[:shared],
        lambda first: (
            row(first)
            if shared == len(extents)
            else loop(extents[-1], lambda last: row([*first, last]), name="row")
        ),
        static_size(stage.axes),
    )
