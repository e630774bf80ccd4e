"""Align the proxies to the original at the interface, on calibration data."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch.fx import GraphModule

from pbc.bundle.ladder import INT8
from pbc.ir.calibration import Calibration
from pbc.ir.dim_rules import dims_of
from pbc.ir.dims import Dims
from pbc.ir.graph import get_tensor, op_name, tensor_names
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.rewrite import replace_tensor
from pbc.ir.work import work_file
from pbc.proxies import parallel
from pbc.proxies.align_losses import FEATURES, LOGITS, AlignmentLoss, terms_of
from pbc.proxies.distillation import (
    MINUTES,
    STATISTICS_BATCHES,
    Distillation,
    adopt,
    unaugmented,
)
from pbc.proxies.fidelity import UpToInterface, standards
from pbc.proxies.sample_fidelity import measured

LEARNING_RATE = 5e-4
# Who lost channels has further to go; without batch norms that is not stable.
LEARNING_RATE_AFTER_PRUNING = 1e-3
# Of the ladder's time: the first proxy pays for all, since each further one starts from it.
FIRST_LEVEL_SHARE = 0.5
TRAINING, MOMENTUM = 5, 6  # positions among batch_norm's arguments


@dataclass(frozen=True)
class Align:
    """Distil each proxy so that what reaches the trainable part matches what level 0 sends there.

    Graphs keep their form; the frozen weights of a level's prefix (and of its body, as far as a
    trainable layer reads what they compute) change, and the level gains its fidelity. Level k
    starts from the slices of the aligned level k-1. The loss is, on interface tensors standardised
    by level 0's per-channel statistics, mean squared error plus one minus the cosine (PieBridge,
    SenSys 2024, «latent space alignment»); AdamW with cosine decay. Batch norms' statistics are
    measured afresh where channels went, and then stay: training with those of each batch is slower
    to learn and worse on images of another kind (docs/alignment.md). It runs on a GPU where there
    is one, in bfloat16 autocast; processes started by torchrun share each step's batch.

    A level that differs from the original in precision alone keeps the original's weights, and is
    only measured. Does nothing without calibration data: levels stay unaligned and unrouted.

    align_loss: other terms of the loss, or more (pbc.proxies.align_losses): `logits` distils the
        scores of the classifier that came with the weights, `map` the last feature map, `nst` the
        pattern of it; `features+map` is a sum.
    align_steps: steps per level; None lets `align_time` decide alone.
    align_time: minutes for the whole ladder, of which the first level that is trained gets half;
        None lets `align_steps` decide alone. With neither, ten minutes.
    """

    align_steps: int | None = None
    align_time: float | None = None
    align_loss: str = FEATURES
    stage: ClassVar[str] = "align"

    def __post_init__(self) -> None:
        """Refuse a term that there is not."""
        terms_of(self.align_loss)

    def __call__(self, program: Program) -> Program:
        calibration = program.calibration
        program = program.copy()
        if calibration is None or len(program.levels) < 2:
            return program
        if any(_gives_up_more_than_precision(level) for level in program.levels[1:]):
            self._train(program, calibration)
        # Rounding to integers is still to come, and is measured then.
        proxies = [level for level in program.levels[1:] if level.precision != INT8]
        return measured(program, proxies, calibration)

    def _train(self, program: Program, calibration: Calibration) -> None:
        """Distil levels, each from the one above; their graphs take the result over."""
        device, dims = parallel.device(), dims_of(program)
        # A copy of its own: moving a module moves the tensors it shares.
        original = copy.deepcopy(UpToInterface(program, program.levels[0])).to(device).eval()
        batches = unaugmented(calibration, STATISTICS_BATCHES)
        standard = standards(program, (original(batch.to(device)) for batch in batches))
        loss = AlignmentLoss.of(program, standard, terms_of(self.align_loss))
        inside = None if loss.feature_map is None else loss.feature_map.node
        looked_at = partial(UpToInterface, program, inside=inside, logits=LOGITS in loss.terms)
        original = copy.deepcopy(looked_at(program.levels[0])).to(device).eval()
        numbers = [
            number
            for number, level in enumerate(program.levels)
            if _gives_up_more_than_precision(level)
        ]
        for number in numbers:
            level, above = program.levels[number], program.levels[number - 1]
            if number > 1:
                start_from_above(level, above, dims)
            # A copy of its own: tensors that no plan shrank are level 0's too.
            proxy = copy.deepcopy(looked_at(level))
            recalibrates = bool(level.keep) and bool(_batch_norms(proxy))
            Distillation(
                original,
                proxy.to(device),
                loss,
                calibration,
                program.request.seed * 1000 + number,
                steps=self.align_steps,
                seconds=self._seconds(number == numbers[0], len(numbers)),
                saved=self._saved_as(program, number, calibration),
                rate=LEARNING_RATE_AFTER_PRUNING if recalibrates else LEARNING_RATE,
                task="align",
                label=f"level {number} of {len(program.levels) - 1}",
                begin=partial(_recalibrate, proxy, calibration) if recalibrates else None,
            ).train()
            adopt(level, proxy.cpu())

    def _seconds(self, first: bool, count: int) -> float | None:
        """The time for one of `count` levels; None when steps alone decide."""
        minutes = self.align_time
        if minutes is None and self.align_steps is None:
            minutes = MINUTES
        if minutes is None:
            return None
        share = 1.0
        if count > 1:
            share = FIRST_LEVEL_SHARE if first else (1 - FIRST_LEVEL_SHARE) / (count - 1)
        return minutes * 60 * share

    def _saved_as(self, program: Program, number: int, calibration: Calibration) -> Path | None:
        """The file that keeps this level's training, named by all that decides it."""
        levels = program.levels[: number + 1]
        decided_by = [
            asdict(self),
            program.request.seed,
            [level.keep for level in levels],
            [level.resolution for level in levels],
            [level.merges for level in levels],
            calibration.samples.digest(),
        ]
        name = f"align-{number}"
        return work_file(program, name, decided_by, program.levels[0].frozen, ".safetensors")


