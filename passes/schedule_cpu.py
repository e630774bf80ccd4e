"""Schedule TVM functions for a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import tvm
from tvm import tirx
from tvm.ir.prim import IntImm
from tvm.relax.analysis import has_reshape_pattern
from tvm_ffi import structural_equal

from pbc.tir.dots import dots
from pbc.tir.loops import (
    Processor,
    Sink,
    allocate,
    sequence,
)
from pbc.tir.math import in_vectors
from pbc.tir.moves import fold_moves
from pbc.tir.panels import panels
from pbc.tir.simple import elementwise, reduction
from pbc.tir.stages import NotRegularError, Stage, inline, loads, read_stages, reads

Rule = Callable[[Stage, Sink, Processor], Any]
# Tried in order: a rule returns None for what it does not fit.
RULES: tuple[Rule, ...] = (
    dots,
    panels,
    reduction,
    elementwise,
)


def schedule_cpu(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Write each function of a module as loops that use the threads and vectors of a CPU."""
    processor = Processor.of(target)
    module = fold_moves(module)
    scheduled = tvm.IRModule(module.functions, attrs=module.attrs, global_infos=module.global_infos)
    for name, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc):
            scheduled.update_func(name, schedule(function, processor))
    return scheduled


schedule_cpu.kinds = ("llvm",)  # type: ignore[attr-defined]


def schedule(function: tirx.PrimFunc, processor: Processor) -> tirx.PrimFunc:
    """One function; left as it is where it is not a list of stages."""
    if has_reshape_pattern(function):  # becomes a view of its input
        return function
    try:
        stages = inline(read_stages(function), function.params)
    except NotRegularError:
        return function
    stages = [replace(stage, value=in_vectors(stage.value)) for stage in stages]
    statements: list[Any] = []
    buffers: list[Any] = []
    position = 0
    while position < len(stages):
        stage = stages[position]
        is_output = any(stage.buffer.same_as(param) for param in function.params)
        epilogue = None if is_output else epilogue_of(stages, position)
        sink = Sink(stage, epilogue)
        result = (epilogue or stage).buffer
        if not any(result.same_as(param) for param in function.params):
            buffers.append(result)
        for rule in RULES:
            statement = rule(stage, sink, processor)
            if statement is not None:
                break
        else:
            return function
        statements.append(statement)
        position += 2 if epilogue else 1
    body = sequence([*(allocate(buffer) for buffer in buffers), *statements])
    return function.with_body(root_block(body))


def root_block(body: Any) -> Any:
    """The one block that later passes expect around the body of a function."""
    block = tvm.s_tir.SBlock([], [], [], "root", body)
    return tvm.s_tir.SBlockRealize([], True, block)


def epilogue_of(stages: Sequence[Stage], position: int) -> Stage | None:
    """The next stage, if it alone reads the results of a reduction, each where it was computed."""
    stage = stages[position]
    readers = [later for later in stages[position + 1 :] if reads(later, stage.buffer)]
    if not stage.reduced or len(readers) != 1 or readers[0] is not stages[position + 1]:
        return None
    reader = readers[0]
    if reader.reduced or len(reader.axes) != len(stage.axes):
        return None
    if not all(
        structural_equal(mine.extent, its.extent)
        for mine, its in zip(stage.axes, reader.axes, strict=True)
    ):
        return None
    for load in loads(reader.value):
        if load.source.same_as(stage.buffer) and not _identity(load, reader):
            return None
    return reader


def _identity(load: Any, reader: Stage) -> bool:
    return all(
        index.same_as(axis.var) or (axis.length == 1 and isinstance(index, IntImm))
        for index, axis in zip(load.indices, reader.axes, strict=True)
    )
