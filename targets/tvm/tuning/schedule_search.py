"""Search schedules of the functions that take the time, and keep those that are faster.

A schedule of the group `pbc.tvm_schedules` decides by rules. One that can decide otherwise has a
`Tunable`, and here its choices are varied one at a time, each beside what the schedule decides by
itself. The schedules hold for every batch; what is measured is the device's.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir.prim import IntImm
from tvm.sym import Analyzer
from tvm_ffi import structural_equal, structural_hash, structural_map

from pbc.targets.tvm.build import Platform, legalized, scheduled, schedules
from pbc.targets.tvm.tuning.records import Record, Records, ScheduleSettings
from pbc.targets.tvm.tuning.trial import (
    TRIAL_SECONDS,
    WORTH_CONFIRMING,
    Argument,
    Trials,
    first_line,
)
from pbc.util.processor import cores, cpu_identity
from pbc.util.progress import report

FIRST_SHARE = 0.25
"""Share of the time that may go on measuring what there is, the largest functions first."""

LEAST_SHARE = 0.002
"""Functions that take less of the time than this are left as they are."""


@dataclass(frozen=True)
class Tunable:
    """Other decisions that a schedule can make; its attribute `tunable`.

    prepare: what the schedule does to a module before it schedules the functions one by one.
    choices: by name, what may be chosen instead of what it decides by itself.
    variant: a function's schedule with some of these chosen.
    """

    prepare: Callable[[tvm.IRModule], tvm.IRModule]
    choices: Callable[[tvm.target.Target], Mapping[str, Sequence[Any]]]
    variant: Callable[[tirx.PrimFunc, tvm.target.Target, ScheduleSettings], tirx.PrimFunc]


@dataclass(frozen=True)
class Use:
    """Runs of a function of a module's graphs, and the sizes of its symbols there."""

    times: float
    batch: int
    classes: int


@dataclass
class _Task:
    """A function to tune, as it is called, with the best settings so far."""

    function: tirx.PrimFunc
    tunable: Tunable
    baseline: tirx.PrimFunc
    arguments: Sequence[Argument]
    outputs: int
    key: str
    choices: Mapping[str, Sequence[Any]]
    calls: float = 0.0
    work: float = 0.0
    seconds: float = 0.0
    tries: int = 0
    best: Record | None = None
    tried: set[str] = field(default_factory=set)

    @property
    def settings(self) -> ScheduleSettings:
        return self.best.settings if self.best is not None else {}

    @property
    def gain(self) -> float:
        return self.best.gain if self.best is not None else 1.0

    @property
    def priority(self) -> float:
        """Each function gets trials in proportion to the time that it takes."""
        return self.calls * self.seconds / self.gain / (1 + self.tries)

    def next(self) -> ScheduleSettings | None:
        """Return settings that differ from the best in one choice; None where all were tried."""
        for name, values in self.choices.items():
            for value in values:
                settings = {**self.settings, name: value}
                if _text(settings) not in self.tried:
                    return settings
        return None

    def note(self, settings: ScheduleSettings, record: Record) -> None:
        self.tried.add(_text(settings))
        if record.gain * WORTH_CONFIRMING > 1.0 and record.gain > self.gain:
            self.best = record


@dataclass(frozen=True)
class TunedModule:
    """A scheduled module, and its functions that have a faster schedule.

    key: of both, and of the machine.
    """

    module: tvm.IRModule
    faster: Mapping[str, tirx.PrimFunc]
    key: str

    def replaced(self) -> tvm.IRModule:
        """The module with them."""
        module = tvm.IRModule(
            self.module.functions, attrs=self.module.attrs, global_infos=self.module.global_infos
        )
        for name, function in self.faster.items():
            module.update_func(module.get_global_var(name), function)
        return module


