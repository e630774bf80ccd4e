"""A server's rounds: Flower's strategies sample and average, θ is written after every one."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx

from pbc.bundle import Bundle
from pbc.errors import PbcError, UsageError, suggest
from pbc.fleet.grid import Answer, Attendance
from pbc.fleet.messages import ARRAYS, METRICS, arrays_of, config, record, size_bytes
from pbc.fleet.protection import Protection
from pbc.fleet.state import FleetState, append_metrics, rewind_metrics
from pbc.fleet.terms import Terms
from pbc.fleet.vector import flatten, unflatten
from pbc.fleet.wire import LARGEST, decode
from pbc.runtime.parameters import checked_theta, initial_parameters

STRATEGIES = ("fedavg", "fedavgm", "fedprox", "fedadam")
# More photos than a device has: a mean is weighed by what nodes say of themselves.
_MOST_EXAMPLES = 1e9
_MOMENTS = ("m_t", "v_t")
_VELOCITY = "momentum_vector"
# Those may differ when a fleet goes on.
_FREE = ("rounds", "nodes", "timeout_seconds")

Evaluate = Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]


@dataclass(frozen=True)
class FleetOptions:
    """Options of a fleet.

    fraction: of the nodes that train in a round; nodes: the least that must be there.
    mu: weight of fedprox's proximal term. eta: server's learning rate of fedadam.
    server_momentum: of fedavgm (Hsu et al., 2019), beside the clients' own.
    secure: whether the server reads the sum of updates alone (pbc.fleet.masked).
    timeout_seconds: after which a round goes on without those that did not answer.
    """

    rounds: int = 10
    epochs: int = 1
    strategy: str = "fedavgm"
    fraction: float = 1.0
    nodes: int = 1
    mu: float = 0.01
    eta: float = 0.01
    server_momentum: float = 0.5
    floor: float | None = None
    secure: bool = False
    protection: Protection = field(default_factory=Protection)
    timeout_seconds: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if self.strategy not in STRATEGIES:
            raise UsageError(suggest("fleet strategy", self.strategy, STRATEGIES))
        for name in ("rounds", "epochs", "nodes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.fraction <= 1:
            raise UsageError(f"the fraction is {self.fraction}; it must be above 0 and at most 1")
        if not 0 < self.server_momentum < 1:
            raise UsageError(
                f"the server's momentum is {self.server_momentum}; it must be above 0 and below 1"
            )
        if self.secure and self.protection.top_k is not None:
            raise UsageError("in a masked sum every value counts: secure goes without top-k")
        for name in ("mu", "eta", "timeout_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{name} is {getattr(self, name)}; it must be above 0")

    def facts(self) -> dict[str, Any]:
        """Return what a fleet that goes on must have in common."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}

    def _strategy(self) -> Any:
        kept = {
            "fraction_train": self.fraction,
            "fraction_evaluate": 0.0,
            "min_train_nodes": 1,
            "min_available_nodes": 1,
            "arrayrecord_key": ARRAYS,
        }
        if self.strategy == "fedavgm":
            return FedAvgM(server_momentum=self.server_momentum, **kept)
        if self.strategy == "fedprox":
            return FedProx(proximal_mu=self.mu, **kept)
        if self.strategy == "fedadam":
            return FedAdam(eta=self.eta, **kept)
        return FedAvg(**kept)


def run(
    grid: Grid,
    bundle: Bundle,
    classes: tuple[str, ...],
    options: FleetOptions,
    root: Path,
    *,
    evaluate: Evaluate = lambda theta: {},
    tell: Callable[[str], None] = lambda line: None,
) -> FleetState:
    """Run the rounds that the folder `root` does not have yet; return θ after the last.

    evaluate: figures of θ for the metrics. Raises PbcError where the folder is another fleet's.
    """
    state = _begin(bundle, classes, options, root)
    terms = Terms(
        bundle.digest,
        classes,
        options.epochs,
        options.floor,
        options.mu if options.strategy == "fedprox" else 0.0,
        # Its momentum is the server's (Reddi et al., 2021): a second one would grow beside it.
        options.strategy == "fedadam",
        options.protection,
    )
    # Flower samples with Python's global generator.
    random.seed(options.seed + state.round)
    strategy, attendance = options._strategy(), Attendance(grid)
    _set_moments(strategy, state)
    kind = np.float16 if options.protection.float16 else np.float32
    while state.round < options.rounds:
        attendance.begin_round(options.nodes, tell)
        begun, begun_cpu = perf_counter(), process_time()
        number = state.round + 1
        given = {name: value.astype(kind) for name, value in state.theta.items()}
        messages = list(strategy.configure_train(number, record(given), config(terms), attendance))
        # Those that go on from θ do so from all of it, not from what was sent.
        if options.strategy == "fedadam":
            strategy.current_arrays = state.theta
        elif options.strategy == "fedavgm":
            strategy.current_arrays = record(state.theta)
        down = size_bytes(messages[0].content)
        if options.secure:
            from pbc.fleet import masked  # Flower's older interface takes a while to import

            answers = masked.ask(
                grid,
                attendance,
                number,
                messages,
                state.theta,
                terms,
                options.timeout_seconds,
                tell,
            )
        else:
            answers = attendance.ask(messages, options.timeout_seconds, _taker(state.theta), tell)
        if answers:
            replies = [_reply(answer, state.theta) for answer in answers]
            averaged, _ = strategy.aggregate_train(number, replies)
            assert averaged is not None, "somebody answered"
            new = {name: np.asarray(array.numpy()) for name, array in averaged.items()}
            state.moments = _moments(strategy, list(new))
            state.theta = checked_theta(bundle, new, len(classes))
        else:
            tell(f"round {number}: nobody answered, θ stays")
        state.round = number
        line = {
            "round": number,
            "asked": len(messages),
            **_summary(answers),
            "down_bytes": down,
            **evaluate(state.theta),
            "seconds": perf_counter() - begun,
            "cpu_seconds": process_time() - begun_cpu,
        }
        append_metrics(root, line)
        state.save(root)
        tell(round_line(line, options.rounds))
    return state


