"""Fit the map from fidelity to accuracy lost, on tasks made from unlabelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from pbc.bundle.ladder import ALIGNED, SGD
from pbc.ir.program import Program
from pbc.proxies.pseudo_tasks import (
    HEADS,
    LEAST_SAMPLES,
    SHARES,
    Point,
    Tasks,
    blend,
    falling,
    head_inputs,
    points_lost,
)
from pbc.proxies.sample_fidelity import affordable
from pbc.util.progress import report

Mix = tuple[int, float, float]

SAMPLES = 1500


@dataclass(frozen=True)
class FitAccuracyMap:
    """Measure what training at a level costs in points of accuracy, and fit it over fidelity.

    Graphs stay as they are; `program.accuracy_map`, `program.mixes` and each aligned level's
    `accuracy_loss` are filled. No labels are needed: a task's classes are clusters (k-means, a seed
    for each task) of what level 0 sends to the head. For every level, and for blends of it with
    level 0, a linear head is trained in closed form (ridge regression on one-hot targets) on the
    alignment images and tested on level 0's features of the held-out ones; what it loses against a
    head trained on level 0, averaged over tasks, plus the standard error of that, so that few
    images promise little, is one point. The map is their isotonic regression and ends in (1, 0).

    Which loss a level costs depends on what makes the head: for the heads that the device makes in
    closed form (shrunk discriminant analysis) the blends are tested too. The mixes say, by kind of
    head, what every level costs at every share of the samples, never falling with the share.

    Does nothing when no level is aligned; notes where there are too few images.
    """

    stage: ClassVar[str] = "route"

    def __call__(self, program: Program) -> Program:
        calibration = program.calibration
        program = program.copy()
        aligned = [n for n, level in enumerate(program.levels) if level.status == ALIGNED]
        if calibration is None or not aligned:
            return program
        macs = sum(level.macs for level in program.levels)
        chosen = affordable(macs, calibration.align, SAMPLES)
        if len(chosen) < LEAST_SAMPLES:
            note = (
                f"{len(chosen)} alignment images are too few to map fidelity to accuracy "
                f"(at least {LEAST_SAMPLES})"
            )
            return replace(program, notes=(*program.notes, note))
        report("fit-accuracy-map", 0.0, "level 0")
        levels, seed = list(program.levels), program.request.seed
        original = head_inputs(program, levels[0], calibration, chosen)
        tested = head_inputs(program, levels[0], calibration, calibration.held_out)
        tasks = Tasks.of(original, tested, seed)
        best = {kind: tasks.right(original, kind) for kind in HEADS}
        points: list[Point] = []
        mixes: dict[str, list[Mix]] = {kind: [] for kind in HEADS}
        for turn, number in enumerate(aligned, 1):
            level = levels[number]
            assert level.fidelity is not None  # an aligned level's is measured
            report("fit-accuracy-map", turn / (len(aligned) + 1), f"level {number}")
            proxy = head_inputs(program, level, calibration, chosen)
            for kind in HEADS:
                costs = []
                for share in SHARES:
                    right = tasks.right(blend(proxy, original, share, seed), kind)
                    lost, error = points_lost(best[kind], right)
                    costs.append(max(0.0, lost) + error)
                    if kind == SGD:
                        points.append((1 - share * (1 - level.fidelity), costs[-1]))
                    if kind == SGD and share == 1:
                        levels[number] = replace(level, accuracy_loss=max(0.0, lost))
                costs = falling(costs, [1.0] * len(costs))
                mixes[kind] += zip([number] * len(costs), SHARES, costs, strict=True)
        return replace(
            program,
            levels=tuple(levels),
            accuracy_map=isotonic_map(points),
            mixes={kind: tuple(found) for kind, found in mixes.items()},
        )


def isotonic_map(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points by ascending fidelity with losses that never rise, and (1, 0) at the end.

    Points of one fidelity become one, as does what reaches a fidelity of 1.
    """
    by_fidelity: dict[float, list[float]] = {}
    for fidelity, lost in points:
        if fidelity < 1:
            by_fidelity.setdefault(fidelity, []).append(lost)
    fidelities = sorted(by_fidelity)
    sizes = [len(by_fidelity[fidelity]) for fidelity in fidelities]
    means = [sum(by_fidelity[f]) / size for f, size in zip(fidelities, sizes, strict=True)]
    return (*zip(fidelities, falling(means, sizes), strict=True), (1.0, 0.0))
