"""Order of passes: by stage, and within a stage by what they say about each other.

It needs no torch, so that passes can be listed where none is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pbc.errors import PbcError

STAGES = (
    "mark",
    "analyse",
    "plan",
    "prune",
    "align",
    "fold",
    "quantize",
    "route",
    "derive",
    "lower",
)
"""In this order: alignment recalibrates the statistics that folding makes constant; quantisation
rounds what is folded, since an engine runs no batch norm between a layer and its rounding; routing
judges the proxies as they will run, after both.
"""


def order(kinds: Mapping[str, Any]) -> list[str]:
    """Sort passes by stage, then so that `after` and `before` hold, then by name."""
    for name, kind in kinds.items():
        if kind.stage not in STAGES:
            raise PbcError(
                f"pass {name} is of stage {kind.stage!r}; stages are {', '.join(STAGES)}"
            )
    ordered: list[str] = []
    for stage in STAGES:
        waiting = {n: set(getattr(k, "after", ())) for n, k in kinds.items() if k.stage == stage}
        for name in list(waiting):
            for later in getattr(kinds[name], "before", ()):
                if later in waiting:
                    waiting[later].add(name)
        while waiting:
            ready = sorted(n for n, needs in waiting.items() if not needs & waiting.keys())
            if not ready:
                raise PbcError(
                    f"passes {', '.join(sorted(waiting))} each want to run after another"
                )
            ordered.append(ready[0])
            del waiting[ready[0]]
    return ordered
