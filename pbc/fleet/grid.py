"""Grids: one whose clients are in this process, and one that asks those less who did not answer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

import numpy as np
from flwr.app import Error, Message
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from pbc.errors import PbcError
from pbc.fleet.client import Client
from pbc.fleet.messages import answer
from pbc.util.terminal import one_line

_REFUSED = 1001
_POLL_SECONDS = 0.5


class LocalGrid(Grid):  # type: ignore[misc]  # flwr is not there for everybody who checks types
    """Clients by node id, called one after the other; nothing listens anywhere."""

    def __init__(self, clients: Mapping[int, Client]) -> None:
        # A process of Flower's own learns these when it starts; messages cannot be made without.
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 0
        self._clients = clients
        self._replies: dict[str, Message] = {}
        self._run = Run.create_empty(run_id=0)
        self._sent = 0

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return Message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            self._sent += 1
            # A grid gives the ids, which a message has no setter for.
            message.metadata.__dict__["_message_id"] = name = str(self._sent)
            self._replies[name] = self._answer(message)
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        try:
            return answer(self._clients[message.metadata.dst_node_id], message)
        except PbcError as error:
            return Message(Error(_REFUSED, str(error)), reply_to=message)


@dataclass(frozen=True)
class Answer:
    """An update f32[d] that came back, of how many photos, and how large it was on the wire.

    nodes: one, or all that a masked sum is of. loss: of the last epoch, None where that is masked.
    """

    nodes: tuple[int, ...]
    update: np.ndarray
    examples: float
    loss: float | None
    up_bytes: int


class Attendance:
    """A grid that lists a node half as often for each round in a row that it did not answer."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.missed: Counter[int] = Counter()
        self._listed: list[int] = []

    def begin_round(self, least: int = 1, tell: Callable[[str], None] = lambda line: None) -> None:
        """Wait until so many nodes are there, and draw which of them are listed this round.

        Flower's strategies count the nodes, and then wait for as many: a list that changed in
        between, or was shorter than what they wait for, would be waited for without end.
        """
        said = -1
        while len(nodes := list(self._grid.get_node_ids())) < least:
            if len(nodes) != said:
                said = len(nodes)
                tell(f"waiting for {least} nodes, {said} here")
            sleep(_POLL_SECONDS)
        # Who went away and comes back begins anew.
        self.missed = Counter({node: self.missed[node] for node in nodes})
        here = [node for node in nodes if random.random() < 0.5 ** self.missed[node]]
        self._listed = here or nodes

    def get_node_ids(self) -> list[int]:
        return self._listed

    def ask(
        self,
        messages: Iterable[Message],
        timeout: float,
        accept: Callable[[int, Message], Answer],
        tell: Callable[[str], None],
    ) -> list[Answer]:
        """Send, wait, and return the answers that `accept` takes; say which nodes are left out.

        accept: of a node's reply; raises PbcError for one that is none.
        """
        messages = list(messages)
        for message in messages:  # a node that takes one up later would answer no round
            message.metadata.ttl = timeout
        waiting = {message.metadata.dst_node_id for message in messages}
        taken = []
        for node, reply in self._replies(messages, timeout):
            waiting.discard(node)
            try:
                if reply.has_error():
                    raise PbcError(_last_line(reply.error.reason))
                taken.append(accept(node, reply))
            except PbcError as error:
                self.missed[node] += 1
                tell(one_line(f"node {node} is left out: {error}"))
                continue
            self.missed.pop(node, None)
        self.miss(waiting, timeout, tell)
        return taken

    def miss(self, nodes: Iterable[int], timeout: float, tell: Callable[[str], None]) -> None:
        """Note who did not answer in time."""
        for node in sorted(nodes):
            self.missed[node] += 1
            tell(f"node {node} is left out: no answer within {timeout:g} s")

    def _replies(self, messages: list[Message], timeout: float) -> Iterator[tuple[int, Message]]:
        """Send, and yield nodes and answers as they come; Flower's own wait looks every 3 s."""
        names = self._grid.push_messages(messages)
        sent = {
            name: message.metadata.dst_node_id
            for name, message in zip(names, messages, strict=False)
            if name is not None  # it could not be sent
        }
        until = monotonic() + timeout
        while sent:
            for reply in self._grid.pull_messages(list(sent)):
                yield sent.pop(reply.metadata.reply_to_message_id), reply
            left = until - monotonic()
            if left <= 0:
                return
            if sent:
                sleep(min(_POLL_SECONDS, left))


def _last_line(text: str) -> str:
    """Return what an error says, without the traceback that Flower sends with it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "an error without a reason"
