"""Programs under strace: what files they make, and which sockets they open."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# What makes a file, a folder or a link, or reaches another machine.
_CALLS = (
    "socket,connect,open,openat,creat,mkdir,mkdirat,mknod,mknodat,rename,renameat,renameat2,link,"
    "linkat,symlink,symlinkat"
)
_MAKES = re.compile(r" (?:mkdir(?:at)?|mknod(?:at)?|creat|rename(?:at2?)?|(?:sym)?link(?:at)?)\(")
_LINE = re.compile(r"(?P<pid>\d+)<(?P<program>[^>]*)> +(?P<call>.*)")
_PATHS = re.compile(r'"([^"]*)"')


@dataclass(frozen=True)
class Trace:
    """What a program and all that it started asked the system for, by the names of programs."""

    made: list[tuple[str, str]]
    sockets: list[tuple[str, str]]

    def made_outside(self, *folders: Path | str, but_by: Sequence[str] = ()) -> list[str]:
        """Return what was made elsewhere than below these folders, by any other program."""
        allowed = tuple(map(str, folders))
        return [
            path
            for program, path in self.made
            if path.startswith("/") and not path.startswith(allowed) and program not in but_by
        ]

    def reached_by(self) -> set[str]:
        """Return the programs that opened a socket to another machine.

        A name service of this one may be asked who the user is.
        """
        return {program for program, call in self.sockets if "AF_UNIX" not in call}


def command(log: Path) -> list[str]:
    """Return the words in front of a command that write its calls into a file."""
    return ["strace", "-f", "-Y", "--seccomp-bpf", "-qq", "-s", "300", "-e", f"trace={_CALLS}",
            "-o", str(log)]  # fmt: skip


def run(
    words: Sequence[str], log: Path, *, cwd: Path, environment: Mapping[str, str]
) -> tuple[subprocess.CompletedProcess[str], Trace]:
    """Run a command to its end; return what it printed, and its calls."""
    result = subprocess.run(
        [*command(log), *words],
        cwd=cwd, env=dict(environment), capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result, read(log)


def read(log: Path) -> Trace:
    """Read the calls that did something."""
    made: list[tuple[str, str]] = []
    sockets: list[tuple[str, str]] = []
    for line in log.read_text(errors="replace").splitlines():
        found = _LINE.match(line)
        if found is None or " = -1 E" in line:
            continue
        program, call = found["program"], found["call"]
        if re.match(r"(?:socket|connect)\(", call):
            sockets.append((program, call))
        elif _MAKES.match(f" {call}") or "O_CREAT" in call:
            made += [(program, path) for path in _PATHS.findall(call)]
    return Trace(made, sockets)