class ScheduleSearch:
    """Tunes the functions of several modules together; equal functions once."""

    def __init__(self, where: Platform, records: Records) -> None:
        self._where, self._records = where, records
        self._tasks: dict[str, _Task] = {}
        self._modules: list[tuple[tvm.IRModule, dict[str, _Task]]] = []
        self._machine = _text([where.key(), tvm.__version__, cpu_identity(), cores()])
        self.trials = 0

    @property
    def functions(self) -> int:
        """The number of functions to tune."""
        return len(self._tasks)

    def add(self, module: tvm.IRModule, uses: Mapping[str, Use]) -> int:
        """Add a module as it was converted; uses: of its graphs, by the functions' names.

        Returns its number.
        """
        target = self._where.target
        plain = scheduled(module, self._where)
        named: dict[str, _Task] = {}
        for schedule in schedules(str(target.kind.name)):
            tunable: Tunable | None = getattr(schedule, "tunable", None)
            if tunable is None:
                continue
            with target:
                prepared = tunable.prepare(legalized(module, self._where))
            choices = tunable.choices(target)
            for call in calls(prepared, uses):
                self._count(call, prepared, plain, tunable, choices, named)
        self._modules.append((plain, named))
        return len(self._modules) - 1

    def _count(
        self,
        call: Call,
        prepared: tvm.IRModule,
        plain: tvm.IRModule,
        tunable: Tunable,
        choices: Mapping[str, Sequence[Any]],
        named: dict[str, _Task],
    ) -> None:
        """Add a call to the task of its function."""
        if call.function not in named:
            function = prepared[call.function]
            try:
                baseline = plain[call.function]
            except ValueError:  # another schedule took it away
                return
            if structural_equal(function, baseline):
                return
            key = _key(_hash(function), _hash(baseline), call.arguments, self._machine)
            if key not in self._tasks:
                self._tasks[key] = _Task(
                    function, tunable, baseline, call.arguments, call.outputs, key, choices
                )
            named[call.function] = self._tasks[key]
        task = named[call.function]
        task.calls += call.times
        task.work += call.times * _points(task.function.body, call.use)

    def run(self, seconds: float) -> None:
        """Try schedules for so long; with none, use what the records have."""
        with Trials(self._where.facts) as trials:
            if seconds > 0:
                trials.start()
            start = time.monotonic()

            def left() -> float:
                return seconds - (time.monotonic() - start)

            for task in sorted(self._tasks.values(), key=lambda task: -task.work):
                # What is left when so much time went on finding what takes long takes little.
                record = self._tried(task, {}, trials, left() - (1 - FIRST_SHARE) * seconds)
                if record is not None:
                    task.seconds = record.baseline
            total = sum(task.calls * task.seconds for task in self._tasks.values())
            open_tasks = [
                task
                for task in self._tasks.values()
                if task.calls * task.seconds > LEAST_SHARE * total
            ]
            while open_tasks:
                task = max(open_tasks, key=lambda task: task.priority)
                settings = task.next()
                if settings is None:
                    open_tasks.remove(task)
                    continue
                record = self._tried(task, settings, trials, left())
                if record is None:
                    # Of what the records have, the rest may be nearer the end.
                    task.tried.add(_text(settings))
                    continue
                task.note(settings, record)
                task.tries += 1
                share = 1.0 if seconds <= 0 else min(1.0, 1 - left() / seconds)
                report("tune", share, f"{self.trials} trials, {self.faster} functions faster")

    @property
    def faster(self) -> int:
        """The number of functions with a faster schedule so far."""
        return sum(task.best is not None for task in self._tasks.values())

    def _tried(
        self, task: _Task, settings: ScheduleSettings, trials: Trials, left: float
    ) -> Record | None:
        """The record of a trial, which is made where there is none and time is left for it."""
        record = self._records.find(task.key, settings)
        if record is not None or left <= 0:
            return record
        record = self._trial(task, settings, trials, min(TRIAL_SECONDS, left))
        if record.failure and left < TRIAL_SECONDS:
            return None  # it may have been the end of the time that ended it
        self._records.add(record)
        return record

    def _trial(
        self, task: _Task, settings: ScheduleSettings, trials: Trials, limit: float
    ) -> Record:
        variant = task.baseline
        if settings:
            try:
                variant = self._variant(task, settings)
            except Exception as error:  # a rule that does not fit this choice
                return Record(task.key, settings, "", 0.0, 0.0, first_line(error))
        code = _hash(variant)
        if settings and code == _hash(task.baseline):
            return Record(task.key, settings, code, task.seconds, task.seconds)
        own, other = (tvm.ir.save_json(function) for function in (task.baseline, variant))
        answer = trials.run(own, other, task.arguments, task.outputs, limit)
        self.trials += 1
        failure = answer.get("failure", "")
        seconds, baseline = answer.get("seconds", 0.0), answer.get("baseline", 0.0)
        return Record(task.key, settings, code, seconds, baseline, failure)

    def _variant(self, task: _Task, settings: ScheduleSettings) -> tirx.PrimFunc:
        with self._where.target:
            return task.tunable.variant(task.function, self._where.target, settings)

    def result(self, number: int) -> TunedModule:
        """A module that was added, with the best schedules that were found."""
        module, named = self._modules[number]
        faster = {}
        for name, task in named.items():
            if task.best is None:
                continue
            variant = self._variant(task, task.settings)
            if _hash(variant) == task.best.code:
                faster[name] = variant
        chosen = sorted((name, _hash(function)) for name, function in faster.items())
        return TunedModule(module, faster, _key(_hash(module), chosen, self._machine))

    def share(self) -> float:
        """The share of the measured time that the functions with a faster schedule took."""
        total = sum(task.calls * task.seconds for task in self._tasks.values())
        found = [task for task in self._tasks.values() if task.best is not None]
        return sum(task.calls * task.seconds for task in found) / total if total else 0.0


