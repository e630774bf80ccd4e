"""Processes: one for a network, which builds and exports it, with a fork for each of its cells."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path

import one_export
import torch
from cell import Cell, Result, Subject, run

MEMORY_BYTES = 6 * 2**30

# Imports take longer than many a cell: a server has done them, and is forked for each network.
_SERVER = multiprocessing.get_context("forkserver")
_FORK = multiprocessing.get_context("fork")


@dataclass
class _Running:
    """A network's process: cells it has not answered, and when it began with the first of them."""

    cells: list[Cell]
    process: ForkServerProcess
    results: Connection
    folder: tempfile.TemporaryDirectory[str]
    started: float


def results(
    cells: Iterable[Cell], jobs: int, limit_seconds: float
) -> Iterator[tuple[Cell, Result, float]]:
    """Run all cells, `jobs` networks at a time, and yield each with its result and seconds.

    Neighbours of one network share its process; the first one's seconds hold the export. A cell
    that dies or outlives its limit has a result too. None goes on when the caller stops.
    """
    _SERVER.set_forkserver_preload(["preload"])
    waiting = [list(group) for _, group in itertools.groupby(cells, lambda cell: cell.network)]
    waiting.reverse()
    running: list[_Running] = []
    try:
        while waiting or running:
            while len(running) < jobs and waiting:
                running.append(_started(waiting.pop()))
            oldest = min(one.started for one in running)
            left = max(0.0, oldest + limit_seconds - time.monotonic())
            ready = wait([one.results for one in running], left)
            for one in list(running):
                seconds = time.monotonic() - one.started
                overdue = seconds >= limit_seconds
                if one.results not in ready and not overdue:
                    continue
                result = _result(one) if one.results in ready else _over(limit_seconds)
                yield one.cells.pop(0), result, seconds
                one.started = time.monotonic()
                if overdue or not one.cells or one.process.exitcode is not None:
                    running.remove(one)
                    _end(one)
                    if one.cells:
                        waiting.append(one.cells)
    finally:
        for one in running:
            _end(one)


def _started(cells: list[Cell]) -> _Running:
    ours, theirs = _SERVER.Pipe(duplex=False)
    folder = tempfile.TemporaryDirectory()
    process = _SERVER.Process(target=_serve, args=(cells, Path(folder.name), theirs))
    process.start()
    theirs.close()
    return _Running(cells, process, ours, folder, time.monotonic())


def _serve(cells: Sequence[Cell], folder: Path, connection: Connection) -> None:
    """Send the result of each cell, in order."""
    os.setpgrp()  # ends with its forks
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)  # the cells beside this one want the other cores
    subject = _prepared(cells[0], folder)
    for cell in cells:
        connection.send(_forked(cell, subject))


def _prepared(cell: Cell, folder: Path) -> Subject | None:
    """Build and export the network; None where that fails, for then each cell says why."""
    try:
        subject = Subject.of(cell.network, folder)
    except Exception:
        return None
    one_export.share(lambda: subject.compiled(cell))
    return subject


def _forked(cell: Cell, subject: Subject | None) -> Result:
    ours, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_send, args=(cell, subject, theirs))
    process.start()
    theirs.close()
    try:
        result: Result = ours.recv()
    except EOFError:
        process.join()
        return _died(process)
    process.kill()  # its engine may have threads left
    process.join()
    return result


def _send(cell: Cell, subject: Subject | None, connection: Connection) -> None:
    connection.send(run(cell, subject))


def _result(one: _Running) -> Result:
    """What a network's process sends for its next cell."""
    try:
        result: Result = one.results.recv()
    except EOFError:
        one.process.join()
        return _died(one.process)
    return result


def _died(process: BaseProcess) -> Result:
    code = process.exitcode or 0
    if code == -signal.SIGKILL:
        return Result("limit", "memory: killed")
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return Result("traceback", f"the process died: {name}")


def _over(limit_seconds: float) -> Result:
    return Result("limit", f"time: more than {limit_seconds:.0f} s")


def _end(one: _Running) -> None:
    """Kill a network's process and its forks."""
    assert one.process.pid is not None
    try:
        os.killpg(one.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        one.process.kill()  # it has not its own group yet, or has ended
    one.process.join()
    one.results.close()
    one.folder.cleanup()
