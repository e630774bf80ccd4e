"""Secure aggregation by Flower's SecAgg+ (Bell et al., 2020): the server reads the sum alone.

Devices mask their updates so that the masks cancel out in the sum; who drops out is unmasked by
shares that the others hold. Flower has it for its older interface, which is used here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flwr.compat.common.recorddict_compat as compat
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.client.mod.utils import make_ffn
from flwr.common import (
    Code,
    FitIns,
    FitRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp import Grid

from pbc.errors import PbcError
from pbc.fleet.client import Client
from pbc.fleet.grid import Answer, Attendance
from pbc.fleet.messages import Reply, arrays_of, once
from pbc.fleet.terms import Terms
from pbc.fleet.wire import decode

MOST_PHOTOS = 1000
"""A device of more counts as this many: the masked weight is a whole number of that range."""

_THRESHOLD = 2 / 3
"""Share of the devices that have to stay for what the others masked to be taken out."""

# Values beyond are clipped before they are made whole numbers; an update is far below.
_RANGE = 4.0


def answering_masked(opened: Callable[[Terms], Client]) -> Reply:
    """Return what answers the stages of SecAgg+ by one client, and nothing else."""
    client = once(opened)

    def fit(message: Message, context: Context) -> Message:
        given = compat.recorddict_to_fitins(message.content, keep_input=True)
        terms = Terms.from_config(given.config)
        if terms.protection.top_k is not None:
            raise PbcError("in a masked sum every value counts: the fleet may not ask for top-k")
        device = client(terms)
        names = sorted(device.bundle.manifest["parameters"])
        values = parameters_to_ndarrays(given.parameters)
        if len(values) != len(names):
            raise PbcError(f"the server sent {len(values)} parameters of {len(names)}")
        arrays, figures = device.answer(dict(zip(names, values, strict=True)), terms)
        result = FitRes(
            Status(Code.OK, ""),
            ndarrays_to_parameters([arrays["update"].astype(np.float32)]),
            min(int(figures["num-examples"]), MOST_PHOTOS),
            {},
        )
        return Message(compat.fitres_to_recorddict(result, keep_input=False), reply_to=message)

    stages: Reply = make_ffn(fit, [secaggplus_mod])

    def reply(message: Message, context: Context) -> Message:
        try:
            return stages(message, context)
        except PbcError:
            raise
        except Exception as error:  # what another machine sent may be anything
            raise PbcError(f"the message is of no stage of SecAgg+: {error!r}") from error

    return reply


def ask(
    grid: Grid,
    attendance: Attendance,
    number: int,
    messages: Sequence[Message],
    theta: Mapping[str, np.ndarray],
    terms: Terms,
    timeout: float,
    tell: Callable[[str], None],
) -> list[Answer]:
    """Run SecAgg+ of a round with the nodes that messages are for; return the mean as one answer.

    An empty list where too few stayed. Who did not answer is said.
    """
    nodes = [message.metadata.dst_node_id for message in messages]
    sent = arrays_of(messages[0].content)
    parameters = ndarrays_to_parameters([sent[name] for name in sorted(sent)])
    strategy = _Sum(nodes, FitIns(parameters, dict(terms.to_config())))
    context = LegacyContext(
        Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={}),
        strategy=strategy,
    )
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: number})
    context.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(
        parameters, keep_input=True
    )
    SecAggPlusWorkflow(
        1.0,
        _THRESHOLD,
        max_weight=float(MOST_PHOTOS),
        clipping_range=terms.protection.clip or _RANGE,
        timeout=timeout,
    )(grid, context)
    attendance.miss(set(nodes) - strategy.answered, timeout, tell)
    return strategy.answer(sum(value.size for value in theta.values()))


class _Proxy:
    """A node as the workflow names it."""

    def __init__(self, node: int) -> None:
        self.node_id = node


class _Sum:
    """The strategy of one round: asks these nodes, and keeps the sum."""

    def __init__(self, nodes: Sequence[int], what: FitIns) -> None:
        self._nodes, self._what = nodes, what
        self._mean: Parameters | None = None
        self._photos = 0
        self.answered: set[int] = set()

    def configure_fit(self, *ignored: Any) -> list[tuple[_Proxy, FitIns]]:
        return [(_Proxy(node), self._what) for node in self._nodes]

    def aggregate_fit(
        self, number: int, results: Sequence[tuple[_Proxy, FitRes]], failures: Sequence[Any]
    ) -> tuple[None, dict[str, Any]]:
        self._mean = results[0][1].parameters
        self._photos = sum(result.num_examples for _, result in results)
        self.answered = {proxy.node_id for proxy, _ in results}
        return None, {}

    def answer(self, size: int) -> list[Answer]:
        """Return the mean of updates f32[size] as if one node had sent it."""
        if self._mean is None:
            return []
        (mean,) = parameters_to_ndarrays(self._mean)
        update = decode({"update": mean.astype(np.float32)}, size)
        return [Answer(tuple(sorted(self.answered)), update, self._photos, None, 8 * size)]
