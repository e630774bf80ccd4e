"""Connection by the system's own ssh and the user's configuration; it never asks anything."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, BinaryIO

from pbc.errors import PbcError, UsageError

FOLDER = "pbc"
_FORM = re.compile(r"(?P<host>(?:[^@\s:]+@)?(?:\[[^\]\s]+\]|[^:\s@\[\]]+))(?::(?P<folder>.*))?")
# A dead connection ends after a minute; a board that is not there, after fifteen seconds.
_SETTINGS = (
    "-oBatchMode=yes",
    "-oConnectTimeout=15",
    "-oServerAliveInterval=15",
    "-oServerAliveCountMax=4",
)
# What ssh itself ends with when it could not connect, or was cut off; a signal does the same.
_SSH_FAILED = 255
_CLOSE_SECONDS = 15


@dataclass(frozen=True)
class Destination:
    """Destination of a deploy: a host as ssh knows it, and a folder there."""

    host: str
    folder: str = FOLDER

    @classmethod
    def parse(cls, text: str) -> Destination:
        """Read USER@HOST[:DIR]; a relative DIR is in the user's home there."""
        found = _FORM.fullmatch(text)
        if found is None or text.startswith("-"):
            raise UsageError(f"{text!r} is not USER@HOST[:DIR], like pi@raspberry:/opt/pbc")
        folder = (found["folder"] or FOLDER).removeprefix("~/").rstrip("/")
        if not folder or folder == "~" or "\n" in folder:
            raise UsageError(f"{text!r} names no folder of its own to deploy to")
        return cls(found["host"], folder)

    def __str__(self) -> str:
        return f"{self.host}:{self.folder}"


@dataclass(frozen=True)
class Connection:
    """Runs commands on a board.

    options: words for ssh before the host; what they set comes before settings of our own.
    """

    destination: Destination
    options: tuple[str, ...] = ()

    def run(self, words: Sequence[str], given: bytes) -> str:
        """Run a command with something on its stdin, and return what it prints."""
        with self.open(words) as session:
            output = session.converse(given)
        return output.decode(errors="replace")

    @contextmanager
    def open(self, words: Sequence[str]) -> Iterator[Session]:
        """Start a command to speak with; it ends with the block."""
        command = shlex.join(words)
        # ssh takes addresses of IPv6 without brackets.
        host = self.destination.host.replace("[", "").replace("]", "")
        arguments = ["ssh", "-T", *self.options, *_SETTINGS, "--", host, command]
        with tempfile.TemporaryFile() as said:
            try:
                process = subprocess.Popen(
                    arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
                )
            except FileNotFoundError as error:
                raise PbcError("ssh, which deploying needs, is not installed") from error
            assert process.stdin is not None
            assert process.stdout is not None
            session = Session(process, self.destination.host, said)
            try:
                yield session
            finally:
                session.close()


@dataclass(frozen=True)
class Session:
    """Running command on the board: its stdin, its stdout, and why it ended."""

    process: subprocess.Popen[bytes]
    host: str
    said: IO[bytes]

    @property
    def write(self) -> BinaryIO:
        assert self.process.stdin is not None
        return self.process.stdin  # type: ignore[return-value]

    @property
    def read(self) -> BinaryIO:
        assert self.process.stdout is not None
        return self.process.stdout  # type: ignore[return-value]

    def converse(self, given: bytes) -> bytes:
        """Give everything at once, and return everything that comes until the command's end."""
        output, _ = self.process.communicate(given)
        if self.process.returncode != 0:
            raise self.failure()
        return output

    def failure(self) -> PbcError:
        """Return the error that says why the command ended, in its last words or ssh's."""
        self.close()
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").splitlines()
        words = [line.strip() for line in lines if line.strip()]
        if self.process.returncode == _SSH_FAILED or self.process.returncode < 0:
            reason = words[-1] if words else "the connection was cut"
            if "HOST IDENTIFICATION HAS CHANGED" in " ".join(words):
                reason += " The host's key is not the one that ~/.ssh/known_hosts has"
            return PbcError(f"ssh cannot reach {self.host}, or lost it: {reason}")
        reason = words[-1] if words else f"the command ended with {self.process.returncode}"
        return PbcError(f"{self.host}: {reason}")

    def close(self) -> None:
        """End the command: it is told by the end of its input."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue
        if self.process.poll() is None:
            try:
                self.process.wait(timeout=_CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
