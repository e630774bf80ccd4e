"""What a measuring process of `pbc profile` does: time stages in turn, or load, or train a while.

The number of threads of an engine, and how long idle threads spin, are fixed when it is loaded; a
peak of memory belongs to a process. So everything is measured in fresh processes, which take a
`Task` as a line of JSON and answer with another.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from pbc import data, plugins
from pbc.bundle import Bundle
from pbc.data import InputSpec
from pbc.errors import PbcError
from pbc.runtime.allocator import keep_freed_memory
from pbc.runtime.engines import Engine, Executable
from pbc.runtime.meter import peak_memory_bytes
from pbc.runtime.objective import Objective
from pbc.runtime.parameters import initial_parameters

SIZES = (1, 2, 4, 8)
"""Mini-batches per call of the prefix that are tried."""
MOST_STEPS = 30
"""Steps of a process whose memory is measured, where its peak keeps growing."""

STAGES, LOADING, TRAINING = "stages", "loading", "training"
EAGER, COMPILED = "eager", "torch.compile"
PBC = "pbc"
_WARM_UPS = 3
# Steps that count in each round, after one that does not.
_REPEATS = 3
# A step this long feels nothing of what ran before it, and is not measured more than once a turn.
_LONG_MS = 500.0
# The peak of memory has settled when so many steps in a row added less than a share of it.
_SETTLED_STEPS = 3
_SETTLED_SHARE = 0.005
# So small that parameters neither grow nor settle: gradients near zero are slow to compute with.
_LEARNING_RATE = 1e-6

Call = Callable[[], object]


@dataclass(frozen=True)
class Task:
    """What one process is to measure.

    kind: STAGES, LOADING or TRAINING. who: PBC, or for TRAINING one of PyTorch's ways.
    digest: the bundle's, so that all processes of a profile measure the same. classes: of the
    head. photos: where images come from; noise without. torch: whether PyTorch is measured too,
    and compile whether with torch.compile. began: the clock when the process was started.
    """

    kind: str
    bundle: str
    digest: str
    levels: tuple[int, ...]
    batch: int
    classes: int
    threads: int
    rounds: int
    optimizer: str
    who: str = PBC
    photos: str | None = None
    weights: str | None = None
    torch: bool = False
    compile: bool = False
    began: float = 0.0

    @property
    def objective(self) -> Objective:
        """Return what every step minimises."""
        return Objective(self.optimizer, _LEARNING_RATE)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Task:
        return cls(**{**facts, "levels": tuple(facts["levels"])})


@dataclass(frozen=True)
class Side:
    """Somebody who is measured: a level of the bundle, or a way to run PyTorch.

    prefix: a call for each number of samples; empty without a prefix. step: forward, then update.
    logits: None where nobody asks.
    """

    name: str
    prefix: Mapping[int, Call]
    forward: Call
    update: Call
    logits: Call | None = None


@dataclass
class _Times:
    """The times of one stage, in milliseconds."""

    milliseconds: list[float] = field(default_factory=list)

    def to_json(self, scale: float = 1.0) -> dict[str, float]:
        return {
            "min": min(self.milliseconds) * scale,
            "median": statistics.median(self.milliseconds) * scale,
        }


def in_turn(sides: Sequence[Side], rounds: int) -> dict[str, dict[str, Any]]:
    """Time every stage of every side in every round, the same stage of all sides side by side.

    Whatever else the machine does then slows all alike. `prefix` is in ms per image by the size of
    the call, everything else in ms per call: `step` is forward and update together.
    """
    found: dict[tuple[str, str], _Times] = {}

    def add(side: Side, stage: str, milliseconds: float) -> None:
        found.setdefault((side.name, stage), _Times()).milliseconds.append(milliseconds)

    warm_ups = _WARM_UPS
    slow: set[str] = set()
    turn = 0
    while turn < warm_ups + rounds:
        first = turn % len(sides)  # who begins meets what others left in the CPU's caches
        order = [*sides[first:], *sides[:first]]
        for size in sorted({size for side in sides for size in side.prefix}):
            for side in order:
                if size in side.prefix:
                    add(side, f"prefix {size}", _milliseconds(side.prefix[size]))
        for side in order:
            if side.name not in slow:
                side.forward()  # uncounted: a short step must not pay for what ran before
                side.update()
            for _ in range(1 if side.name in slow else _REPEATS):
                forward, update = _milliseconds(side.forward), _milliseconds(side.update)
                add(side, "forward", forward)
                add(side, "update", update)
                add(side, "step", forward + update)
        for side in order:
            if side.logits is not None:
                if side.name not in slow:
                    side.logits()
                for _ in range(1 if side.name in slow else _REPEATS):
                    add(side, "logits", _milliseconds(side.logits))
        turn += 1
        slow = {s.name for s in sides if min(found[s.name, "step"].milliseconds) > _LONG_MS}
        if len(slow) == len(sides):
            warm_ups = min(warm_ups, turn)
        if turn == warm_ups:
            found.clear()
    return {
        side.name: {
            "prefix": {
                str(size): found[side.name, f"prefix {size}"].to_json(1 / size)
                for size in side.prefix
            },
            **{
                stage: found[side.name, stage].to_json()
                for stage in ("forward", "update", "step", "logits")
                if (side.name, stage) in found
            },
        }
        for side in sides
    }


def _milliseconds(call: Call) -> float:
    begin = perf_counter()
    call()
    return 1e3 * (perf_counter() - begin)


def level_name(level: int) -> str:
    """Return what a level is called among the sides."""
    return f"level {level}"


# ---- what is computed on -------------------------------------------------------------------


def images(spec: InputSpec, count: int, photos: str | None) -> np.ndarray:
    """f32[count, 3, H, W] in NHWC memory: photos, some of them twice if need be, or noise."""
    if photos is None:
        channels, height, width = spec.shape
        random = np.random.Generator(np.random.PCG64(0))
        noise = random.standard_normal((count, height, width, channels), np.float32)
        pixels: np.ndarray = noise.transpose(0, 3, 1, 2)
        return pixels
    samples = data.images(Path(photos), spec, limit=count)
    return samples.images(np.arange(count) % len(samples))


def labels(task: Task) -> np.ndarray:
    """int64[batch]."""
    return np.arange(task.batch) % task.classes


def _opened(task: Task) -> tuple[Bundle, InputSpec]:
    bundle = Bundle.open(task.bundle)
    if bundle.digest != task.digest:
        raise PbcError(f"{task.bundle} changed while it was measured; start again")
    return bundle, InputSpec.from_json(bundle.manifest["input"])


def _engine(bundle: Bundle) -> Engine:
    engine: Engine = plugins.load("pbc.engines", bundle.manifest["engine"])()
    return engine


def _started(task: Task, bundle: Bundle, engine: Engine) -> Executable:
    executable = engine.load(bundle, threads=task.threads)
    executable.start(initial_parameters(bundle, task.classes, 0), task.objective)
    return executable


# ---- the three kinds of process ------------------------------------------------------------


def stages(task: Task) -> dict[str, Any]:
    """Time all stages of all levels, and PyTorch's, in turn."""
    keep_freed_memory()  # as training does; it is the whole process's, PyTorch's too
    bundle, spec = _opened(task)
    engine = _engine(bundle)
    executable = _started(task, bundle, engine)
    has_prefix = "prefix/0" in bundle.manifest["graphs"]
    sizes = tuple(factor * task.batch for factor in SIZES) if has_prefix else ()
    pixels = images(spec, max((task.batch, *sizes)), task.photos)
    sides = [_level_side(executable, level, task, pixels, sizes) for level in task.levels]
    notes: list[str] = []
    if task.torch:
        from pbc.profile import torch_stages

        found, notes = torch_stages.sides(task, bundle, pixels, sizes)
        sides += found
    return {
        "sides": in_turn(sides, task.rounds),
        "engine_version": engine.version(),
        "notes": notes,
    }


