"""A server's rounds: Flower's strategies sample and average, θ is written after every one."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx

from pbc.bundle import Bundle
from pbc.errors import PbcError, UsageError, suggest
from pbc.fleet.grid import Attendance
from pbc.fleet.messages import ARRAYS, METRICS, arrays_of, config, record, size_bytes
from pbc.fleet.protection import Protection
from pbc.fleet.state import FleetState, append_metrics, rewind_metrics
from pbc.fleet.terms import Terms
from pbc.fleet.vector import flatten, unflatten
from pbc.fleet.wire import decode
from pbc.runtime.parameters import checked_theta, initial_parameters

STRATEGIES = ("fedavg", "fedprox", "fedadam")
_MOMENTS = ("m_t", "v_t")
# Those may differ when a fleet goes on.
_FREE = ("rounds", "timeout_seconds")

Evaluate = Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]


@dataclass(frozen=True)
class FleetOptions:
    """Options of a fleet.

    fraction: of the nodes that train in a round; nodes: the least that must be there.
    mu: weight of fedprox's proximal term. eta: server's learning rate of fedadam.
    timeout_seconds: after which a round goes on without those that did not answer.
    """

    rounds: int = 10
    epochs: int = 1
    strategy: str = "fedavg"
    fraction: float = 1.0
    nodes: int = 1
    mu: float = 0.01
    eta: float = 0.01
    floor: float | None = None
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
            "min_available_nodes": self.nodes,
            "arrayrecord_key": ARRAYS,
        }
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
    for name, value in state.moments.items():
        setattr(strategy, name, value)
    kind = np.float16 if options.protection.float16 else np.float32
    while state.round < options.rounds:
        begun, begun_cpu = perf_counter(), process_time()
        number = state.round + 1
        given = {name: value.astype(kind) for name, value in state.theta.items()}
        messages = list(strategy.configure_train(number, record(given), config(terms), attendance))
        if options.strategy == "fedadam":  # which goes on from θ, not from what was sent of it
            strategy.current_arrays = state.theta
        down = size_bytes(messages[0].content)
        theta: Mapping[str, np.ndarray] = state.theta
        up: dict[int, int] = {}

        def accept(reply: Message, theta: Mapping[str, np.ndarray] = theta,
                   up: dict[int, int] = up) -> None:  # fmt: skip
            size = sum(value.size for value in theta.values())
            received = size_bytes(reply.content)
            update = decode(arrays_of(reply.content), size)
            if not reply.content[METRICS]["num-examples"] > 0:
                raise PbcError("it trained on no photo")
            reply.content[ARRAYS] = record(unflatten(flatten(theta, theta) + update, theta))
            up[reply.metadata.src_node_id] = received

        taken = attendance.ask(messages, options.timeout_seconds, accept, tell)
        if taken:
            averaged, _ = strategy.aggregate_train(number, taken)
            assert averaged is not None, "somebody answered"
            new = {name: np.asarray(array.numpy()) for name, array in averaged.items()}
            state.theta = checked_theta(bundle, new, len(classes))
        else:
            tell(f"round {number}: nobody answered, θ stays")
        state.round = number
        state.moments = {
            name: {key: np.asarray(value) for key, value in found.items()}
            for name in _MOMENTS
            if (found := getattr(strategy, name, None))
        }
        figures = {reply.metadata.src_node_id: dict(reply.content[METRICS]) for reply in taken}
        examples = sum(each["num-examples"] for each in figures.values())
        loss = sum(each["loss"] * each["num-examples"] for each in figures.values())
        line = {
            "round": number,
            "asked": len(messages),
            "answered": len(taken),
            "nodes": sorted(figures),
            "examples": examples,
            "loss": loss / examples if examples else None,
            "down_bytes": down,
            "up_bytes": round(sum(up.values()) / len(up)) if up else 0,
            "seconds": perf_counter() - begun,
            "cpu_seconds": process_time() - begun_cpu,
            **evaluate(state.theta),
        }
        append_metrics(root, line)
        state.save(root)
        tell(round_line(line, options.rounds))
    return state


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
    rewind_metrics(root, state.round)
    return state
