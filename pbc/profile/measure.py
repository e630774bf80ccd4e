"""`pbc profile` as a function: the cost of each stage of each level on this machine.

Every measurement runs in a fresh process (`pbc.profile.worker`); this one only starts them.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pbc.bundle import Bundle
from pbc.bundle.ladder import Ladder
from pbc.bundle.trust import open_trusted
from pbc.data import class_names
from pbc.errors import PbcError, UsageError
from pbc.profile.options import ProfileOptions
from pbc.profile.processes import measured
from pbc.profile.ratios import best_prefix, ratios
from pbc.profile.task import COMPILED, EAGER, LOADING, PBC, STAGES, TRAINING, Task, level_name
from pbc.util.extras import DEVICE_EXTRAS, missing
from pbc.util.processor import check_threads, cpu_name

SCHEMA = 1
_LATER_LOADS = 3
# An open head has no size of its own.
_CLASSES = 10
# OpenMP's threads would keep looking for work for a while after each call of PyTorch, and slow
# whatever is measured next.
_PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}
# torch.compile warns about its own insides.
_QUIET = {"TORCH_LOGS": "-all"}

Tell = Callable[[str], None]
Json = dict[str, Any]


@dataclass(frozen=True)
class Profile:
    """The measurements. `content` is JSON; docs/bench.md says what is in it."""

    content: Json

    def level_costs(self, threads: int) -> Json:
        """Return the cost of a sample at each measured level, and the machine it is for.

        threads: one of the numbers measured. Of each level, in ms per sample: prefix_ms in calls of
        `chunk` samples, the fastest (0 without a prefix); forward_ms and update_ms in mini-batches.
        """
        batch = self.content["protocol"]["batch"]
        (run,) = (run for run in self.content["runs"] if run["threads"] == threads)
        rows = []
        for level in self.content["protocol"]["levels"]:
            side = run["sides"][level_name(level)]
            prefix_ms, chunk = best_prefix(side)
            rows.append(
                {
                    "level": level,
                    "prefix_ms": prefix_ms,
                    "chunk": chunk or batch,
                    "forward_ms": side["forward"]["min"] / batch,
                    "update_ms": side["update"]["min"] / batch,
                }
            )
        return {
            "schema": SCHEMA,
            "bundle_digest": self.content["bundle"]["digest"],
            "engine_version": self.content["bundle"]["engine_version"],
            "cpu": self.content["machine"]["cpu"],
            "threads": threads,
            "batch": batch,
            "levels": rows,
        }

    def to_json(self) -> Json:
        return self.content


def measure(path: Path, options: ProfileOptions, tell: Tell) -> Profile:
    """Measure a bundle on this machine, in fresh processes one after the other.

    tell: takes a line whenever a process begins. Raises PbcError for what the user can fix.
    """
    for count in options.threads:
        check_threads(count)
    bundle = open_trusted(path)
    levels = _levels(bundle, options.levels)
    threads = options.threads or (len(os.sched_getaffinity(0)),)
    against, notes = _against(options)
    task = Task(
        STAGES,
        str(path.resolve()),
        bundle.digest,
        levels,
        options.batch or int(bundle.manifest["batch"]),
        _classes(bundle, options.data),
        threads[0],
        options.rounds,
        options.optimizer,
        photos=None if options.data is None else str(options.data.resolve()),
        weights=None if options.weights is None else str(options.weights.resolve()),
        torch=against,
        compile=options.torch_compile,
    )
    # A folder of its own for what engines derive, so that the first load is one.
    with tempfile.TemporaryDirectory(prefix="pbc-profile-", ignore_cleanup_errors=True) as cache:
        environment = {**os.environ, **_PASSIVE, **_QUIET, "PBC_CACHE": cache}
        loads = _loads(task, environment, tell)
        runs = []
        for count in threads:
            tell(f"stages on {count} thread(s): {options.rounds} rounds after warming up")
            run = _stages(replace(task, threads=count), environment, options, tell)
            notes += [note for note in run.pop("notes") if note not in notes]
            against = against and EAGER in run["sides"]
            runs.append({"threads": count, **run})
        trained, more = _trained(replace(task, torch=against), environment, tell)
    manifest = bundle.manifest
    content: Json = {
        "schema": SCHEMA,
        "bundle": {
            "file": path.name,
            "digest": bundle.digest,
            "model": manifest["model"],
            "strategy": manifest["strategy"],
            "target": manifest["target"]["name"],
            "input": manifest["input"]["shape"],
            "levels": manifest["levels"],
            "engine": manifest["engine"],
            "engine_version": runs[0]["engine_version"],
        },
        "machine": {"cpu": cpu_name(), "cpus": len(os.sched_getaffinity(0))},
        "protocol": {
            "levels": list(levels),
            "batch": task.batch,
            "classes": task.classes,
            "optimizer": task.optimizer,
            "rounds": task.rounds,
            "images": "noise" if task.photos is None else "photos",
            "environment": _PASSIVE,
        },
        "process": {**loads, "training": trained},
        "runs": runs,
        "notes": [*notes, *more],
    }
    found = Profile(content)
    for run in runs:
        run["ratios"] = ratios(run["sides"], task.batch)
    content["level_costs"] = [found.level_costs(count) for count in threads]
    return found


def _levels(bundle: Bundle, wanted: Sequence[int]) -> tuple[int, ...]:
    count = len(Ladder.from_json(bundle.manifest["levels"], bundle.manifest["cost_model"]))
    for level in wanted:
        if not 0 <= level < count:
            raise UsageError(f"--levels has {level}; {bundle.path} has the levels 0…{count - 1}")
    return tuple(sorted(set(wanted))) or tuple(range(count))


def _classes(bundle: Bundle, photos: Path | None) -> int:
    manifest = bundle.manifest
    known = manifest.get("class_count")
    if known is not None:
        return int(known)
    if photos is not None:
        return max(2, len(class_names(photos)))
    return len(manifest["classes"] or ()) or _CLASSES


def _against(options: ProfileOptions) -> tuple[bool, list[str]]:
    """Return whether PyTorch is to be measured, and why it is not although it was not forbidden."""
    if options.against == "none":
        return False, []
    if importlib.util.find_spec("torch") is not None:
        return True, []
    needs = missing(ModuleNotFoundError(name="torch"), DEVICE_EXTRAS)
    if options.against is not None:
        raise PbcError(f"--against torch needs {needs}")
    return False, [f"PyTorch is left out: it needs {needs}"]


# ---- the processes -------------------------------------------------------------------------


def _loads(task: Task, environment: Mapping[str, str], tell: Tell) -> Json:
    """Time the first load of the bundle on this machine, and later ones."""
    tell(f"loading: once for the first time, {_LATER_LOADS} times later")
    loading = replace(task, kind=LOADING)
    first = measured(loading, environment)
    later = [measured(loading, environment) for _ in range(_LATER_LOADS)]
    totals = [load["total_seconds"] for load in later]
    best = min(later, key=lambda load: float(load["total_seconds"]))
    return {
        "first_load": first,
        "later_load": {**best, "median_total_seconds": statistics.median(totals)},
    }


def _stages(
    task: Task, environment: Mapping[str, str], options: ProfileOptions, tell: Tell
) -> Json:
    """Time all stages; PyTorch's are left out where unasked for and impossible to rebuild."""
    try:
        return measured(task, environment)
    except PbcError as error:
        if not task.torch or options.against is not None:
            raise
        # It may have been pbc's own: then it comes again.
        run = measured(replace(task, torch=False), environment)
        tell(f"PyTorch is left out: {error}")
        return {**run, "notes": [*run["notes"], f"PyTorch is left out: {error}"]}


def _trained(
    task: Task, environment: Mapping[str, str], tell: Tell
) -> tuple[dict[str, Json], list[str]]:
    """Return the memory of a process of each kind that trains at level 0."""
    tell("memory of some steps in processes of their own")
    parties = [PBC]
    if task.torch:
        parties += [EAGER, *([COMPILED] if task.compile else [])]
    trained, notes = {}, []
    for who in parties:
        found = measured(replace(task, kind=TRAINING, who=who), environment)
        if "note" in found:
            notes.append(str(found["note"]))
            continue
        trained[who] = found
    if any(not found.get("from_first_step", True) for found in trained.values()):
        notes.append("PyTorch's peak memory includes what rebuilding the network needed")
    return trained, notes
