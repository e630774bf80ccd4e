"""What a server keeps of a fleet: θ after every round, so that a killed one goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from pbc.errors import PbcError
from pbc.util import strict_json
from pbc.util.atomic import replace_bytes
from pbc.util.files import opened, read_bytes
from pbc.util.memory import refuse_large
from pbc.util.shapes import check, integer, list_of, maybe, number, record, text

_STATE = "fleet.safetensors"
_METRICS = "metrics.jsonl"
_MOST_METRICS_BYTES = 256 << 20
_THETA = "theta"
_ROUND = integer(0, 2**31)
_FACTS = record({"bundle": text(), "classes": list_of(text(1024), 2, 1 << 20)}, more=True)
_SHARE = maybe(number(0, 1))
_LINE = record(
    {
        "round": _ROUND,
        "asked": integer(),
        "answered": integer(),
        "nodes": list_of(integer(0, 2**64), most=1 << 20),  # as Flower numbers them
        "loss": maybe(number()),
        "down_bytes": integer(),
        "up_bytes": integer(),
        "seconds": number(0),
        "cpu_seconds": number(0),
    },
    {"accuracy": _SHARE, "client_accuracy": list_of(_SHARE, most=1 << 20)},
    more=True,
)


@dataclass
class FleetState:
    """Rounds done, θ, and the strategy's own tensors (FedAdam's moments) by name.

    facts: what a run must have in common with the one it goes on from.
    """

    facts: Mapping[str, Any]
    round: int
    theta: dict[str, np.ndarray]
    moments: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def save(self, root: Path) -> None:
        """Replace the file of the last round, all at once."""
        groups = {_THETA: self.theta, **self.moments}
        tensors = {
            f"{group}/{name}": np.ascontiguousarray(value)
            for group, values in groups.items()
            for name, value in values.items()
        }
        metadata = {"round": str(self.round), "facts": json.dumps(self.facts)}
        replace_bytes(root / _STATE, safetensors.numpy.save(tensors, metadata))

    @classmethod
    def load(cls, root: Path) -> FleetState:
        """Read a fleet's folder; raises PbcError where there is none."""
        path = root / _STATE
        if not path.exists():
            raise PbcError(f"{root} holds no fleet; pbc fleet simulate makes one")
        try:
            with opened(path) as file:
                refuse_large(file)
            groups: dict[str, dict[str, np.ndarray]] = {}
            with safe_open(str(path), "np") as tensors:
                metadata = tensors.metadata()
                for key in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    group, _, name = key.partition("/")
                    groups.setdefault(group, {})[name] = tensors.get_tensor(key)
            facts = strict_json.loads(metadata["facts"])
            check(facts, _FACTS, "facts")
            done = strict_json.loads(metadata["round"])
            check(done, _ROUND, "round")
            return cls(facts, done, groups.pop(_THETA), groups)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise PbcError(f"the fleet in {root} is damaged: {error}") from error

    @staticmethod
    def exists(root: Path) -> bool:
        return (root / _STATE).exists()


def append_metrics(root: Path, line: Mapping[str, Any]) -> None:
    """Add a round's line."""
    with (root / _METRICS).open("a") as file:
        file.write(json.dumps(line) + "\n")


def metrics(root: Path) -> list[dict[str, Any]]:
    """Return the lines of all rounds; one that a kill cut short does not count, nor what follows.

    Raises PbcError for a file that cannot be read.
    """
    path = root / _METRICS
    if not path.exists():
        return []
    try:
        texts = read_bytes(path, _MOST_METRICS_BYTES).splitlines()
    except OSError as error:
        raise PbcError(f"cannot read {path}: {error.strerror or error}") from error
    lines: list[dict[str, Any]] = []
    for line in texts:
        try:
            facts = strict_json.loads(line)
            check(facts, _LINE)
        except ValueError:
            break
        lines.append(facts)
    return lines


def rewind_metrics(root: Path, rounds: int) -> None:
    """Drop the lines of rounds after the last one that is in the state."""
    kept = [line for line in metrics(root) if line["round"] <= rounds]
    replace_bytes(root / _METRICS, "".join(json.dumps(line) + "\n" for line in kept).encode())
