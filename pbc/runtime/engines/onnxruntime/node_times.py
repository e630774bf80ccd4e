"""Times of a graph's nodes, by onnxruntime's own profiler, and which nodes an output needs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from pbc.runtime.engines.onnxruntime.cut import Operator

# How the profiler calls the run of a node.
_SUFFIX = "_kernel_time"


def node_ms(profile: Path) -> dict[str, float]:
    """Return the least milliseconds that each node took in the runs of a profile."""
    found: dict[str, float] = {}
    for event in json.loads(profile.read_text()):
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith(_SUFFIX):
            node = name.removesuffix(_SUFFIX)
            found[node] = min(found.get(node, math.inf), event["dur"] / 1000)
    return found


def needed(operators: Iterable[Operator], outputs: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """Return which nodes the outputs of each owner need.

    outputs: the owner by output. operators: each behind those whose results it reads.
    """
    behind: dict[str, frozenset[str]] = {}
    for operator in operators:
        nodes = frozenset((operator.name,)).union(*(behind.get(v, ()) for v in operator.inputs))
        behind.update(dict.fromkeys(operator.outputs, nodes))
    found: dict[str, frozenset[str]] = {}
    for output, owner in outputs.items():
        found[owner] = found.get(owner, frozenset()) | behind.get(output, frozenset())
    return found
