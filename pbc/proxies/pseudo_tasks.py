"""Tasks made from unlabelled images: what training at a level costs in points of accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from pbc.bundle.ladder import CLOSED, SGD
from pbc.ir.calibration import Calibration, batches
from pbc.ir.dim_rules import analyse
from pbc.ir.dims import channel_axes
from pbc.ir.graph import PARAMETER, placeholders, shape_of
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Head, Program
from pbc.proxies.as_run import up_to
from pbc.proxies.sample_fidelity import affordable
from pbc.runtime.closed_form import ClassStatistics
from pbc.util.progress import report

Point = tuple[float, float]

TASKS = 8
# 100 classes of 15 samples, in so many principal components, and this ridge came closest to the
# losses on Caltech-101 (docs/architecture.md, «Policy and accuracy map»).
CLASSES = 100
SAMPLES_PER_CLASS = 15
COMPONENTS = 32
ROUNDS = 10
# Ridge regression came close to what SGD loses, see above.
HEADS = (SGD, CLOSED)
RIDGE = 0.3
# Of the samples, how many are at the cheaper level: a whole epoch rarely is.
SHARES = (1.0, 0.75, 0.5, 0.25)
# Of the tasks, those for heads in closed form, each of which takes a solution of its own.
CLOSED_TASKS = 4
# What levels are judged on before they are aligned to the end, when they are judged again.
EARLY_SAMPLES = 600
EARLY_LEAST = 200
LEAST_SAMPLES = 100


@dataclass(frozen=True)
class Tasks:
    """Pseudo-tasks: for each, the class of every training and every test sample.

    labels: int64 [samples, tasks]; tested: float32 [tests, channels], the features that are
    tested on; answers: int64 [tests, tasks].
    """

    labels: Tensor
    tested: Tensor
    answers: Tensor
    classes: int

    @staticmethod
    def of(features: Tensor, tested: Tensor, seed: int) -> Tasks:
        """Cluster level 0's features, standardised and whitened, once for each task."""
        classes = min(CLASSES, len(features) // SAMPLES_PER_CLASS)
        whiten = whitening(features)
        points, others = whiten(features), whiten(tested)
        labels, answers = [], []
        for task in range(TASKS):
            centres = k_means(points, classes, seed * TASKS + task)
            labels.append(nearest(points, centres))
            answers.append(nearest(others, centres))
        return Tasks(torch.stack(labels, 1), tested, torch.stack(answers, 1), classes)

    def right(self, features: Tensor, kind: str = SGD) -> Tensor:
        """float64 [tests]: in what share of the tasks a head trained on these features is right."""
        if kind == CLOSED:
            return self._right_in_closed_form(features)
        targets = functional.one_hot(self.labels, self.classes).double().flatten(1)
        head = ridge(features.double(), targets)
        scores = head(self.tested.double()).unflatten(1, (-1, self.classes))
        right: Tensor = (scores.argmax(2) == self.answers).double().mean(1)
        return right

    def _right_in_closed_form(self, features: Tensor) -> Tensor:
        rows, found = features.numpy(), []
        for task in range(min(CLOSED_TASKS, self.labels.shape[1])):
            sums = ClassStatistics(self.classes, rows.shape[1], task)
            sums.add(rows, self.labels[:, task].numpy())
            head = sums.glance()
            scores = self.tested.numpy() @ head.weight.T + head.bias
            found.append(scores.argmax(1) == self.answers[:, task].numpy())
        return torch.from_numpy(np.mean(found, axis=0))


def head_inputs(
    program: Program, level: LevelGraphs, calibration: Calibration, indices: np.ndarray
) -> Tensor:
    """float32 [samples, channels]: what the head reads at a level, at the initial parameters."""
    known = analyse(program.levels[0]).axes
    head = program.network.head
    channels = [
        channel_axes(known[node.name]) for node in _read_by_head(program.levels[0].body, head)
    ]
    last = [node.name for node in _read_by_head(level.body, head)]
    run = up_to(program, level, calibration, last)
    rows = []
    with torch.no_grad():
        for part in batches(indices):
            _, read = run(part)
            rows.append(torch.cat([_pooled(*pair) for pair in zip(read, channels, strict=True)], 1))
    return torch.cat(rows)


def _pooled(read: Tensor, channels: Sequence[int]) -> Tensor:
    """[samples, channels]: what a head that reads tokens or positions is pooled from."""
    positions = [axis for axis in range(1, read.dim()) if axis not in channels]
    return (read.mean(positions) if positions else read).reshape(len(read), -1)


def _read_by_head(graph: GraphModule, head: Head) -> list[Node]:
    """Return what the layers of the head read: one value, or one for each of several heads."""
    weights = {
        node
        for node in placeholders(graph)
        if node.meta.get(PARAMETER) in head.parameters and len(shape_of(node)) > 1
    }
    read: dict[Node, None] = {}
    for node in graph.graph.nodes:
        if node.op == "output" or not weights & set(node.all_input_nodes):
            continue
        if set(node.all_input_nodes) <= weights:
            weights.add(node)  # a weight that is normalised, or given by parts
        else:
            inputs = (value for value in node.all_input_nodes if value not in weights)
            read.setdefault(next(value for value in inputs if PARAMETER not in value.meta))
    return list(read)


def points_lost(best: Tensor, right: Tensor) -> Point:
    """By how many points of accuracy `right` is behind, and the standard error of that."""
    lost = 100 * (best - right)
    return float(lost.mean()), float(lost.std()) / math.sqrt(len(lost))


def blend(proxy: Tensor, original: Tensor, share: float, seed: int) -> Tensor:
    """The proxy's features for this share of the samples, level 0's for the others."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(proxy), generator=generator) < share
    return torch.where(drawn[:, None], proxy, original)


def whitening(features: Tensor) -> Callable[[Tensor], Tensor]:
    """Standardise channels, then project onto the first principal components at equal variance."""
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    _, size, axes = torch.linalg.svd((features - mean) / scale, full_matrices=False)
    kept = int((size[:COMPONENTS] > size[0] * 1e-3).sum())
    return lambda tensor: ((tensor - mean) / scale) @ axes[:kept].T / size[:kept]


def k_means(points: Tensor, count: int, seed: int) -> Tensor:
    """[count, channels]: centres after a few of Lloyd's rounds from points drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(ROUNDS):
        members = functional.one_hot(nearest(points, centres), count).to(points.dtype)
        sizes = members.sum(0)[:, None]
        centres = torch.where(sizes > 0, members.T @ points / sizes.clamp_min(1), centres)
    return centres


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(points, centres).argmin(1)


def ridge(features: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """The ridge regression of the targets on the standardised features, as a function.

    features: float64 [samples, channels], targets: float64 [samples, outputs]. Solved in the
    smaller of the two spaces.
    """
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    offset = targets.mean(0)
    inputs = (features - mean) / scale
    samples, channels = inputs.shape
    if samples < channels:
        gram = inputs @ inputs.T + RIDGE * samples * torch.eye(samples, dtype=inputs.dtype)
        weight = inputs.T @ torch.linalg.solve(gram, targets - offset)
    else:
        gram = inputs.T @ inputs + RIDGE * samples * torch.eye(channels, dtype=inputs.dtype)
        weight = torch.linalg.solve(gram, inputs.T @ (targets - offset))
    return lambda tensor: ((tensor - mean) / scale) @ weight + offset


def falling(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The never-rising sequence nearest in weighted least squares.

    Pool adjacent violators (Ayer et al., 1955): neighbours that rise become their mean.
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        mean, total, length = value, weight, 1
        while blocks and blocks[-1][0] < mean:
            before, mass, count = blocks.pop()
            mean = (before * mass + mean * total) / (mass + total)
            total, length = mass + total, count + length
        blocks.append((mean, total, length))
    return [mean for mean, _, length in blocks for _ in range(length)]


def losses_by_share(
    program: Program, levels: Sequence[LevelGraphs], macs: float, task: str, words: str
) -> list[list[Point]] | None:
    """Return (share, points lost) by ascending share for each level, as it is now.

    A head that SGD would learn is what loses them. macs: of a sample at level 0 and all of these.
    task, words: whose progress it is, and how it names it. None where there are too few images.
    """
    calibration = program.calibration
    assert calibration is not None
    original, seed = program.levels[0].fused(), program.request.seed
    chosen = affordable(macs, calibration.align, EARLY_SAMPLES, EARLY_LEAST)
    if len(chosen) < LEAST_SAMPLES:
        return None
    known = head_inputs(program, original, calibration, chosen)
    tested = head_inputs(program, original, calibration, calibration.held_out)
    tasks = Tasks.of(known, tested, seed)
    best, found = tasks.right(known), []
    for turn, level in enumerate(levels, 1):
        report(task, turn / (len(levels) + 1), words)
        read = head_inputs(program, level.fused(), calibration, chosen)
        right = [tasks.right(blend(read, known, share, seed)) for share in SHARES]
        lost = falling([max(0.0, points_lost(best, one)[0]) for one in right], [1.0] * len(right))
        found.append(sorted(zip(SHARES, lost, strict=True)))
    return found
