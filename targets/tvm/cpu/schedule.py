"""Schedule TVM functions for a CPU."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import tvm
from tvm import tirx
from tvm.ir.prim import IntImm
from tvm.relax.analysis import has_reshape_pattern
from tvm_ffi import structural_equal

from pbc.targets.tvm.cpu.depthwise import depthwise
from pbc.targets.tvm.cpu.dots import dots
from pbc.targets.tvm.cpu.knobs import WITHOUT, adjusted, knobs
from pbc.targets.tvm.cpu.loops import (
    Processor,
    Sink,
    allocate,
    sequence,
)
from pbc.targets.tvm.cpu.math import in_vectors
from pbc.targets.tvm.cpu.moves import fold_moves
from pbc.targets.tvm.cpu.pads import Padding, pads, read_padding
from pbc.targets.tvm.cpu.panels import panels
from pbc.targets.tvm.cpu.simple import elementwise, reduction
from pbc.targets.tvm.cpu.stages import (
    NotRegularError,
    Stage,
    inline,
    loads,
    read_stages,
    reads,
    unfused,
)
from pbc.targets.tvm.tuning.schedule_search import Tunable

_log = logging.getLogger("pbc")

Rule = Callable[[Stage, Sink, Processor], Any]
# Tried in order: a rule returns None for what it does not fit.
RULES: tuple[Rule, ...] = (
    dots,
    panels,
    depthwise,
    pads,
    reduction,
    elementwise,
)


def schedule(
    function: tirx.PrimFunc, processor: Processor, rules: Sequence[Rule] = RULES
) -> tirx.PrimFunc:
    """One function; left as it is where it is not a list of stages."""
    if has_reshape_pattern(function):  # becomes a view of its input
        return function
    try:
        stages = inline(read_stages(function), function.params)
    except NotRegularError:
        return function
    stages = [unfused(replace(stage, value=in_vectors(stage.value))) for stage in stages]
    outputs = function.params
    statements: list[Any] = []
    buffers: list[Any] = []
    position = 0
    while position < len(stages):
        written = None
        padding = padding_of(stages, position, outputs) if depthwise in rules else None
        if padding is not None:
            within = functools.partial(depthwise, padding=padding)
            written = _write(stages, position + 1, outputs, processor, [within])
            position += written is not None
        if written is None:
            written = _write(stages, position, outputs, processor, rules)
        if written is None:
            return function
        statement, last, count = written
        statements.append(statement)
        if not any(last.buffer.same_as(output) for output in outputs):
            buffers.append(last.buffer)
        position += count
    body = sequence([*(allocate(buffer) for buffer in buffers), *statements])
    return function.with_body(root_block(body))


def _write(
    stages: Sequence[Stage],
    position: int,
    outputs: Sequence[Any],
    processor: Processor,
    rules: Sequence[Rule],
) -> tuple[Any, Stage, int] | None:
    """The loops of a stage by the first rule that fits, which stage they fill, and how many."""
    stage = stages[position]
    is_output = any(stage.buffer.same_as(output) for output in outputs)
    epilogue = None if is_output else epilogue_of(stages, position)
    for rule in rules:
        statement = rule(stage, Sink(stage, epilogue), processor)
        if statement is not None:
            return statement, epilogue or stage, 2 if epilogue else 1
    return None


def root_block(body: Any) -> Any:
    """The one block that TVM expects around the body of a function."""
    block = tvm.s_tir.SBlock([], [], [], "root", body)
    return tvm.s_tir.SBlockRealize([], True, block)


def padding_of(stages: Sequence[Stage], position: int, outputs: Sequence[Any]) -> Padding | None:
    """Read a stage as a padding that the next stage alone reads; None where it is none."""
    stage = stages[position]
    readers = [later for later in stages[position + 1 :] if reads(later, stage.buffer)]
    if len(readers) != 1 or readers[0] is not stages[position + 1]:
        return None
    if any(stage.buffer.same_as(output) for output in outputs):
        return None
    return read_padding(stage)


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


def _choices(target: tvm.target.Target) -> Mapping[str, Sequence[Any]]:
    # The last two are for whatever is left, and slow for what another rule fits.
    return knobs(Processor.of(target), [rule.__name__ for rule in RULES[:-2]])


def _variant(
    function: tirx.PrimFunc, target: tvm.target.Target, settings: Mapping[str, Any]
) -> tirx.PrimFunc:
    rules = [rule for rule in RULES if rule.__name__ != settings.get(WITHOUT)]
    return schedule(function, adjusted(Processor.of(target), settings), rules)


@dataclass(frozen=True)
class ScheduleCpu:
    """Write each function of a module as loops that use the threads and vectors of a CPU.

    What no rule can read stays as it is, and so does what a rule raises on: it is slow, and right.
    """

    kinds: ClassVar[tuple[str, ...]] = ("llvm",)
    tunable: ClassVar[Tunable] = Tunable(fold_moves, _choices, _variant)
    rules: tuple[Rule, ...] = RULES

    def __call__(self, module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
        """Return the module with its functions scheduled; the input stays unchanged."""
        processor = Processor.of(target)
        module = fold_moves(module)
        result = tvm.IRModule(
            module.functions, attrs=module.attrs, global_infos=module.global_infos
        )
        for name, function in module.functions.items():
            if isinstance(function, tirx.PrimFunc):
                try:
                    result.update_func(name, schedule(function, processor, self.rules))
                except Exception as error:  # a rule that is wrong must cost speed alone
                    _log.debug("schedule-cpu leaves %s as it is: %r", name.name_hint, error)
        return result


schedule_cpu = ScheduleCpu()
