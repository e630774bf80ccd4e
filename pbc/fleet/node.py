"""A resident node: Flower's SuperNode carries the messages, this process trains.

A SuperNode starts a process for every message, which imports everything anew and runs the app that
the server sent. Here it is told that apps run elsewhere, and this process asks it for work, as
Flower's SuperExec does: the trainer stays, and the code that a server sends is never unpacked.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from pbc.errors import PbcError
from pbc.fleet.client import open_client
from pbc.fleet.messages import Reply, answering_as
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.folder import Output
from pbc.runtime.runtime import Runtime
from pbc.util.atomic import replace_bytes
from pbc.util.terminal import one_line

_POLL_SECONDS = 0.2
_LOOPBACK = "127.0.0.1"
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


@dataclass(frozen=True)
class Link:
    """Where a node's server is, and how the two know each other.

    superlink: host:port. root_certificates: of the authority that vouches for the server; the
    system's without. private_key: by which the server knows this node. insecure: no TLS.
    """

    superlink: str
    root_certificates: Path | None = None
    private_key: Path | None = None
    insecure: bool = False

    def arguments(self) -> list[str]:
        """Return the options of `flower-supernode`."""
        found = ["--superlink", self.superlink]
        if self.insecure:
            found.append("--insecure")
        if self.root_certificates is not None:
            found += ["--root-certificates", str(self.root_certificates)]
        if self.private_key is not None:
            found += ["--auth-supernode-private-key", str(self.private_key)]
        return found


def resident(
    link: Link,
    bundle: Path,
    photos: Path,
    out: Path,
    options: TrainOptions,
    tell: Callable[[str], None],
    *,
    secure: bool = False,
) -> None:
    """Train the bundle on this device's photos whenever its server asks, until interrupted.

    out: the device's folder. secure: answer in masked sums alone. What it refuses, the server is
    told. Raises PbcError for a bundle that is none, and where the SuperNode ends, with its words.
    """
    Runtime.open(bundle)  # which refuses one, before anybody waits for it
    reply = answering_as(secure)(lambda terms: open_client(bundle, photos, out, terms, options))
    folder = Output(out).fleet
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _SuperNode.running(link, folder) as node:
        tell(f"joining the fleet of {link.superlink}")
        while True:
            token = node.acquire()
            if token is None:
                sleep(_POLL_SECONDS)
            else:
                _run(node.connected(RuntimeTokenHttpInterceptor(token)), reply, tell)


def _run(
    client: RuntimeHttpClient,
    reply: Reply,
    tell: Callable[[str], None],
) -> None:
    """Answer one message; what goes wrong is the server's to know, and no end of the node."""
    heartbeat = HeartbeatSender(lambda: _beat(client))
    heartbeat.start()
    context: Context | None = None
    status, details = SubStatus.FAILED, "interrupted"
    try:
        message, context, _, _ = pull_task_input(client)
        push_message(client, _answered(message, context, reply, tell), context)
        status, details = SubStatus.COMPLETED, ""
    except (httpx.HTTPError, ObjectPullError, ObjectPushError, RuntimeError) as error:
        tell(one_line(f"the round is lost: {error}"))
        details = str(error)
    finally:
        push_task_output(client, context, status, details)
        if heartbeat.is_running:
            heartbeat.stop()
        client.close()


def _answered(
    message: Message, context: Context, reply: Reply, tell: Callable[[str], None]
) -> Message:
    begun = perf_counter()
    try:
        answer = reply(message, context)
    except PbcError as error:
        tell(one_line(f"refused: {error}"))
        reason = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error))
        return Message(reason, reply_to=message)
    tell(f"answered within {perf_counter() - begun:.2f} s")
    return answer


def _beat(client: RuntimeHttpClient) -> bool:
    """Say that the task is under way; whether anybody still waits for it shows at its end."""
    try:
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    except httpx.HTTPError:
        return False
    return True


class _SuperNode:
    """Flower's process, and its Runtime API on loopback, of which only this process gets work."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, port: int, key: bytes) -> None:
        self._process, self._log = process, log
        self._address = f"{_LOOPBACK}:{port}"
        self._client = self.connected(
            SuperExecAuthHttpInterceptor(master_secret=key, protected_methods=[_ACQUIRE])
        )

    @classmethod
    @contextmanager
    def running(cls, link: Link, folder: Path) -> Iterator[_SuperNode]:
        """Start the process, and end it."""
        key, secret, log = (
            secrets.token_bytes(32),
            folder / "supernode.key",
            folder / "supernode.log",
        )
        replace_bytes(secret, key)
        port = _free_port()
        command = [sys.executable, "-m", "pbc.fleet.supernode", str(os.getpid())]
        command += [*link.arguments(), "--isolation", "process"]
        command += ["--host", _LOOPBACK, "--port", str(port)]
        command += ["--superexec-auth-secret-file", str(secret)]
        with log.open("wb") as said:
            process = subprocess.Popen(
                command, stdout=said, stderr=said, env={**os.environ, **_QUIET}
            )
        node = cls(process, log, port, key)
        try:
            yield node
        finally:
            node._client.close()
            process.terminate()
            process.wait()

    def connected(self, *interceptors: object) -> RuntimeHttpClient:
        """Return a client of the API, which signs what it sends as an interceptor says."""
        version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
        return RuntimeHttpClient.from_server_address(
            self._address,
            insecure=True,
            root_certificates=None,
            interceptors=[version, *interceptors],
        )

    def acquire(self) -> str | None:
        """Return the token of a message to answer, None while there is none."""
        if self._process.poll() is not None:
            raise PbcError(f"Flower's SuperNode ended: {_last(self._log)} (more in {self._log})")
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        try:
            return self._client.AcquireTask(request).token or None
        except httpx.TransportError:  # not there yet
            return None


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((_LOOPBACK, 0))
        return int(found.getsockname()[1])


def _last(log: Path) -> str:
    lines: Sequence[str] = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
