"""Processes: each cell in one of its own, with limits of time and memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection

from cell import Cell, Result, run

MEMORY_BYTES = 6 * 2**30

# What a process with a result has left to do before it is killed.
_END_SECONDS = 10.0
# Imports take longer than many a cell: a server has done them, and is forked for each.
_CONTEXT = multiprocessing.get_context("forkserver")


def results(
    cells: Iterable[Cell], jobs: int, limit_seconds: float
) -> Iterator[tuple[Cell, Result, float]]:
    """Run all cells, `jobs` at a time, and yield each with its result and seconds when it ends."""
    _CONTEXT.set_forkserver_preload(["cell"])

    def timed(cell: Cell) -> tuple[Cell, Result, float]:
        started = time.monotonic()
        result = in_process(cell, limit_seconds)
        return cell, result, time.monotonic() - started

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(timed, cell) for cell in cells]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def in_process(cell: Cell, limit_seconds: float) -> Result:
    """Run a cell in a fresh process; one that dies, or outlives its limit, has a result too."""
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_send, args=(cell, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit_seconds):
            return Result("limit", f"time: more than {limit_seconds:.0f} s")
        result: Result = ours.recv()
        process.join(_END_SECONDS)
        return result
    except EOFError:
        process.join()
        return _died(process.exitcode or 0)
    finally:
        process.kill()
        process.join()
        ours.close()


def _send(cell: Cell, connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    connection.send(run(cell))


def _died(exit_code: int) -> Result:
    if exit_code == -signal.SIGKILL:
        return Result("limit", "memory: killed")
    name = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
    return Result("traceback", f"the process died: {name}")
