"""Flower's messages from and to named arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)

from pbc.errors import PbcError
from pbc.fleet.client import Client
from pbc.fleet.terms import Terms

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"


def arrays_of(content: RecordDict) -> dict[str, np.ndarray]:
    """Return a message's arrays; raises PbcError where they are none."""
    try:
        return {name: array.numpy() for name, array in content[ARRAYS].items()}
    except Exception as error:  # what another machine sent may be anything
        raise PbcError(f"the message has no arrays: {error!r}") from error


def terms_of(content: RecordDict) -> Terms:
    """Return the terms that a server sent; raises PbcError where there are none."""
    if CONFIG not in content:
        raise PbcError("the message has no terms of a fleet of pbc")
    return Terms.from_config(content[CONFIG])


def record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Return arrays as Flower sends them."""
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in arrays.items()})


def answer(client: Client, message: Message) -> Message:
    """Let a client train what a message asks for."""
    arrays, figures = client.answer(arrays_of(message.content), terms_of(message.content))
    content = RecordDict({ARRAYS: record(arrays), METRICS: MetricRecord(figures)})
    return Message(content, reply_to=message)


def once(opened: Callable[[Terms], Client]) -> Callable[[Terms], Client]:
    """Return what opens a client by the first terms that it does not refuse, and keeps it."""
    clients: list[Client] = []

    def client(terms: Terms) -> Client:
        if not clients:
            clients.append(opened(terms))
        return clients[0]

    return client


Reply = Callable[[Message, Context], Message]
"""What Flower calls for each message of a node; the context is what it keeps for the node."""


def answering(opened: Callable[[Terms], Client]) -> Reply:
    """Return what answers messages by one client, opened by the first message's terms."""
    client = once(opened)

    def reply(message: Message, context: Context) -> Message:
        if message.metadata.message_type.partition(".")[0] != MessageType.TRAIN:
            raise PbcError(f"a device trains; it was asked to {message.metadata.message_type}")
        return answer(client(terms_of(message.content)), message)

    return reply


def answering_as(secure: bool) -> Callable[[Callable[[Terms], Client]], Reply]:
    """Return `answering`, or its counterpart that sends masked sums alone."""
    if not secure:
        return answering
    # What it needs of Flower's older interface takes a while to import.
    from pbc.fleet.masked import answering_masked

    return answering_masked


def config(terms: Terms) -> ConfigRecord:
    """Return terms as Flower sends them."""
    return ConfigRecord(terms.to_config())


def size_bytes(content: RecordDict) -> int:
    """Return what the arrays of a message weigh, as they are sent."""
    return sum(len(array.data) for array in content[ARRAYS].values())
