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
    "linkat,symlink,symlinkat,execve"
)
_MAKES = re.compile(r" (?:mkdir(?:at)?|mknod(?:at)?|creat|rename(?:at2?)?|(?:sym)?link(?:at)?)\(")
_LINE = re.compile(r"(?P<pid>\d+)<(?P<program>[^>]*)> +(?P<call>.*)")
# How pip is run: by itself, or as what a program imports.
_PIP = re.compile(r'/pip"|pip\._internal')
_PATHS = re.compile(r'"([^"]*)"')


@dataclass(frozen=True)
class Trace:
    """What a program and all that it started asked the system for, by the names of programs.

    pip, which Python runs, is a program of its own here.
    """

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

    def reached(self, *, but_by: Sequence[str] = ()) -> list[str]:
        """Return the calls for sockets to another machine, by any other program than these.

        A name service of this one may be asked who the user is.
        """
        return [
            call
            for program, call in self.sockets
            if "AF_UNIX" not in call and program not in but_by
        ]


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
    pips: set[str] = set()
    for line in log.read_text(errors="replace").splitlines():
        found = _LINE.match(line)
        if found is None or " = -1 E" in line:
            continue
        pid, call = found["pid"], found["call"]
        program = "pip" if pid in pips else found["program"]
        if call.startswith("execve("):
            (pips.add if _PIP.search(call) else pips.discard)(pid)
        elif re.match(r"(?:socket|connect)\(", call):
            sockets.append((program, call))
        elif _MAKES.match(f" {call}") or "O_CREAT" in call:
            paths = _PATHS.findall(call)
            if "link" in call.split("(")[0]:  # what it leads to is not made
                del paths[:-1]
            made += [(program, path) for path in paths]
    return Trace(made, sockets)
