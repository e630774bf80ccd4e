"""Tune a program's libraries: those with faster functions stay only if their graphs are faster."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tvm
from tvm_ffi import structural_equal

from pbc.bundle.graph_name import FORWARD, PREFIX
from pbc.ir.program import Program
from pbc.ir.work import TRIALS
from pbc.lower.iteration import PREFIX_BATCHES, IterationTimer
from pbc.target import Target
from pbc.targets.tvm.build import Platform, compiled, platform_of, runs_here
from pbc.targets.tvm.convert import function_of
from pbc.targets.tvm.tuning.records import Record, Records
from pbc.targets.tvm.tuning.schedule_search import ScheduleSearch, TunedModule, Use

if TYPE_CHECKING:
    from pbc.targets.tvm.lowering import TvmLowering

# Classes of a head while it is tuned, where the device decides that.
CLASSES = 100
ROUNDS = 12
WHOLE = {"functions": "all"}


def untunable(target: Target) -> str | None:
    """Return why this machine cannot measure code for a target, and what to do; else None."""
    if runs_here(target):
        return None
    is_gpu = platform_of(target).sm is not None
    what = "a GPU's code" if is_gpu else f"code for {target.name}"
    return (
        f"--tune measures on this machine, which does not run {what}; compile on the board itself "
        "with --target host, or here without --tune"
    )


@dataclass(frozen=True)
class _Library:
    """A module, the first level that has it, and whether it is a prefix or a body."""

    module: tvm.IRModule
    level: int
    is_prefix: bool
    number: int


def tune(lowering: TvmLowering, program: Program, seconds: float) -> dict[str, Any]:
    """ScheduleSearch for so long; what the lowering makes from now on has what is faster."""
    start = time.monotonic()
    where = platform_of(program.request.target)
    records = Records(None if program.request.work is None else program.request.work / TRIALS)
    search = ScheduleSearch(where, records)
    libraries = _libraries(lowering, program, search)
    search.run(seconds)
    comparison = _Comparison(lowering, program, where, records, search)
    levels: dict[str, dict[str, float]] = {}
    for level in sorted({library.level for library in libraries}):
        own = [library for library in libraries if library.level == level]
        measured = comparison.seconds(level, own)
        for library, record in zip(own, measured, strict=True):
            content = comparison.content(library, better=record.gain > 1)
            lowering.keep(where, library.module, content)
        levels[str(level)] = {
            "before_ms": round(sum(r.baseline for r in measured) * 1000, 3),
            "after_ms": round(sum(min(r.baseline, r.seconds) for r in measured) * 1000, 3),
        }
    before = sum(level["before_ms"] for level in levels.values())
    after = sum(level["after_ms"] for level in levels.values())
    found = {
        "seconds": round(time.monotonic() - start, 1),
        "trials": search.trials,
        "functions": search.functions,
        "faster": search.faster,
        "share": round(search.share(), 3),
        "levels": levels,
    }
    notes: tuple[str, ...] = (
        f"tuned {search.faster} of {search.functions} functions in {found['seconds']:.0f} s "
        f"({search.trials} trials): a training iteration takes {after / before:.2f} of its time",
    )
    if records.damaged:
        lines, were = ("line", "was") if records.damaged == 1 else ("lines", "were")
        notes += (f"{records.damaged} damaged {lines} of {TRIALS} {were} dropped",)
    return {**found, "notes": notes}


def _libraries(lowering: TvmLowering, program: Program, search: ScheduleSearch) -> list[_Library]:

    libraries: list[_Library] = []
    request = program.request
    for names in lowering.groups(program).values():
        level = names[0].level
        if level is None:  # the policy is no part of a training iteration
            continue
        module, _ = lowering.converted(program, {function_of(n): program.graphs[n] for n in names})
        if any(structural_equal(module, other.module) for other in libraries):
            continue
        is_prefix = names[0].role == PREFIX
        updates = [name for name in names if name.optimizer is not None]
        iterated = [name for name in names if name.role in (PREFIX, FORWARD)] or names
        calls = PREFIX_BATCHES[-1] if is_prefix else 1
        classes = CLASSES if request.class_count is None else request.class_count
        uses = {
            function_of(name): Use(times / calls, calls * request.batch, classes)
            for group, times in ((iterated, 1.0), (updates, 1 / max(1, len(updates))))
            for name in group
        }
        number = search.add(module, uses)
        libraries.append(_Library(module, level, is_prefix, number))
    return libraries


class _Comparison:
    """Each library built with its faster functions and without, and the seconds of both.

    What is faster alone need not be among the others, whose weights take its place in the caches.
    """

    def __init__(
        self,
        lowering: TvmLowering,
        program: Program,
        where: Platform,
        records: Records,
        search: ScheduleSearch,
    ) -> None:

        self._program, self._where, self._records, self._search = program, where, records, search
        self._sides = {better: type(lowering)() for better in (False, True)}
        self._tuned: dict[int, TunedModule] = {}
        self._contents: dict[tuple[int, bool], bytes] = {}

    def tuned(self, library: _Library) -> TunedModule:
        if library.number not in self._tuned:
            self._tuned[library.number] = self._search.result(library.number)
        return self._tuned[library.number]

    def content(self, library: _Library, better: bool) -> bytes:
        """The library, with its faster functions or without."""
        tuned = self.tuned(library)
        place = (library.number, better and bool(tuned.faster))
        if place not in self._contents:
            module = tuned.replaced() if place[1] else tuned.module
            self._contents[place] = compiled(module, self._where)
        return self._contents[place]

    def seconds(self, level: int, libraries: Sequence[_Library]) -> list[Record]:
        """Return seconds per mini-batch of the libraries that a level is the first to have."""
        known = [self._records.find(self.tuned(library).key, WHOLE) for library in libraries]
        if None in known:
            known = list(self._measured(level, libraries))
        return [record for record in known if record is not None]

    def _measured(self, level: int, libraries: Sequence[_Library]) -> Iterator[Record]:
        timers = {}
        for better, lowering in self._sides.items():
            for library in libraries:
                lowering.keep(self._where, library.module, self.content(library, better))
            graphs = self._program.levels[level]
            timers[better] = IterationTimer(
                lowering.runner(self._program, graphs), self._program, graphs
            )
        for turn in range(ROUNDS):
            for timer in timers.values():
                timer.measure(warm_up=turn == 0)
        for library in libraries:
            plain, fast = (
                timers[better].prefix_seconds()
                if library.is_prefix
                else timers[better].step_seconds()
                for better in (False, True)
            )
            if not self.tuned(library).faster:
                fast = plain
            key = self.tuned(library).key
            record = Record(key, WHOLE, key, fast, plain)
            self._records.add(record)
            yield record
