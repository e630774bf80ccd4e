"""Read a TVM function as a list of stages: one buffer each, computed point by point.

What the operator library emits is regular: a loop nest around one block that stores one value, once
per buffer. Read as stages, producers fold into their consumers by substitution, and a schedule
writes each remaining stage as the loop nest that it wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm
from tvm import tirx
from tvm.ir import Call, TensorLoad, Var
from tvm.ir.prim import Add, FloatImm, FloorDiv, FloorMod, IntImm, Max, Min, Mul
from tvm.sym import Analyzer
from tvm_ffi import structural_map, structural_walk

SPATIAL, REDUCTION = 0, 2
COMBINERS = (Add, Max, Min)
# A call to one of these is worth a buffer when its result is read more than once.
EXPENSIVE = frozenset(
    f"tirx.{name}" for name in ("exp", "erf", "tanh", "log", "pow", "sqrt", "rsqrt", "sigmoid")
)
CONDITION = "prim.if_then_else"
_ZERO = IntImm("int64", 0)


@dataclass(frozen=True)
class Axis:
    """A loop of a stage, from zero."""

    var: Any
    extent: Any

    @property
    def length(self) -> int | None:
        """The extent where it is known at compile time."""
        return int(self.extent.value) if isinstance(self.extent, IntImm) else None


@dataclass(frozen=True)
class Stage:
    """`buffer[axes] = value`, or the combination of `value` over the reduction axes."""

    buffer: Any
    axes: tuple[Axis, ...]
    reduced: tuple[Axis, ...]
    value: Any
    combine: Any = None
    start: Any = None

    def at(self, indices: Sequence[Any]) -> Any:
        """The value at other indices."""
        return substitute(self.value, dict(zip((a.var for a in self.axes), indices, strict=True)))


class NotRegularError(Exception):
    """The function is not a list of stages; schedules leave it alone."""


def read_stages(function: tirx.PrimFunc) -> list[Stage]:
    """The stages of a function in order; raises NotRegularError where it is anything else."""
    root = function.body
    if not isinstance(root, tvm.s_tir.SBlockRealize) or len(root.iter_values):
        raise NotRegularError
    body = root.block.body
    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    return [_read_stage(statement) for statement in statements]


def _read_stage(statement: Any) -> Stage:
    loops: list[Any] = []
    while isinstance(statement, tirx.For):
        if not _is(statement.min, 0) or statement.kind != tirx.stmt.ForKind.SERIAL:
            raise NotRegularError
        loops.append(statement)
        statement = statement.body
    if not isinstance(statement, tvm.s_tir.SBlockRealize) or not _is(statement.predicate, 1):
        raise NotRegularError
    block = statement.block
    if (
        not isinstance(block.body, tirx.BufferStore)
        or len(block.alloc_buffers)
        or len(block.match_buffers)
        or not all(
            any(value.same_as(loop.loop_var) for loop in loops) for value in statement.iter_values
        )
    ):
        raise NotRegularError
    axes = {
        iterator.var: Axis(iterator.var, iterator.dom.extent)
        for iterator in block.iter_vars
        if iterator.iter_type == SPATIAL
    }
    reduced = tuple(
        Axis(iterator.var, iterator.dom.extent)
        for iterator in block.iter_vars
        if iterator.iter_type == REDUCTION
    )
    store = block.body
    written = [index for index in store.indices if isinstance(index, Var) and index in axes]
    if (
        len(written) != len(store.indices)
        or len(set(written)) != len(axes)
        or len(block.iter_vars) != len(axes) + len(reduced)
        or len(loops) != len(block.iter_vars)
    ):
        raise NotRegularError
    ordered = tuple(axes[index] for index in written)
    if block.init is None:
        if reduced or any(load.source.same_as(store.buffer) for load in loads(store.value)):
            raise NotRegularError
        return Stage(store.buffer, ordered, (), store.value)
    combine, term = _split_reduction(store)
    if not isinstance(block.init, tirx.BufferStore):
        raise NotRegularError
    start = block.init.value
    if combine is Add and not (isinstance(start, FloatImm | IntImm) and start.value == 0):
        raise NotRegularError
    return Stage(store.buffer, ordered, reduced, term, combine, start)


def _split_reduction(store: Any) -> tuple[Any, Any]:
    value = store.value
    if type(value) not in COMBINERS or not isinstance(value.a, TensorLoad):
        raise NotRegularError
    if not value.a.source.same_as(store.buffer) or any(
        load.source.same_as(store.buffer) for load in loads(value.b)
    ):
        raise NotRegularError
    return type(value), value.b


def inline(stages: Iterable[Stage], outputs: Sequence[Any]) -> list[Stage]:
    """Fold each stage that is cheaper to recompute than to keep into those that read it."""
    stages = list(stages)
    kept: list[Stage] = []
    folded: list[Stage] = []
    for position, stage in enumerate(stages):
        value = stage.value
        for source in folded:
            value = replace_loads(value, source.buffer, source.at)
        stage = replace(stage, value=value)
        readers = [later for later in stages[position + 1 :] if reads(later, stage.buffer)]
        if not stage.reduced and not _among(stage.buffer, outputs) and _folds(stage, readers):
            folded.append(stage)
        else:
            kept.append(stage)
    return kept


def _folds(stage: Stage, readers: Sequence[Stage]) -> bool:
    names = call_names(stage.value)
    for reader in readers:
        if is_product(reader) and (names or not isinstance(stage.value, TensorLoad)):
            return False
        if reader.reduced and (names & EXPENSIVE or CONDITION in names):
            return False
    return len(readers) == 1 or not names & EXPENSIVE


def unfused(stage: Stage) -> Stage:
    """The stage without divisions that take apart what was never together.

    Reshapes between transpositions leave them: `(k * b + i) // b` is `k`, since `i` counts up to
    `b`. TVM sees that where extents are numbers; where they are open, it divides value by value.
    """
    analyzer = Analyzer()
    axes = (*stage.axes, *stage.reduced)
    for axis in axes:
        analyzer.bind(axis.var, tvm.ir.Range(_ZERO, axis.extent))
    most = {axis.var: axis.extent - 1 for axis in axes}

    def split(index: Any, extent: Any) -> tuple[Any, Any] | None:
        """Quotient and remainder, if they are clear."""
        if _grows(index) and analyzer.can_prove(substitute(index, most) < extent):
            return _ZERO, index
        if isinstance(index, Add) and isinstance(index.a, Mul) and index.a.b.same_as(extent):
            rest = split(index.b, extent)
            return None if rest is None else (analyzer.simplify(index.a.a + rest[0]), rest[1])
        return None

    def rewrite(division: Any) -> Any:
        simple = analyzer.simplify(division)
        if not isinstance(simple, FloorDiv | FloorMod):
            return simple
        found = split(simple.a, simple.b)
        return simple if found is None else found[isinstance(simple, FloorMod)]

    value = structural_map(stage.value, [(FloorDiv, rewrite), (FloorMod, rewrite)])
    return replace(stage, value=value)


def _grows(index: Any) -> bool:
    """Whether an index is the larger, the larger its variables are."""
    if isinstance(index, Add | Mul):
        return _grows(index.a) and _grows(index.b)
    return isinstance(index, Var) or (isinstance(index, IntImm) and int(index.value) >= 0)


def is_product(stage: Stage) -> bool:
    """Whether a stage is a sum of products of two tensors, so that its inputs are read often."""
    return (
        stage.combine is Add
        and isinstance(stage.value, Mul)
        and isinstance(stage.value.a, TensorLoad)
        and isinstance(stage.value.b, TensorLoad)
    )


def loads(value: Any) -> list[Any]:
    """Every load in an expression."""
    found: list[Any] = []
    structural_walk(value, [(TensorLoad, found.append)])
    return found


def call_names(value: Any) -> set[str]:
    """The names of the functions that an expression calls."""
    found: set[str] = set()
    structural_walk(value, [(Call, lambda call: found.add(getattr(call.op, "name", "")))])
    return found


def variables(value: Any) -> set[Any]:
    """The variables in an expression, buffers left out."""
    found: set[Any] = set()
    structural_walk(value, [(Var, found.add)])
    return {var for var in found if not tirx.is_buffer_var(var)}


def reads(stage: Stage, buffer: Any) -> bool:
    return any(load.source.same_as(buffer) for load in loads(stage.value))


def substitute(value: Any, mapping: Mapping[Any, Any]) -> Any:
    """An expression with variables replaced."""
    return structural_map(value, [(Var, lambda var: mapping.get(var, var))])


def replace_loads(value: Any, buffer: Any, at: Callable[[Sequence[Any]], Any]) -> Any:
    """An expression with each load of a buffer replaced by `at` of its indices."""
    return structural_map(
        value,
        [
            (
                TensorLoad,
                lambda load: at(list(load.indices)) if load.source.same_as(buffer) else load,
            )
        ],
    )


def _is(value: Any, number: int) -> bool:
    return isinstance(value, IntImm) and int(value.value) == number


def _among(buffer: Any, buffers: Sequence[Any]) -> bool:
    return any(buffer.same_as(other) for other in buffers)