# ---- what a module calls --------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A function with the tensors it is called with; the last ones are what it puts out."""

    function: str
    arguments: Sequence[Argument]
    outputs: int
    times: float
    use: Use


def calls(module: tvm.IRModule, uses: Mapping[str, Use]) -> Iterator[Call]:
    """The calls of a module's graphs, in order, with sizes for the symbols."""
    for graph, use in uses.items():
        for block in module[graph].body.blocks:
            for binding in block.bindings:
                call = binding.value
                if not isinstance(call, relax.Call) or call.op != tvm.ir.Op.get("relax.call_tir"):
                    continue
                kinds = [argument.ty for argument in call.args[1].fields]
                (result,) = call.ty_args
                outputs = list(result.fields) if isinstance(result, tvm.ir.TupleType) else [result]
                if not all(isinstance(kind, relax.TensorType) for kind in (*kinds, *outputs)):
                    continue  # a size is an argument of its own
                arguments = [
                    ([_size(size, use) for size in kind.shape], str(kind.dtype))
                    for kind in (*kinds, *outputs)
                ]
                yield Call(call.args[0].name_hint, arguments, len(outputs), use.times, use)


def _points(statement: Any, use: Use) -> int:
    """Runs of the statements within loops."""
    if isinstance(statement, tirx.For):
        return _size(statement.extent, use) * _points(statement.body, use)
    if isinstance(statement, tirx.SeqStmt):
        return sum(_points(part, use) for part in statement.seq)
    if isinstance(statement, tvm.s_tir.SBlockRealize):
        return _points(statement.block.body, use)
    return 1


def _size(size: Any, use: Use) -> int:
    def known(var: Any) -> Any:
        return IntImm("int64", use.classes if var.name == "classes" else use.batch)

    value = Analyzer().simplify(structural_map(size, [(tirx.Var, known)]))
    return int(value.value)


def _hash(value: Any) -> str:
    return f"{structural_hash(value, map_free_vars=True) % 2**64:016x}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _key(*parts: Any) -> str:
    return hashlib.sha256(_text(parts).encode()).hexdigest()[:16]
