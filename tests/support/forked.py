"""Commands in processes that are forked from one with everything loaded: no start, own limits."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pbc.cli import main
from pbc.runtime.engines.bounds import training_bytes

# Fails what takes more than any case may, for which a bound should have been met before.
_ADDRESSES_BYTES = 1 << 30
_CPU_SECONDS = 20


@dataclass(frozen=True)
class Ended:
    """How a command ended. status: None for one that a signal ended."""

    status: int | None
    signal: str | None
    printed: str
    cpu_seconds: float
    peak_bytes: int


def start(words: Sequence[object], printed: Path) -> int:
    """Run `pbc WORDS` in a process of its own, with what it prints in a file; return its id."""
    child = os.fork()
    if child == 0:
        _be_the_command([str(word) for word in words], printed)
    return child


def end(child: int, printed: Path) -> Ended:
    """Wait for a command that `start` started."""
    _, status, used = os.wait4(child, 0)
    killed = os.WIFSIGNALED(status)
    return Ended(
        None if killed else os.WEXITSTATUS(status),
        signal.Signals(os.WTERMSIG(status)).name if killed else None,
        printed.read_bytes().decode(errors="replace"),
        used.ru_utime + used.ru_stime,
        used.ru_maxrss * 1024,
    )


def run(words: Sequence[object], printed: Path) -> Ended:
    """Run `pbc WORDS` to its end."""
    return end(start(words, printed), printed)


def _be_the_command(words: list[str], printed: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    handle = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + _ADDRESSES_BYTES,) * 2)
    training_bytes.cache_clear()  # it was of a process without limits
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    status = 0
    try:
        main.main(args=words, prog_name="pbc")
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
