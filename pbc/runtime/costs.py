"""Costs of a sample at each level on this device: values, and the file that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pbc.errors import PbcError
from pbc.util import strict_json
from pbc.util.atomic import replace_bytes
from pbc.util.processor import machine
from pbc.util.shapes import check, flag, integer, list_of, number, record

_LEVEL_COST = record(
    {
        "prefix_ms": number(),
        "chunk": integer(-1, 1 << 20),
        "forward_ms": number(),
        "backward_ms": number(),
        "measured": flag,
    }
)
_COSTS = record(
    {
        "levels": list_of(_LEVEL_COST, most=64),
        "decode_ms": number(),
        "gather_ms": number(),
        "policy_ms": number(),
    }
)


@dataclass(frozen=True)
class LevelCost:
    """Milliseconds per sample at one level.

    prefix_ms: in calls of `chunk` samples. forward_ms, backward_ms: of the body in mini-batches,
    backward with the optimizer's update. measured: False where the ladder's ratio stands in.
    """

    prefix_ms: float
    chunk: int
    forward_ms: float
    backward_ms: float
    measured: bool

    @property
    def body_ms(self) -> float:
        """Return what a visit costs once the features are there."""
        return self.forward_ms + self.backward_ms


def known_costs(manifest: Mapping[str, Any]) -> tuple[LevelCost, ...] | None:
    """Return what the compiler measured, if this is the machine that it measured on."""
    costs = manifest.get("costs")
    if costs is None or costs["machine"] != machine():
        return None
    return tuple(LevelCost(**level) for level in costs["levels"])


@dataclass(frozen=True)
class Costs:
    """Milliseconds per sample of every level, and of what levels share."""

    levels: tuple[LevelCost, ...]
    decode_ms: float
    gather_ms: float
    policy_ms: float

    def compute_ms(self) -> np.ndarray:
        """Return f64[levels]: making a sample's features."""
        return np.array([self.decode_ms + level.prefix_ms for level in self.levels])

    def body_ms(self) -> np.ndarray:
        """Return f64[levels]: learning from a sample whose features are there."""
        return np.array([level.body_ms for level in self.levels])

    def chunk(self, level: int) -> int:
        """Return the samples per prefix call of a level."""
        return self.levels[level].chunk

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, levels: int) -> Costs:
        """Read what `to_json` gave, for a ladder of `levels`; raises PbcError on anything else."""
        try:
            check(data, _COSTS)
            costs = cls(
                tuple(LevelCost(**level) for level in data["levels"]),
                float(data["decode_ms"]),
                float(data["gather_ms"]),
                float(data["policy_ms"]),
            )
            least = min(
                costs.decode_ms,
                costs.gather_ms,
                costs.policy_ms,
                *(min(c.prefix_ms, c.body_ms, c.chunk - 1) for c in costs.levels),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PbcError(f"no costs as pbc train writes them ({error!r})") from error
        if not least >= 0:
            raise PbcError("the costs have a negative time or a chunk below 1")
        if len(costs.levels) != levels:
            raise PbcError(f"the costs are of {len(costs.levels)} levels, the bundle has {levels}")
        return costs

    def save(self, path: Path) -> None:
        """Write as JSON."""
        replace_bytes(path, (json.dumps(self.to_json(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path, levels: int) -> Costs:
        """Read what `save` wrote for a bundle of `levels` levels."""
        try:
            return cls.from_json(strict_json.load(path), levels)
        except OSError as error:
            raise PbcError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise PbcError(f"{path} is no JSON: {error}") from error
        except PbcError as error:
            raise PbcError(f"{path}: {error}") from error
