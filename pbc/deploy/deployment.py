"""Deploy a bundle over ssh, go back to the one before, say what is there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbc.bundle import Bundle
from pbc.bundle.keys import PublicKey, read_keys
from pbc.bundle.trust import Signer, configured, require
from pbc.deploy import board
from pbc.deploy.connection import Connection, Destination, Session
from pbc.deploy.libraries import libraries
from pbc.deploy.payload import PROBE, SCRIPT, Payload, needs, payload
from pbc.deploy.requirements import device_requirements
from pbc.deploy.wheels import BoardPython, board_python, collect
from pbc.errors import PbcError, UsageError, suggest
from pbc.util import strict_json
from pbc.util.sizes import size_text

_CHUNK_BYTES = 1 << 18

Report = Callable[[str], None]


@dataclass(frozen=True)
class DeployOptions:
    """Settings of a deploy: the way to a board, and what to bring.

    ssh_options: words for ssh. python: the interpreter there. wheels, offline: see
    pbc.deploy.wheels.collect. ignore: checks of the board that are not to stop anything.
    trust: files of public keys, or folders of them: one of these must have signed the bundle, and
    the board takes them for its own unless it has some; by default those that $PBC_KEYS names.
    allow_older: whether the bundle may be older than the active one, by the serials of signatures.
    """

    ssh_options: tuple[str, ...] = ()
    python: str = ""
    wheels: Path | None = None
    offline: bool = False
    ignore: tuple[str, ...] = ()
    trust: tuple[str, ...] = ()
    allow_older: bool = False

    def __post_init__(self) -> None:
        """Refuse checks that do not exist."""
        for name in self.ignore:
            if name not in board.CHECKS:
                raise UsageError(suggest("check", name, board.CHECKS))


def deploy(
    bundle: Path | str, destination: str, options: DeployOptions, report: Report
) -> dict[str, Any]:
    """Make a bundle the active one on a board; return what the board says about it.

    Raises PbcError, and then what was active there still is.
    """
    opened = Bundle.open(bundle)
    keys = read_keys(os.pathsep.join(options.trust)) if options.trust else configured()
    signer = require(opened, keys)
    needed = needs(opened)
    connection = _connection(destination, options)
    facts = probe(connection, options)
    refuse(connection.destination, facts, needed, options.ignore)
    report(f"{connection.destination.host}: {_summary(facts)}")
    python = board_python(facts)
    ready = prepared(
        opened,
        python,
        wheels=options.wheels,
        offline=options.offline,
        ignore=options.ignore,
        keys=keys,
        signer=signer,
        allow_older=options.allow_older,
    )
    return _Conversation(connection, facts["python"], report).install(ready)


def rollback(destination: str, options: DeployOptions, report: Report) -> dict[str, Any]:
    """Make the version before the active one active again."""
    connection = _connection(destination, options)
    facts = probe(connection, options)
    return _Conversation(connection, _interpreter(connection, facts), report).ask("rollback")


def status(destination: str, options: DeployOptions) -> dict[str, Any]:
    """Return what is active on a board, what was before, and what was left half-made."""
    connection = _connection(destination, options)
    facts = probe(connection, options)
    return _Conversation(connection, _interpreter(connection, facts), _quiet).ask("status")


def _quiet(line: str) -> None:
    """Report nothing: a question takes no steps worth showing."""


def prepared(
    bundle: Bundle,
    python: BoardPython,
    *,
    wheels: Path | None = None,
    offline: bool = False,
    ignore: Sequence[str] = (),
    keys: Mapping[str, PublicKey] | None = None,
    signer: Signer | None = None,
    allow_older: bool = False,
) -> Payload:
    """Collect all that a board with this Python needs for a bundle; keys: those of the board."""
    requirements = device_requirements(bundle.manifest, trust=keys is not None)
    found = libraries(bundle.manifest, python, wheels=wheels, offline=offline)
    collected = collect(requirements, python, wheels=wheels, offline=offline)
    return payload(
        bundle,
        collected,
        found,
        requirements,
        python.version,
        ignore,
        keys=keys,
        serial=None if signer is None else signer.serial,
        allow_older=allow_older,
    )


def probe(connection: Connection, options: DeployOptions) -> dict[str, str]:
    """Ask a board for its facts."""
    words = ["sh", "-s", "--", connection.destination.folder, options.python, ""]
    return board.parse_facts(connection.run(words, PROBE))


def refuse(
    destination: Destination,
    facts: Mapping[str, str],
    needed: Mapping[str, Any],
    ignore: Sequence[str],
) -> None:
    """Raise PbcError with a line for each check that a board fails."""
    found = board.refusals(facts, needed)
    lines = [line for name, line in found.items() if name not in ignore]
    if lines:
        raise PbcError(*(f"{destination.host}: {line}" for line in lines))


def _connection(destination: str, options: DeployOptions) -> Connection:
    return Connection(Destination.parse(destination), options.ssh_options)


def _interpreter(connection: Connection, facts: Mapping[str, str]) -> str:
    refuse(connection.destination, facts, {"requires": {}}, ("arch", "libc"))
    return facts["python"]


def _summary(facts: Mapping[str, str]) -> str:
    memory, disk = (int(facts.get(name, 0)) / 2**20 for name in ("memory_kib", "disk_kib"))
    return (
        f"{facts['machine']}, {facts['libc']}, Python {facts['python_version']}, "
        f"{memory:.1f} GiB of memory, {disk:.1f} GiB of disk left"
    )


class _Conversation:
    """One command of board.py over one connection."""

    def __init__(self, connection: Connection, interpreter: str, report: Report) -> None:
        self._connection = connection
        self._interpreter = interpreter
        self._report = report

    def install(self, ready: Payload) -> dict[str, Any]:
        with self._started({"command": "install", "plan": ready.plan}) as session:
            return self._result(session, ready)

    def ask(self, command: str) -> dict[str, Any]:
        with self._started({"command": command}) as session:
            return self._result(session, None)

    @contextmanager
    def _started(self, request: Mapping[str, Any]) -> Iterator[Session]:
        """Send the script, which Python reads from its input to the byte, and then the request."""
        code = f"import sys; exec(sys.stdin.buffer.read({len(SCRIPT)}))"
        with self._connection.open(["exec", self._interpreter, "-I", "-c", code]) as session:
            root = self._connection.destination.folder
            self._send(session, SCRIPT + _line({**request, "root": root}))
            yield session

    def _send(self, session: Session, data: bytes) -> None:
        try:
            session.write.write(data)
            session.write.flush()
        except BrokenPipeError:
            # The board closed it and has said why: that is read next.
            return

    def _result(self, session: Session, ready: Payload | None) -> dict[str, Any]:
        for line in session.read:
            try:
                message = strict_json.loads(line)
            except ValueError:
                continue  # a login shell's own greeting
            if not isinstance(message, dict):
                continue
            if "result" in message:
                result: dict[str, Any] = message["result"]
                return result
            if "error" in message:
                raise PbcError(f"{self._connection.destination}: {message['error']}")
            if "step" in message:
                self._report(message["step"])
                self._send(session, _line("go"))
            if "missing" in message:
                assert ready is not None
                self._copy(session, ready, message["missing"])
        raise session.failure()

    def _copy(self, session: Session, ready: Payload, missing: Sequence[Mapping[str, Any]]) -> None:
        """Send what the board lacks, from where an earlier attempt ended if that much is right."""
        names = {f["sha256"]: f["path"] for f in [*ready.plan["slot"], *ready.plan["wheels"]]}
        total = 0
        for wanted in missing:
            data = ready.sources[wanted["sha256"]]()
            offset = wanted["offset"]
            if hashlib.sha256(data[:offset]).hexdigest() != wanted["so_far"]:
                offset = 0
            self._report(f"copy {names[wanted['sha256']]} ({size_text(len(data) - offset)})")
            self._send(session, _line({"sha256": wanted["sha256"], "offset": offset}))
            for start in range(offset, len(data), _CHUNK_BYTES):
                self._send(session, data[start : start + _CHUNK_BYTES])
            total += len(data) - offset
        if missing:
            self._report(f"copied {total} bytes in {len(missing)} files")


def _line(content: Any) -> bytes:
    return json.dumps(content).encode() + b"\n"
