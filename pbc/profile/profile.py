"""`pbc profile`, as a script would call it: what each stage of each level costs here.

Every measurement runs in a fresh process (`pbc.profile.stages`); this one only starts them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pbc.bundle import Bundle
from pbc.bundle.ladder import Ladder
from pbc.data import class_names
from pbc.errors import PbcError, UsageError, suggest
from pbc.profile.stages import (
    COMPILED,
    EAGER,
    LOADING,
    PBC,
    STAGES,
    TRAINING,
    Task,
    level_name,
)
from pbc.runtime.objective import default_rate
from pbc.util.extras import DEVICE_EXTRAS, missing
from pbc.util.processor import cpu_name

SCHEMA = 1
AGAINST = ("torch", "none")
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
class Options:
    """What is to be measured beside the bundle.

    data: photos to measure on; None for noise. batch: None for the bundle's. threads: none for
    one for each CPU that this process may use. levels: none for all. against: None for "torch"
    where that is possible, else a word of AGAINST. weights: see pbc.bench.Setting.
    """

    data: Path | None = None
    batch: int | None = None
    threads: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    optimizer: str = "sgd"
    rounds: int = 10
    against: str | None = None
    torch_compile: bool = True
    weights: Path | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        default_rate(self.optimizer)
        for name in ("batch", "rounds"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise UsageError(f"--{name} is {number}; it must be at least 1")
        for count in self.threads:
            if count < 1:
                raise UsageError(f"--threads has {count}; each must be at least 1")
        if self.against is not None and self.against not in AGAINST:
            raise UsageError(suggest("rival", self.against, AGAINST))


@dataclass(frozen=True)
class Profile:
    """What was found. `content` is JSON; docs/bench.md says what is in it."""

    content: Json

    def level_costs(self, threads: int) -> Json:
        """Return what a sample costs at each measured level on so many threads, and where.

        Of each level, in ms per sample: prefix_ms in calls of `chunk` samples, the fastest (0
        without a prefix); forward_ms and update_ms in mini-batches.
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


def profile(path: Path, options: Options, tell: Tell) -> Profile:
    """Measure a bundle on this machine, in fresh processes one after the other.

    tell: takes a line whenever a process begins. Raises PbcError for what the user can fix.
    """
    bundle = Bundle.open(path)
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
    return _CLASSES if photos is None else max(2, len(class_names(photos)))


def _against(options: Options) -> tuple[bool, list[str]]:
    """Return whether PyTorch is to be measured, and why it is not although nobody forbade it."""
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
    first = _measured(loading, environment)
    later = [_measured(loading, environment) for _ in range(_LATER_LOADS)]
    totals = [load["total_seconds"] for load in later]
    best = min(later, key=lambda load: float(load["total_seconds"]))
    return {
        "first_load": first,
        "later_load": {**best, "median_total_seconds": statistics.median(totals)},
    }


def _stages(task: Task, environment: Mapping[str, str], options: Options, tell: Tell) -> Json:
    """Time all stages; without PyTorch's where its network cannot be rebuilt and nobody asked."""
    try:
        return _measured(task, environment)
    except PbcError as error:
        if not task.torch or options.against is not None:
            raise
        # It may have been pbc's own: then it comes again.
        run = _measured(replace(task, torch=False), environment)
        tell(f"PyTorch is left out: {error}")
        return {**run, "notes": [*run["notes"], f"PyTorch is left out: {error}"]}


def _trained(
    task: Task, environment: Mapping[str, str], tell: Tell
) -> tuple[dict[str, Json], list[str]]:
    """Return the memory of a process of each kind that trains at level 0."""
    tell("memory of some steps in processes of their own")
    contestants = [PBC]
    if task.torch:
        contestants += [EAGER, *([COMPILED] if task.compile else [])]
    trained, notes = {}, []
    for who in contestants:
        found = _measured(replace(task, kind=TRAINING, who=who), environment)
        if "note" in found:
            notes.append(str(found["note"]))
            continue
        trained[who] = found
    if any(not found.get("from_first_step", True) for found in trained.values()):
        notes.append("PyTorch's peak memory includes what rebuilding the network needed")
    return trained, notes


def _measured(task: Task, environment: Mapping[str, str]) -> Json:
    """Have a fresh process do a task.

    It is a group of its own: Ctrl-C ends this process, which then ends it and its own children.
    """
    command = [sys.executable, "-c", "from pbc.profile.stages import main; main()"]
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**environment, "OMP_NUM_THREADS": str(task.threads)},
        start_new_session=True,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            process.stdin.write(json.dumps(replace(task, began=began).to_json()) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        code = process.wait()
    if code < 0:
        raise PbcError(
            f"a measuring process was ended by signal {-code}"
            + ("; if memory is short, a smaller --batch needs less" if code == -9 else "")
        )
    if not line:
        raise RuntimeError(f"a measuring process failed (exit code {code})")
    reply: Json = json.loads(line)
    if "error" in reply:
        kind = UsageError if reply["exit_code"] == UsageError.exit_code else PbcError
        raise kind(reply["error"])
    return reply


# ---- what the times say --------------------------------------------------------------------


def best_prefix(side: Json) -> tuple[float, int]:
    """Return the least ms per image of the prefix, and the samples per call; zeros without one."""
    calls = ((times["min"], int(size)) for size, times in side["prefix"].items())
    return min(calls, default=(0.0, 0))


def visit_ms(side: Json, batch: int) -> float:
    """Return what an image costs from pixels to new parameters, in ms."""
    return best_prefix(side)[0] + float(side["step"]["min"]) / batch


def ratios(sides: Mapping[str, Json], batch: int) -> dict[str, dict[str, float]]:
    """Return how many times as fast each level is, by the least times.

    Level 0 as PyTorch at its best, for each stage the faster of its ways; the others as level 0.
    """
    rivals = [sides[name] for name in (EAGER, COMPILED) if name in sides]
    first = sides.get(level_name(0))
    found = {}
    for name, side in sides.items():
        against = rivals if side is first else [first] if first is not None else []
        if side in rivals or not against:
            continue
        prefix = best_prefix(side)[0]
        step = side["step"]["min"]
        slower_prefix = min(best_prefix(other)[0] for other in against)
        slower_step = min(other["step"]["min"] for other in against)
        found[name] = {
            **({"prefix": slower_prefix / prefix} if prefix else {}),
            "step": slower_step / step,
            "visit": (slower_prefix + slower_step / batch) / visit_ms(side, batch),
        }
    return found