def pace(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what a round takes on average, of this process alone, and how many a minute are."""
    seconds, cpu = (sum(line[key] for line in lines) for key in ("seconds", "cpu_seconds"))
    return {
        "round_seconds": seconds / len(lines),
        "round_cpu_seconds": cpu / len(lines),
        "rounds_per_minute": 60 * len(lines) / seconds,
    }


def _moments(strategy: Any, names: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Return what a strategy keeps between rounds, by the parameters' names."""
    found = {
        moment: {name: np.asarray(value) for name, value in kept.items()}
        for moment in _MOMENTS
        if (kept := getattr(strategy, moment, None))
    }
    if velocity := getattr(strategy, _VELOCITY, None):  # a list, in the parameters' order
        found[_VELOCITY] = dict(zip(names, velocity, strict=True))
    return found


def _set_moments(strategy: Any, state: FleetState) -> None:
    for moment, kept in state.moments.items():
        ordered = [kept[name] for name in state.theta] if moment == _VELOCITY else kept
        setattr(strategy, moment, ordered)


def _taker(theta: Mapping[str, np.ndarray]) -> Callable[[int, Message], Answer]:
    """Return what takes a node's reply, and raises PbcError for one that is none."""
    size = sum(value.size for value in theta.values())

    def take(node: int, reply: Message) -> Answer:
        update = decode(arrays_of(reply.content), size)
        try:
            figures = reply.content[METRICS]
            examples, loss = float(figures["num-examples"]), float(figures["loss"])
        except (KeyError, TypeError, ValueError) as error:
            raise PbcError(f"the answer has no figures: {error!r}") from error
        if not 0 < examples <= _MOST_EXAMPLES:
            raise PbcError(f"it trained on {examples:g} photos; 1 to {_MOST_EXAMPLES:g} count")
        if not 0 <= loss <= LARGEST:
            raise PbcError(f"its loss is {loss:g}")
        return Answer((node,), update, examples, loss, size_bytes(reply.content))

    return take


def _reply(answer: Answer, theta: Mapping[str, np.ndarray]) -> Message:
    """Return an answer as Flower's strategies take it: θ after it, and its weight."""
    moved = unflatten(flatten(theta, theta) + answer.update, theta)
    figures = MetricRecord({"num-examples": answer.examples})
    content = RecordDict({ARRAYS: record(moved), METRICS: figures})
    return Message(content, dst_node_id=answer.nodes[0], message_type=MessageType.TRAIN)


def _summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return what a round's line says of who answered."""
    nodes = sorted(node for answer in answers for node in answer.nodes)
    examples = sum(answer.examples for answer in answers)
    told = [(answer.loss, answer.examples) for answer in answers if answer.loss is not None]
    weight = sum(photos for _, photos in told)
    sizes = [answer.up_bytes for answer in answers]
    return {
        "answered": len(nodes),
        "nodes": nodes,
        "examples": examples,
        "loss": sum(loss * photos for loss, photos in told) / weight if told else None,
        "up_bytes": round(sum(sizes) / len(sizes)) if sizes else 0,
    }


def round_line(line: Mapping[str, Any], rounds: int) -> str:
    """Return one line that says how a round went."""
    loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
    accuracy = f"  accuracy {100 * line['accuracy']:.2f} %" if "accuracy" in line else ""
    return (
        f"round {line['round']}/{rounds}  {line['answered']} of {line['asked']} nodes  "
        f"loss {loss}{accuracy}  {line['up_bytes'] / 1e3:.1f} kB up  {line['seconds']:.1f} s"
    )


def _begin(
    bundle: Bundle, classes: tuple[str, ...], options: FleetOptions, root: Path
) -> FleetState:
    """Return the state that the folder holds, or a new one."""
    facts = {"bundle": bundle.digest, "classes": list(classes), **options.facts()}
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not FleetState.exists(root):
        return FleetState(facts, 0, initial_parameters(bundle, len(classes), options.seed))
    state = FleetState.load(root)
    for name, value in facts.items():
        if state.facts.get(name) != value:
            raise PbcError(
                f"cannot go on with the fleet in {root}: its {name} is "
                f"{state.facts.get(name)}, now it is {value}"
            )
    state.theta = checked_theta(bundle, state.theta, len(classes))
    for moment, kept in state.moments.items():
        checked = checked_theta(bundle, kept, len(classes))
        state.moments[moment] = {name: checked[name] for name in kept}
    rewind_metrics(root, state.round)
    return state
