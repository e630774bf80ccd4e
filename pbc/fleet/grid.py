"""Grids: one whose clients are in this process, and one that asks those less who did not answer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Error, Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from pbc.errors import PbcError
from pbc.fleet.client import Client
from pbc.fleet.messages import answer

_REFUSED = 1001


class LocalGrid(Grid):  # type: ignore[misc]  # flwr is not there for everybody who checks types
    """Clients by node id, called one after the other; nothing listens anywhere."""

    def __init__(self, clients: Mapping[int, Client]) -> None:
        # A process of Flower's own learns these when it starts; messages cannot be made without.
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 0
        self._clients = clients
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        raise NotImplementedError("a grid within a process has no runs")

    @property
    def run(self) -> Any:
        raise NotImplementedError("a grid within a process has no runs")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return Message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            names.append(f"{len(self._replies)}")
            self._replies[names[-1]] = self._answer(message)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in message_ids]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        try:
            return answer(self._clients[message.metadata.dst_node_id], message)
        except PbcError as error:
            return Message(Error(_REFUSED, str(error)), reply_to=message)


class Attendance:
    """A grid that lists a node half as often for each round in a row that it did not answer."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.missed: Counter[int] = Counter()
        # A strategy asks for the nodes more than once a round: it is to be told the same.
        self._drawn: dict[int, float] = {}

    def next_round(self) -> None:
        """Draw anew who is listed."""
        self._drawn = {}

    def get_node_ids(self) -> list[int]:
        nodes = list(self._grid.get_node_ids())
        for node in nodes:
            self._drawn.setdefault(node, random.random())
        here = [node for node in nodes if self._drawn[node] < 0.5 ** self.missed[node]]
        return here or nodes

    def ask(
        self,
        messages: Iterable[Message],
        timeout: float,
        accept: Callable[[Message], None],
        tell: Callable[[str], None],
    ) -> list[Message]:
        """Send, wait, and return the answers that `accept` takes; say which nodes are left out.

        accept: raises PbcError for an answer that is none.
        """
        messages = list(messages)
        self.next_round()
        waiting = {message.metadata.dst_node_id for message in messages}
        taken = []
        for reply in self._grid.send_and_receive(messages, timeout=timeout):
            node = reply.metadata.src_node_id
            waiting.discard(node)
            try:
                if reply.has_error():
                    raise PbcError(_last_line(reply.error.reason))
                accept(reply)
            except PbcError as error:
                self.missed[node] += 1
                tell(f"node {node} is left out: {error}")
                continue
            self.missed.pop(node, None)
            taken.append(reply)
        for node in sorted(waiting):
            self.missed[node] += 1
            tell(f"node {node} is left out: no answer within {timeout:g} s")
        return taken


def _last_line(text: str) -> str:
    """Return what an error says, without the traceback that Flower sends with it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "an error without a reason"
