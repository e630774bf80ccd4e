"""Fresh processes for measuring, one after the other."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from pbc.errors import PbcError, UsageError
from pbc.profile.task import Task
from pbc.util.interrupt import deferred_interrupt

_LONGEST_WAIT_SECONDS = 0.5


def measured(task: Task, environment: Mapping[str, str]) -> dict[str, Any]:
    """Have a fresh process do a task, and return its answer.

    It is a group of its own: Ctrl-C ends this process, which then ends it and its own children.
    """
    began = time.monotonic()
    with _started({**environment, "OMP_NUM_THREADS": str(task.threads)}) as process:
        try:
            line = _answer(process, json.dumps(replace(task, began=began).to_json()))
        except BrokenPipeError:
            line = ""
        code = process.wait()
    if code < 0:
        raise PbcError(
            f"a measuring process was ended by signal {-code}"
            + ("; if memory is short, a smaller --batch needs less" if code == -9 else "")
        )
    if not line:
        raise RuntimeError(f"a measuring process failed (exit code {code})")
    reply: dict[str, Any] = json.loads(line)
    if "error" in reply:
        kind = UsageError if reply["exit_code"] == UsageError.exit_code else PbcError
        raise kind(reply["error"])
    return reply


@contextmanager
def _started(environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Start a measuring process, and end it and its children with the block, however that ends."""
    process = None
    try:
        # An interrupt within Popen would leave a process that nobody knows.
        with deferred_interrupt() as interrupt:
            process = subprocess.Popen(
                [sys.executable, "-c", "from pbc.profile.worker import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,
                text=True,
            )
        if interrupt.requested:
            raise KeyboardInterrupt
        yield process
    finally:
        if process is not None:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(BrokenPipeError), process:
                pass


def _answer(process: subprocess.Popen[str], question: str) -> str:
    """Send a line, and wait for one; it is empty where the process ends without."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(question + "\n")
    process.stdin.flush()
    # A signal that comes just before a read begins does not interrupt it: none waits for long.
    while not select.select([process.stdout], [], [], _LONGEST_WAIT_SECONDS)[0]:
        pass
    return process.stdout.readline()
