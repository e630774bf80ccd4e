"""One cell of the zoo's table: a network, compiled by a strategy for an engine, beside torch."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import eager
import numpy as np
import torch
from catalogue import Network, build
from eager import Trained
from torch import nn

import pbc
from pbc.bundle import Bundle
from pbc.compiler import CompileOptions
from pbc.errors import PbcError
from pbc.runtime.engines import Executable, guarded
from pbc.runtime.objective import Objective
from pbc.runtime.parameters import initial_parameters
from pbc.runtime.runtime import Runtime

CLASSES = 5
BATCH = 4
TARGET = "generic-x86-64"
"""Not this machine: nothing is timed, and a cell gives the same result everywhere."""

LOGITS_TOLERANCE = 1e-4
"""Of the largest score."""
MOVE_TOLERANCE = 1e-3
"""Of the largest move in a parameter."""
# A parameter that moves less than this share of the farthest moved by rounding alone.
_LEAST_MOVE = 1e-5
# What a parameter loses to float32 in the steps, as a share of its largest value.
_EPSILON = eager.STEPS * float(np.finfo(np.float32).eps)
# A ReLU or a maximum of inputs that are equal but for rounding goes either way, and moves all that
# is before it: a fault shows on every batch, a tie on one.
_BATCHES = 3
# What torch and engines raise under a limit.
_NO_MEMORY = ("allocate memory", "out of memory", "not enough memory", "bad_alloc")
# Where float32 itself is worse than the tolerances, an engine may be this much worse than torch.
_ROUNDING_FACTOR = 10.0


@dataclass(frozen=True)
class Cell:
    """What one process does. levels: how many proxies are asked for, beside the network itself."""

    network: Network
    strategy: str
    engine: str
    levels: int


@dataclass(frozen=True)
class Result:
    """An outcome, and the reason where it is not `right`.

    outcome: right, refused, wrong, traceback or limit (time or memory). trace: of a traceback.
    """

    outcome: str
    reason: str = ""
    trace: str = ""


@dataclass(frozen=True)
class Subject:
    """A network as a user has it: a module with weights, and the file of them in a folder."""

    network: Network
    module: nn.Module
    folder: Path

    @classmethod
    def of(cls, network: Network, folder: Path) -> Subject:
        """Build a network with random weights, the same every time."""
        torch.manual_seed(0)
        module = eager.randomise(build(network.name, network.size_pixels), network.shape)
        subject = cls(network, module, folder)
        eager.save(module, subject.weights)
        return subject

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"

    def compiled(self, cell: Cell) -> Bundle:
        """Compile as `pbc compile` does."""
        options = CompileOptions(
            target=TARGET,
            engine=cell.engine,
            weights=str(self.weights),
            strategy=cell.strategy,
            classes=CLASSES,
            shape=self.network.shape,
            batch=BATCH,
            levels=cell.levels,
        )
        return pbc.compile(self.network.name, self.folder / "zoo.pbc", options)


def run(cell: Cell, subject: Subject | None = None) -> Result:
    """Compile, train two steps, compare; whatever is raised becomes the outcome.

    subject: the cell's network, where it has been built.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            reason = _compare(cell, subject or Subject.of(cell.network, Path(folder)))
    except PbcError as error:
        return Result("refused", str(error))
    except Exception as error:
        reason = _described(error)
        if isinstance(error, MemoryError) or any(words in reason for words in _NO_MEMORY):
            return Result("limit", f"memory: {reason}")
        return Result("traceback", reason, traceback.format_exc())
    return Result("wrong", reason) if reason else Result("right")


def _compare(cell: Cell, subject: Subject) -> str:
    """How the bundle differs from torch, in words; empty where it does not."""
    bundle = subject.compiled(cell)
    theta = initial_parameters(bundle, CLASSES, seed=0)
    if changed := eager.differing(subject.module, theta):
        return f"the bundle starts from other values of {changed[0]} than its weights file has"
    runtime = Runtime.open(bundle.path)
    executable = guarded.load(runtime.engine, runtime.bundle, threads=1)
    reasons = []
    for seed in range(_BATCHES):
        random = np.random.default_rng(seed)
        images = random.standard_normal((BATCH, *cell.network.shape), dtype=np.float32)
        reasons.append(_compare_steps(subject.module, executable, theta, images))
        if not reasons[-1]:
            return ""
    return reasons[0]


def _compare_steps(
    module: nn.Module,
    executable: Executable,
    theta: Mapping[str, np.ndarray],
    images: np.ndarray,
) -> str:
    """How the steps on a batch differ from torch's, in words; empty where they do not."""
    labels = np.arange(len(images), dtype=np.int64) % CLASSES
    rate = eager.learning_rate(module, theta, images, labels)
    executable.start(theta, Objective("sgd", rate, momentum=eager.MOMENTUM))
    for _ in range(eager.STEPS):
        executable.forward(0, executable.prefix(0, images), labels)
        executable.update()
    logits = executable.logits(0, executable.prefix(0, images))
    found = Trained(logits.astype(np.float64), executable.parameters())

    single = eager.train(module, theta, images, labels, rate, torch.float32)
    if not (reason := difference(theta, found, single)):
        return ""
    double = eager.train(module, theta, images, labels, rate, torch.float64)
    return difference(theta, found, double, single) and reason


def difference(
    theta: Mapping[str, np.ndarray],
    found: Trained,
    expected: Trained,
    other: Trained | None = None,
) -> str:
    """The first of the scores and parameters that is off; no more than `other` is, where given.

    theta: the parameters before the steps.
    """
    if found.parameters.keys() != expected.parameters.keys():
        names = found.parameters.keys() ^ expected.parameters.keys()
        return f"the engine trains other parameters: {', '.join(sorted(names))}"
    error = _largest(found.logits - expected.logits)
    allowed = LOGITS_TOLERANCE * _largest(expected.logits)
    if other is not None:
        allowed = max(allowed, _ROUNDING_FACTOR * _largest(other.logits - expected.logits))
    if not error <= allowed:
        return f"the scores are off by {error / _largest(expected.logits):.1e}"
    moves = {name: _largest(after - theta[name]) for name, after in expected.parameters.items()}
    least = _LEAST_MOVE * max(moves.values())
    for name, after in expected.parameters.items():
        error = _largest(found.parameters[name] - after)
        allowed = MOVE_TOLERANCE * max(moves[name], least) + _EPSILON * _largest(theta[name])
        if other is not None:
            allowed = max(allowed, _ROUNDING_FACTOR * _largest(other.parameters[name] - after))
        if not error <= allowed:
            return f"{name} moves otherwise, by {error / max(moves[name], least):.1e}"
    return ""


def _largest(values: np.ndarray) -> float:
    """The largest magnitude; NaN where there is one."""
    return float(np.abs(values).max())


def _described(error: BaseException) -> str:
    """The error in a line, and the innermost place in pbc that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f for f in frames if "/pbc/" in f.filename or "/passes/" in f.filename]
    where = f" at {Path(places[-1].filename).name}:{places[-1].name}" if places else ""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}{where}"
