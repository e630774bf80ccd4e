"""Work in progress: what long passes keep, so that an interrupted compilation can continue."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from pbc.ir.graph import get_tensor, tensor_names
from pbc.ir.program import Program

TRIALS = "trials.jsonl"
"""Measurements of tuning: the file stays when the bundle is written, for the next compilation."""


def clear(folder: Path) -> None:
    """Remove what only this compilation could go on from."""
    if not folder.is_dir():
        return
    for file in folder.iterdir():
        if file.name != TRIALS:
            file.unlink()
    with contextlib.suppress(OSError):  # what stays keeps its folder
        folder.rmdir()


def work_file(
    program: Program, name: str, decided_by: Any, graphs: Iterable[GraphModule], suffix: str
) -> Path | None:
    """Return where the work called `name` is kept; None when the program has no folder for it.

    The file's name holds a hash of all that decides the work: the input, the code and tensors of
    the graphs, and `decided_by`, which must be JSON. Work of another compilation is never
    found.
    """
    if program.request.work is None:
        return None
    everything = [decided_by, program.network.input.to_json()]
    identity = hashlib.sha256(json.dumps(everything, sort_keys=True).encode())
    for graph in graphs:
        _add(identity, graph)
    return program.request.work / f"{name}-{identity.hexdigest()[:16]}{suffix}"


def _add(identity: Any, graph: GraphModule) -> None:
    identity.update(graph.code.encode())
    for name in tensor_names(graph):
        identity.update(name.encode())
        identity.update(get_tensor(graph, name).detach().numpy().tobytes())
