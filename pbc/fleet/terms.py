"""The terms of a round: what a server asks, and what a device refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pbc.bundle import Bundle
from pbc.errors import PbcError, UsageError
from pbc.fleet.protection import Protection

_KEY = "pbc-terms"


@dataclass(frozen=True)
class Terms:
    """What is the same for every device of a fleet.

    bundle: digest of the bundle that all train. classes: names by label. epochs: of local training
    a round. floor: least fidelity of a level that a device may use; None for what the device's own
    options imply. mu: weight of FedProx's proximal term. fresh: whether the optimizer's state is
    zero again in each round. protection: of what is sent.
    """

    bundle: str
    classes: tuple[str, ...]
    epochs: int = 1
    floor: float | None = None
    mu: float = 0.0
    fresh: bool = False
    protection: Protection = field(default_factory=Protection)

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if self.epochs < 1:
            raise UsageError(f"a round of {self.epochs} epochs; it must have at least 1")
        if not 0 <= self.mu < float("inf"):
            raise UsageError(f"the proximal term's weight is {self.mu}; it must be at least 0")

    def to_config(self) -> dict[str, str]:
        """Return what travels in a message's config."""
        protection = self.protection
        content = {
            "bundle": self.bundle,
            "classes": list(self.classes),
            "epochs": self.epochs,
            "floor": self.floor,
            "mu": self.mu,
            "fresh": self.fresh,
            "top_k": protection.top_k,
            "clip": protection.clip,
            "noise": protection.noise,
            "float16": protection.float16,
        }
        return {_KEY: json.dumps(content)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Terms:
        """Read a message's config; raises PbcError for what no fleet of pbc sends."""
        try:
            content = json.loads(config[_KEY])
            return cls(
                str(content["bundle"]),
                tuple(map(str, content["classes"])),
                int(content["epochs"]),
                _number(content["floor"]),
                float(content["mu"]),
                bool(content["fresh"]),
                Protection(
                    _number(content["top_k"]),
                    _number(content["clip"]),
                    float(content["noise"]),
                    bool(content["float16"]),
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PbcError(f"the message has no terms of a fleet of pbc: {error!r}") from error

    def check(self, bundle: Bundle, classes: Sequence[str], floor: float | None) -> None:
        """Refuse another bundle, other classes, another floor: raises PbcError."""
        if self.bundle != bundle.digest:
            raise PbcError(
                f"the fleet trains the bundle {self.bundle[:12]}, here is {bundle.digest[:12]}"
            )
        if self.classes != tuple(classes):
            raise PbcError(
                f"the fleet's classes are {_named(self.classes)}; here they are {_named(classes)}"
            )
        if self.floor != floor:
            raise PbcError(
                f"the fleet's fidelity floor is {_floor(self.floor)}, here it is {_floor(floor)}: "
                "a device with other levels would train another network"
            )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _named(classes: Sequence[str]) -> str:
    return ", ".join(classes[:3]) + (f" and {len(classes) - 3} more" if len(classes) > 3 else "")


def _floor(value: float | None) -> str:
    return "the bundle's own" if value is None else f"{value:g}"
