"""A measuring process of `pbc profile`: it takes a task, measures, and answers.

PyTorch is imported where a task asks for it: it is an extra, and would be in the memory measured.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from pbc.errors import PbcError
from pbc.profile import bundle_stages, inputs
from pbc.profile.task import LOADING, PBC, STAGES, TRAINING, Task
from pbc.profile.turns import in_turn
from pbc.runtime.allocator import keep_freed_memory

SIZES = (1, 2, 4, 8)
"""Mini-batches per call of the prefix that are tried."""


def stages(task: Task) -> dict[str, Any]:
    """Time all stages of all levels, and PyTorch's, in turn."""
    keep_freed_memory()  # as training does; it is the whole process's, PyTorch's too
    bundle, spec = bundle_stages.opened(task)
    engine = bundle_stages.engine_of(bundle)
    executable = bundle_stages.started(task, bundle, engine)
    has_prefix = bundle.has_prefix
    sizes = tuple(factor * task.batch for factor in SIZES) if has_prefix else ()
    count = max((task.batch, *sizes))
    notes: list[str] = []
    if task.photos is None:
        pixels = inputs.noise(spec, count)
    else:
        pixels, notes = inputs.photos(spec, count, task.photos)
    sides = bundle_stages.sides(task, executable, pixels, sizes)
    if task.torch:
        from pbc.profile import torch_stages

        found, more = torch_stages.sides(task, bundle, pixels, sizes)
        sides += found
        notes += more
    return {
        "sides": in_turn(sides, task.rounds),
        "engine_version": engine.version(),
        "notes": notes,
    }


def training(task: Task) -> dict[str, Any]:
    """Train a few steps, by pbc or by PyTorch, for the memory that it takes."""
    bundle, spec = bundle_stages.opened(task)
    if task.who == PBC:
        return bundle_stages.train(task, bundle, spec)
    from pbc.profile import torch_stages

    return torch_stages.train(task, bundle, inputs.noise(spec, task.batch))


_KINDS: Mapping[str, Callable[[Task], dict[str, Any]]] = {
    STAGES: stages,
    LOADING: bundle_stages.loading,
    TRAINING: training,
}


def main() -> None:
    """Read a task from standard input, and answer on standard output.

    What libraries print goes to standard error. When the parent is gone, so is this process.
    """
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        line = sys.stdin.readline()
        if not line:
            return  # interrupted before it could ask
        task = Task.from_json(json.loads(line))
        threading.Thread(target=_end_with_parent, daemon=True).start()
        try:
            reply = _KINDS[task.kind](task)
        except PbcError as error:
            reply = {"error": str(error), "exit_code": error.exit_code}
        answer.write(json.dumps(reply) + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries' threads and pools of compilers must not keep the answer waiting


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
