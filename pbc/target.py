"""A target is a device: facts as data, and the name of the engine that runs there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from pbc import registry
from pbc.errors import PbcError

Arch = Literal["x86_64", "aarch64", "any"]


def _no_facts() -> Mapping[str, str]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Target:
    """What is known about a device before a bundle is built for it.

    `engine` is the one to prefer, `engines` are all that the board's facts allow; neither
    needs to be installed here. `local` says that the target is this machine, so that latency
    can be measured instead of estimated. `tags` are facts by name (`libc`, `cuda`, `sm`,
    `jetpack`, `tvm`), `requires` what the board must have for a bundle to run (`python`, `libc`).
    """

    name: str
    description: str
    arch: Arch
    engine: str
    engines: tuple[str, ...]
    memory_bytes: int | None = None
    local: bool = False
    tags: Mapping[str, str] = field(default_factory=_no_facts)
    requires: Mapping[str, str] = field(default_factory=_no_facts)

    def __post_init__(self) -> None:
        """Refuse facts that contradict each other; make the mappings read-only."""
        if self.engine not in self.engines:
            raise ValueError(f"target {self.name!r}: engine {self.engine!r} not in {self.engines}")
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise ValueError(f"target {self.name!r}: memory_bytes is {self.memory_bytes}")
        object.__setattr__(self, "tags", MappingProxyType(dict(self.tags)))
        object.__setattr__(self, "requires", MappingProxyType(dict(self.requires)))

    def to_json(self) -> dict[str, Any]:
        """Return the facts as a manifest stores them."""
        return {
            "name": self.name,
            "description": self.description,
            "arch": self.arch,
            "engine": self.engine,
            "engines": list(self.engines),
            "memory_bytes": self.memory_bytes,
            "tags": dict(self.tags),
            "requires": dict(self.requires),
        }


def load_target(name: str) -> Target:
    """Return the installed target of this name.

    The entry point is a `Target`, or a function that reads the facts and returns one.
    """
    loaded = registry.load("pbc.targets", name)
    found = loaded() if callable(loaded) else loaded
    if not isinstance(found, Target):
        raise PbcError(f"target {name!r} is a {type(found).__name__}, not a pbc.target.Target")
    return found
