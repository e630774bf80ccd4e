"""A target is a device: facts as data, and the name of the engine that runs there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from pbc import plugins
from pbc.errors import PbcError

Arch = Literal["x86_64", "aarch64", "armv7l", "any"]


def _no_facts() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Target:
    """What is known about a device before a bundle is built for it.

    `engine` is the one to prefer, `engines` are all that the board's facts allow; neither
    needs to be installed here. `refused` names engines that cannot run there, each with the reason
    and what to do instead, in words that complete "does not run on NAME: …". `local` says that the
    target is this machine, so that latency can be measured instead of estimated. `tags` are facts
    by name (`triple`, `cpu`, `cores`, `libc`, `cuda`, `sm`, `jetpack`, `tvm`). `requires` is what
    the board must have for any bundle to run (`python`, `libc`), `needs` what it must have for one
    engine, by the engine's name. `family` is the heading under which it is listed.
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
    needs: Mapping[str, Mapping[str, str]] = field(default_factory=_no_facts)
    refused: Mapping[str, str] = field(default_factory=_no_facts)
    family: str = ""

    def __post_init__(self) -> None:
        """Refuse facts that contradict each other; make the mappings read-only."""
        if self.engine not in self.engines:
            raise ValueError(f"target {self.name!r}: engine {self.engine!r} not in {self.engines}")
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise ValueError(f"target {self.name!r}: memory_bytes is {self.memory_bytes}")
        if both := sorted(set(self.engines) & set(self.refused)):
            raise ValueError(f"target {self.name!r}: {both} are allowed and refused")
        if unknown := sorted(set(self.needs) - set(self.engines)):
            raise ValueError(f"target {self.name!r}: needs of {unknown}, not in {self.engines}")
        object.__setattr__(self, "tags", MappingProxyType(dict(self.tags)))
        object.__setattr__(self, "requires", MappingProxyType(dict(self.requires)))
        object.__setattr__(self, "refused", MappingProxyType(dict(self.refused)))
        needs = {engine: MappingProxyType(dict(facts)) for engine, facts in self.needs.items()}
        object.__setattr__(self, "needs", MappingProxyType(needs))

    def requirements(self, engine: str, more: Mapping[str, str] = _no_facts()) -> dict[str, str]:
        """Return what a bundle of an engine requires of the board; `more` is the engine's own.

        Where two of them speak of the same thing, both hold.
        """
        joined: dict[str, str] = {}
        for facts in (self.requires, more, self.needs.get(engine, {})):
            for name, wanted in facts.items():
                known = joined.get(name, wanted)
                joined[name] = known if known == wanted else f"{known},{wanted}"
        return joined

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
            "needs": {engine: dict(facts) for engine, facts in self.needs.items()},
            "refused": dict(self.refused),
            "family": self.family,
        }


def load_target(name: str) -> Target:
    """Return the installed target of this name.

    The entry point is a `Target`, or a function that reads the facts and returns one. Its own name
    is another where the entry point is an alias.
    """
    loaded = plugins.load("pbc.targets", name)
    found = loaded() if callable(loaded) else loaded
    if not isinstance(found, Target):
        raise PbcError(f"target {name!r} is a {type(found).__name__}, not a pbc.target.Target")
    return found
