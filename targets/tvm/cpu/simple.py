"""Loops for what is no product of matrices: elementwise stages and plain reductions."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from pbc.targets.tvm.cpu.loops import (
    Processor,
    Sink,
    across,
    allocate,
    local,
    loop,
    nest,
    parallel,
    sequence,
    static_size,
    static_tail,
    unfold,
    vector,
)
from pbc.targets.tvm.cpu.stages import Stage, loads, substitute, variables


def elementwise(stage: Stage, sink: Sink, processor: Processor) -> Any:
    """Each value by itself: threads over the outer axes, vectors along the last ones."""
    if stage.reduced:
        return None

    def store(indices: list[Any]) -> Any:
        return sink.store(indices, stage.at(indices))

    fused = _fused_tail(stage, processor)
    inner = [axis.extent for axis in stage.axes[len(stage.axes) - fused :]]
    outer = stage.axes[: len(stage.axes) - fused]
    width = static_size(stage.axes[len(stage.axes) - fused :])
    plain = str(stage.buffer.dtype) != "float32"

    def row(indices: list[Any]) -> Any:
        if not fused:
            return store(indices)
        if plain:
            return loop(width, lambda at: store([*indices, *unfold(at, inner)]))
        return chunks(width, processor, lambda at: store([*indices, *unfold(at, inner)]))

    shared = min(2, len(outer))
    return parallel(
        [axis.extent for axis in outer[:shared]],
        lambda first: nest([a.extent for a in outer[shared:]], lambda rest: row([*first, *rest])),
        static_size(stage.axes),
    )


def chunks(width: int, processor: Processor, body: Any) -> Any:
    """A loop in whole vectors, and a rest in shorter ones and one by one."""
    statements = []
    start, lanes = 0, processor.lanes
    while lanes >= 4 and start < width:
        if whole := (width - start) // lanes:
            statements.append(
                loop(
                    whole,
                    lambda chunk, start=start, lanes=lanes: vector(  # type: ignore[misc]
                        lanes, lambda lane: body(chunk * lanes + lane + start)
                    ),
                )
            )
        start += whole * lanes
        lanes //= 2
    if start < width:
        statements.append(loop(width - start, lambda at: body(at + start)))
    return sequence(statements)


def _fused_tail(stage: Stage, processor: Processor) -> int:
    """The number of last axes that make one row: as few as fill a vector."""
    known = static_tail(stage.axes)
    count, width = 0, 1
    while count < known and width < processor.lanes:
        count += 1
        width *= stage.axes[-count].length or 1
    return count


def reduction(stage: Stage, sink: Sink, processor: Processor) -> Any:
    """Any reduction: in vectors along what the tensors store next to each other."""
    if not stage.reduced:
        return None
    dtype = str(stage.buffer.dtype)
    value_vars = [variables(list(load.indices)[-1:]) for load in loads(stage.value)]
    last = stage.axes[-1] if stage.axes else None
    along_columns = (
        last is not None
        and last.length is not None
        and last.length >= 4
        and any(last.var in found for found in value_vars)
    )
    if along_columns and dtype == "float32":
        return _columns(stage, sink, processor)
    return _rows(stage, sink, processor)


def _columns(stage: Stage, sink: Sink, processor: Processor) -> Any:
    """Vectors along the last axis of the result."""
    last = stage.axes[-1].length or 1
    lanes = processor.lanes
    while lanes > last:
        lanes //= 2
    outer = [axis.extent for axis in stage.axes[:-1]]

    def block(indices: list[Any], start: Any, width: int) -> Any:
        total = local([width], "total")

        def add(reduced: list[Any]) -> Any:
            places = {a.var: at for a, at in zip(stage.reduced, reduced, strict=True)}

            def one(lane: Any) -> Any:
                value = substitute(stage.at([*indices, start + lane]), places)
                return tirx.BufferStore(total, stage.combine(total[lane], value), [lane])

            return vector(width, one)

        return sequence(
            [
                allocate(total),
                vector(width, lambda lane: tirx.BufferStore(total, stage.start, [lane])),
                nest([a.extent for a in stage.reduced], add),
                vector(width, lambda lane: sink.store([*indices, start + lane], total[lane])),
            ]
        )

    whole, rest = divmod(last, lanes)
    work = static_size(stage.axes) * static_size(stage.reduced)
    statements = [parallel([*outer, whole], lambda at: block(at[:-1], at[-1] * lanes, lanes), work)]
    if rest:
        statements.append(
            parallel(
                outer,
                lambda at: loop(rest, lambda lane: block(at, lane + whole * lanes, 1)),
                work,
            )
        )
    return sequence(statements)


def _rows(stage: Stage, sink: Sink, processor: Processor) -> Any:
    """Partial results in the lanes of a vector along the last reduced axes."""
    known = static_tail(stage.reduced)
    dtype = str(stage.buffer.dtype)
    lanes = processor.lanes if dtype == "float32" else 1
    count, width = 0, 1
    while count < known and width < lanes:
        count += 1
        width *= stage.reduced[-count].length or 1
    while lanes > width:
        lanes //= 2
    outer = stage.reduced[: len(stage.reduced) - count]
    inner = [axis.extent for axis in stage.reduced[len(stage.reduced) - count :]]

    def one(indices: list[Any]) -> Any:
        total, partial = local([1], "total", dtype), local([lanes], "partial", dtype)

        def add(into: Any, place: Any, reduced: list[Any]) -> Any:
            places = {a.var: at for a, at in zip(stage.reduced, reduced, strict=True)}
            value = substitute(stage.at(indices), places)
            return tirx.BufferStore(into, stage.combine(into[place], value), [place])

        def row(first: list[Any]) -> Any:
            def at(index: Any) -> list[Any]:
                return [*first, *unfold(index, inner)]

            whole = width // lanes
            statements = [
                loop(
                    whole,
                    lambda chunk: vector(
                        lanes, lambda lane: add(partial, lane, at(chunk * lanes + lane))
                    ),
                )
            ]
            if width - whole * lanes:
                statements.append(
                    loop(
                        width - whole * lanes,
                        lambda rest: add(total, 0, at(rest + whole * lanes)),
                    )
                )
            return sequence(statements)

        return sequence(
            [
                allocate(total),
                allocate(partial),
                tirx.BufferStore(total, stage.start, [0]),
                vector(lanes, lambda lane: tirx.BufferStore(partial, stage.start, [lane])),
                nest([axis.extent for axis in outer], row),
                sink.store(indices, stage.combine(total[0], across(partial, lanes, stage.combine))),
            ]
        )

    shared = min(2, len(stage.axes))
    return parallel(
        [axis.extent for axis in stage.axes[:shared]],
        lambda first: nest(
            [axis.extent for axis in stage.axes[shared:]], lambda rest: one([*first, *rest])
        ),
        static_size(stage.axes) * static_size(stage.reduced),
    )