def _level_side(
    executable: Executable, level: int, task: Task, pixels: np.ndarray, sizes: Sequence[int]
) -> Side:
    features = executable.prefix(level, pixels[: task.batch])
    targets = labels(task)

    def prefix(size: int) -> Call:
        return lambda: executable.prefix(level, pixels[:size])

    return Side(
        level_name(level),
        {size: prefix(size) for size in sizes},
        lambda: executable.forward(level, features, targets),
        executable.update,
        lambda: executable.logits(level, features),
    )


def loading(task: Task) -> dict[str, Any]:
    """Time what comes before the first step: importing, opening, and loading all levels.

    Engines load a graph when it is first run: a level is loaded once it took a step and answered.
    What it takes the second time is computing, and taken off the level's own figure.
    """
    bundle, spec = _opened(task)
    opened = time.monotonic()
    engine = _engine(bundle)
    imported = time.monotonic()
    executable = _started(task, bundle, engine)
    pixels, targets = images(spec, task.batch, None), labels(task)

    def visit(level: int) -> None:
        features = executable.prefix(level, pixels)
        executable.forward(level, features, targets)
        executable.update()
        executable.logits(level, features)

    first = {level: _milliseconds(partial(visit, level)) for level in task.levels}
    ready = time.monotonic()
    again = {level: _milliseconds(partial(visit, level)) for level in task.levels}
    return {
        "total_seconds": ready - task.began,
        "open_seconds": opened - task.began,
        "engine_seconds": imported - opened,
        "load_seconds": ready - imported,
        "level_ms": {str(level): max(0.0, first[level] - again[level]) for level in task.levels},
        **memory(),
    }


