"""Flower's messages from and to named arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

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


def config(terms: Terms) -> ConfigRecord:
    """Return terms as Flower sends them."""
    return ConfigRecord(terms.to_config())


def size_bytes(content: RecordDict) -> int:
    """Return what the arrays of a message weigh, as they are sent."""
    return sum(len(array.data) for array in content[ARRAYS].values())
