"""Processes: each cell in one of its own, with limits of time and memory."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess

import torch
from cell import Cell, Result, run

MEMORY_BYTES = 6 * 2**30

# Imports take longer than many a cell: a server has done them, and is forked for each.
_CONTEXT = multiprocessing.get_context("forkserver")
# What a process with a result has left to do before it is killed.
_END_SECONDS = 10.0


@dataclass(frozen=True)
class _Running:
    cell: Cell
    process: ForkServerProcess
    results: Connection
    started: float


def results(
    cells: Iterable[Cell], jobs: int, limit_seconds: float
) -> Iterator[tuple[Cell, Result, float]]:
    """Run all cells, `jobs` at a time, and yield each with its result and seconds when it ends.

    A cell that dies or outlives its limit has a result too. None goes on when the caller stops.
    """
    _CONTEXT.set_forkserver_preload(["cell"])
    waiting = iter(cells)
    running: list[_Running] = []
    try:
        while True:
            while len(running) < jobs and (cell := next(waiting, None)) is not None:
                running.append(_started(cell))
            if not running:
                return
            oldest = min(one.started for one in running)
            left = max(0.0, oldest + limit_seconds - time.monotonic())
            ended = wait([one.results for one in running], left)
            for one in list(running):
                seconds = time.monotonic() - one.started
                if one.results in ended:
                    result = _result(one)
                elif seconds >= limit_seconds:
                    result = Result("limit", f"time: more than {limit_seconds:.0f} s")
                else:
                    continue
                running.remove(one)
                _end(one)
                yield one.cell, result, seconds
    finally:
        for one in running:
            _end(one)


def _started(cell: Cell) -> _Running:
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_send, args=(cell, theirs))
    process.start()
    theirs.close()
    return _Running(cell, process, ours, time.monotonic())


def _send(cell: Cell, connection: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)  # the cells beside this one want the other cores
    connection.send(run(cell))


def _result(one: _Running) -> Result:
    try:
        result: Result = one.results.recv()
    except EOFError:
        one.process.join()
        return _died(one.process.exitcode or 0)
    one.process.join(_END_SECONDS)
    return result


def _died(exit_code: int) -> Result:
    if exit_code == -signal.SIGKILL:
        return Result("limit", "memory: killed")
    name = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
    return Result("traceback", f"the process died: {name}")


def _end(one: _Running) -> None:
    one.process.kill()
    one.process.join()
    one.results.close()