def training(task: Task) -> dict[str, Any]:
    """Train for a while, as whoever is meant does it; what counts is the memory."""
    bundle, spec = _opened(task)
    if task.who != PBC:
        from pbc.profile import torch_stages

        return torch_stages.train(task, bundle, images(spec, task.batch, None))
    keep_freed_memory()
    executable = _started(task, bundle, _engine(bundle))
    pixels, targets = images(spec, task.batch, None), labels(task)

    def step() -> None:
        executable.forward(0, executable.prefix(0, pixels), targets)
        executable.update()

    return {"steps": until_settled(step), **memory()}


def until_settled(step: Call) -> int:
    """Repeat a step until it needs no more memory than before; return how often.

    A step of a slow network takes seconds, and the second or third is like all that follow.
    """
    peaks: list[int] = []
    while len(peaks) < MOST_STEPS:
        step()
        peaks.append(peak_bytes())
        before = peaks[-1 - _SETTLED_STEPS] if len(peaks) > _SETTLED_STEPS else 0
        if peaks[-1] - before < _SETTLED_SHARE * peaks[-1]:
            break
    return len(peaks)


def memory() -> dict[str, int | None]:
    """Return the peak of what this process had resident, and what is its own share of it now.

    `getrusage` would do for neither: its peak is inherited from whoever started the process.
    """
    return {
        "peak_rss_bytes": peak_bytes(),
        "pss_bytes": _kilobytes("smaps_rollup", "Pss"),
    }


def peak_bytes() -> int:
    """Return the peak of what this process had resident."""
    return _kilobytes("status", "VmHWM") or peak_memory_bytes()


def _kilobytes(file: str, entry: str) -> int | None:
    """Return a figure of /proc in bytes; None where the system has none."""
    try:
        lines = Path("/proc/self", file).read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith(f"{entry}:"))
    return next((1024 * int(count) for count in found), None)


# ---- being a process of its own ------------------------------------------------------------

_KINDS: Mapping[str, Callable[[Task], dict[str, Any]]] = {
    STAGES: stages,
    LOADING: loading,
    TRAINING: training,
}


def main() -> None:
    """Read a task from standard input, and answer on standard output.

    What libraries print goes to standard error. When whoever asked is gone, so is this process.
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