def start_from_above(level: LevelGraphs, above: LevelGraphs, dims: Dims) -> None:
    """Replace a proxy's tensors by the slices of the level above, which is aligned already."""
    for graph, aligned in zip(level.frozen, above.frozen, strict=True):
        for name in tensor_names(graph):
            kept = dims.slice(name, get_tensor(aligned, name), level.keep, above.keep)
            replace_tensor(graph, name, kept)


def _gives_up_more_than_precision(level: LevelGraphs) -> bool:
    return bool(level.keep) or level.resolution is not None or bool(level.merges)


@torch.no_grad()
def _recalibrate(proxy: UpToInterface, calibration: Calibration) -> None:
    """Measure the batch norms' statistics afresh, of the channels that are left."""
    norms = _batch_norms(proxy)
    device = next(proxy.parameters()).device
    _use_batch_statistics(proxy, True)
    for number, images in enumerate(unaugmented(calibration, STATISTICS_BATCHES)):
        for graph, node in norms:
            _set_argument(graph, node, MOMENTUM, 1 / (number + 1))
        for graph in proxy.graphs:
            graph.recompile()
        proxy(images.to(device))
    _use_batch_statistics(proxy, False)


def _batch_norms(proxy: UpToInterface) -> list[tuple[GraphModule, torch.fx.Node]]:
    return [
        (graph, node)
        for graph in proxy.graphs
        for node in graph.graph.nodes
        if node.op == "call_function"
        and op_name(node) == "aten.batch_norm.default"
        and all(a.op == "get_attr" for a in node.args[1:5] if isinstance(a, torch.fx.Node))
    ]


def _set_argument(graph: GraphModule, node: torch.fx.Node, position: int, value: object) -> None:
    arguments = list(node.args)
    arguments[position] = value  # type: ignore[call-overload]
    node.args = tuple(arguments)


def _use_batch_statistics(proxy: UpToInterface, on: bool) -> None:
    """Switch batch norms between their batch's statistics (updating the running ones) and those."""
    for graph, node in _batch_norms(proxy):
        _set_argument(graph, node, TRAINING, on)
    for graph in proxy.graphs:
        graph.recompile()
