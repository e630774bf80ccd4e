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
from pbc.util.atomic import replace_bytes

_STATE = "fleet.safetensors"
_METRICS = "metrics.jsonl"
_THETA = "theta"


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
            groups: dict[str, dict[str, np.ndarray]] = {}
            with safe_open(str(path), "np") as file:
                metadata = file.metadata()
                for key in file.keys():  # noqa: SIM118 (it is no mapping)
                    group, _, name = key.partition("/")
                    groups.setdefault(group, {})[name] = file.get_tensor(key)
            theta = groups.pop(_THETA)
            return cls(json.loads(metadata["facts"]), int(metadata["round"]), theta, groups)
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
    """Return the lines of all rounds; one that a kill cut short does not count."""
    path = root / _METRICS
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:  # noqa: PERF203 (at most once)
            break
    return lines


def rewind_metrics(root: Path, rounds: int) -> None:
    """Drop the lines of rounds after the last one that is in the state."""
    kept = [line for line in metrics(root) if line["round"] <= rounds]
    replace_bytes(root / _METRICS, "".join(json.dumps(line) + "\n" for line in kept).encode())
