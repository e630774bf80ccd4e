"""Fresh processes for measuring, one after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pbc.errors import PbcError, UsageError
from pbc.profile.task import Task


def measured(task: Task, environment: Mapping[str, str]) -> dict[str, Any]:
    """Have a fresh process do a task, and return its answer.

    It is a group of its own: Ctrl-C ends this process, which then ends it and its own children.
    """
    command = [sys.executable, "-c", "from pbc.profile.worker import main; main()"]
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**environment, "OMP_NUM_THREADS": str(task.threads)},
        start_new_session=True,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            process.stdin.write(json.dumps(replace(task, began=began).to_json()) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
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
