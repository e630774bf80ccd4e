"""The names of a bundle's graphs, `prefix/0` or `update/2/adam`, built and read in one place."""

from __future__ import annotations

from typing import NamedTuple


class GraphName(NamedTuple):
    """Which graph it is: its role, and the level where it has one.

    As text it is the key of the manifest's `graphs` and of whatever else a bundle says by graph.
    """

    kind: str
    optimizer: str | None = None
    level: int | None = None

    @classmethod
    def parse(cls, text: str) -> GraphName:
        """Read what `str` gave."""
        kind, *rest = text.split("/")
        level = int(rest[0]) if rest else None
        return cls(kind, rest[1] if len(rest) > 1 else None, level)

    def at(self, level: int) -> GraphName:
        """Return the graph of this role at a level."""
        return self._replace(level=level)

    @property
    def role(self) -> GraphName:
        """Return the name without the level."""
        return self._replace(level=None)

    @property
    def trains(self) -> bool:
        """Return whether it is a half of a derived training step."""
        return self.kind in (FORWARD.kind, _UPDATE)

    def __str__(self) -> str:
        parts = (self.kind, self.level, self.optimizer)
        return "/".join(str(part) for part in parts if part is not None)


_UPDATE = "update"

POLICY = GraphName("policy")
PREFIX = GraphName("prefix")
BODY = GraphName("body")
FORWARD = GraphName("forward")
"""The derived step's first half: losses, and what the second half needs."""

SAVED = "saved/"
"""In front of a tensor's name that the first half keeps for the second."""


def update(optimizer: str) -> GraphName:
    """Return the name of the derived step's second half: backward and the optimizer's update."""
    return GraphName(_UPDATE, optimizer)
