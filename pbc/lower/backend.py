"""The facts of an engine that programs are lowered to, read without importing what lowers."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pbc import plugins

if TYPE_CHECKING:
    from pbc.lower.lowering import Lowering

GROUP = "pbc.lowerings"


@dataclass(frozen=True)
class Backend:
    """Facts about an engine that programs are lowered to; entry point group `pbc.lowerings`.

    They are read without importing what lowers: that may need packages that are not installed.

    lowering_class: where the `Lowering` is, `package.module:Class`.
    packages: what must be installed here to lower. requires: what the device must have to run the
    artifacts, by name. precisions: the cheaper ones that the engine computes in, the first is tried
    first. derives_steps: whether the engine trains by derived graphs. tunes: whether measuring
    finds faster code than its rules do, see `Tunes`.
    """

    lowering_class: str
    packages: tuple[str, ...]
    requires: Mapping[str, str] = field(default_factory=dict)
    precisions: tuple[str, ...] = ()
    derives_steps: bool = False
    tunes: bool = False

    def missing(self) -> list[str]:
        """Return those of the packages that are not installed here."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def lowering(self) -> Lowering:
        """Import what lowers, and make one."""
        module, _, name = self.lowering_class.partition(":")
        made: Lowering = getattr(importlib.import_module(module), name)()
        return made


def backend(engine: str) -> Backend:
    """Return the facts of an installed engine; raises UsageError for another name."""
    found: Backend = plugins.load(GROUP, engine)
    return found
