"""Retraining of compressed weights: they learn to send what level 0 sent before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from pbc.bundle.ladder import INT8
from pbc.ir.calibration import Calibration
from pbc.ir.graph import get_tensor, tensor_names
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.rewrite import replace_tensor
from pbc.ir.work import work_file
from pbc.proxies import parallel
from pbc.proxies.align_losses import AlignmentLoss, feature_loss
from pbc.proxies.compression import weight_names
from pbc.proxies.distillation import (
    MINUTES,
    STATISTICS_BATCHES,
    Distillation,
    adopt,
    unaugmented,
)
from pbc.proxies.fidelity import Standard, UpToInterface, standards

# Of what alignment takes, as much again is added for all levels together.
SHARE = 0.25
LEARNING_RATE = 2e-4
JUDGED_BATCHES = 4


@dataclass(frozen=True)
class Retraining:
    """How the weights that a pass compressed are trained, and for how long.

    task: the pass's name; label: its levels', for progress. decided_by: what of the pass decides
    the result. constrained: makes of a graph before and after compression one that computes the
    compressed weights from what trains. values: the weights that such a graph stands for, by their
    names, of any shape. align_steps, align_time: as for `align`; a quarter of either is spent.
    """

    task: str
    label: str
    decided_by: Sequence[Any]
    constrained: Callable[[GraphModule, GraphModule], GraphModule]
    values: Callable[[GraphModule, Collection[str]], Mapping[str, Tensor]]
    align_steps: int | None
    align_time: float | None

    def __call__(self, before: Program, program: Program, calibration: Calibration) -> Program:
        """Train level 0, and each level that has weights of its own; all else stays in common."""
        first = before.levels[0]
        numbers = [0, *(n for n, level in enumerate(before.levels) if _has_own(level, first))]
        device = parallel.device()
        original = copy.deepcopy(UpToInterface(before, first)).to(device).eval()
        batches = unaugmented(calibration, STATISTICS_BATCHES)
        standard = standards(before, (original(batch.to(device)) for batch in batches))
        training = _Training(self, before, calibration, original, standard)
        levels = list(program.levels)
        for turn, number in enumerate(numbers, 1):
            label = f"level {turn} of {len(numbers)}, {self.label}"
            levels[number] = training.run(number, levels[number], label, len(numbers))
        for level, was in zip(levels[1:], before.levels[1:], strict=True):
            parts = zip(level.frozen, was.frozen, levels[0].frozen, first.frozen, strict=True)
            for graph, old, new, old_first in parts:
                if _is_same(old, old_first):
                    for name in tensor_names(graph):
                        replace_tensor(graph, name, get_tensor(new, name))
        return replace(program, levels=tuple(levels))


def _is_same(graph: GraphModule, original: GraphModule) -> bool:
    """Whether a graph of a level has the tensors of level 0's."""
    names = tensor_names(graph)
    return names == tensor_names(original) and all(
        torch.equal(get_tensor(graph, name), get_tensor(original, name)) for name in names
    )


def _has_own(level: LevelGraphs, first: LevelGraphs) -> bool:
    """Whether a proxy has weights that level 0 does not have, in float32."""
    parts = zip(level.frozen, first.frozen, strict=True)
    return level.precision != INT8 and any(
        weight_names(graph) and not _is_same(graph, original) for graph, original in parts
    )


@dataclass(frozen=True)
class _Training:
    """The training of levels, towards what level 0 sent before."""

    how: Retraining
    before: Program
    calibration: Calibration
    original: UpToInterface
    standard: list[Standard]

    def run(self, number: int, compressed: LevelGraphs, label: str, count: int) -> LevelGraphs:
        """Return the level with trained weights, or as it is where training does not help.

        count: how many levels share the time.
        """
        how, was = self.how, self.before.levels[number]
        level = replace(
            compressed,
            body=how.constrained(was.body, compressed.body),
            prefix=None
            if was.prefix is None or compressed.prefix is None
            else how.constrained(was.prefix, compressed.prefix),
        )
        learner = copy.deepcopy(UpToInterface(self.before, level)).to(parallel.device())
        loss = parallel.once(lambda: self._loss(learner))
        Distillation(
            self.original,
            learner,
            AlignmentLoss(self.standard),
            self.calibration,
            self.before.request.seed * 1000 + number,
            steps=None if how.align_steps is None else max(1, round(how.align_steps * SHARE)),
            seconds=self._seconds(count),
            saved=self._saved_as(number),
            rate=lambda _: LEARNING_RATE,
            task=how.task,
            label=label,
        ).train()
        if parallel.once(lambda: self._loss(learner)) >= loss:
            return compressed
        adopt(level, learner.cpu())
        for graph, trained, old in zip(compressed.frozen, level.frozen, was.frozen, strict=True):
            for name, value in how.values(trained, weight_names(old)).items():
                replace_tensor(graph, name, value.reshape(get_tensor(old, name).shape))
            for name in set(tensor_names(old)) - set(weight_names(old)):
                replace_tensor(graph, name, get_tensor(trained, name))
        return compressed

    def _loss(self, level: UpToInterface) -> float:
        """On images of the alignment set, as they are."""
        total = 0.0
        with torch.no_grad():
            for batch in unaugmented(self.calibration, JUDGED_BATCHES):
                images = batch.to(parallel.device())
                total += float(feature_loss(level(images), self.original(images), self.standard))
        return total

    def _seconds(self, count: int) -> float | None:
        """The time for one of `count` levels; None when steps alone decide."""
        minutes = self.how.align_time
        if minutes is None and self.how.align_steps is None:
            minutes = MINUTES
        return None if minutes is None else minutes * 60 * SHARE / count

    def _saved_as(self, number: int) -> Path | None:
        """The file that keeps this level's training, named by all that decides it."""
        seed, digest = self.before.request.seed, self.calibration.samples.digest()
        decided_by = [*self.how.decided_by, seed, digest]
        graphs = [*self.before.levels[0].frozen, *self.before.levels[number].frozen]
        name = f"{self.how.task}-{number}"
        return work_file(self.before, name, decided_by, graphs, ".safetensors")
