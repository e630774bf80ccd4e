"""The terms of a round: what a server asks, and what a device refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pbc.bundle import Bundle
from pbc.errors import PbcError, UsageError
from pbc.fleet.protection import Protection
from pbc.util import strict_json
from pbc.util.shapes import check, flag, integer, list_of, maybe, number, record, text

_KEY = "pbc-terms"
_NUMBER = maybe(number())
_SHAPE = record(
    {
        "bundle": text(),
        "classes": list_of(text(1024), 1, 1 << 20),
        "epochs": integer(1, 10_000),
        "floor": _NUMBER,
        "mu": number(),
        "fresh": flag,
        "top_k": _NUMBER,
        "clip": _NUMBER,
        "noise": number(),
        "float16": flag,
    },
    more=True,
)


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
            content = strict_json.loads(str(config[_KEY]).encode())
            check(content, _SHAPE, "terms")
            return cls(
                content["bundle"],
                tuple(content["classes"]),
                content["epochs"],
                content["floor"],
                content["mu"],
                content["fresh"],
                Protection(content["top_k"], content["clip"], content["noise"], content["float16"]),
            )
        except (KeyError, ValueError) as error:
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


def _named(classes: Sequence[str]) -> str:
    return ", ".join(classes[:3]) + (f" and {len(classes) - 3} more" if len(classes) > 3 else "")


def _floor(value: float | None) -> str:
    return "the bundle's own" if value is None else f"{value:g}"
