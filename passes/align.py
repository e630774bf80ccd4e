"""Align the proxies to the original at the interface, on calibration data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch.fx import GraphModule

from pbc.bundle.ladder import ALIGNED, INT8
from pbc.ir.calibration import Calibration
from pbc.ir.program import (
    Program,
    body,
    get_tensor,
    op_name,
    prefix,
    tensor_names,
)
from pbc.ir.work import work_file
from pbc.proxies import parallel
from pbc.proxies.distillation import Distillation, adopt, replace_tensor, unaugmented
from pbc.proxies.fidelity import Tapped, sample_fidelity, standards

STATISTICS_BATCHES = 16
LEARNING_RATE = 5e-4
# Who lost channels has further to go; without batch norms that is not stable.
LEARNING_RATE_AFTER_PRUNING = 1e-3
MINUTES = 10.0
# Of the ladder's time: the first proxy pays for all, since each further one starts from it.
FIRST_LEVEL_SHARE = 0.5
TRAINING, MOMENTUM = 5, 6  # positions among batch_norm's arguments


@dataclass(frozen=True)
class Align:
    """Distil each proxy so that what reaches the trainable part matches what level 0 sends there.

    Graphs keep their form; the frozen weights of `prefix/k` (and of `body/k`, as far as a
    trainable layer reads what they compute) change, and `program.ladder` gains fidelities. Level k
    starts from the slices of the aligned level k-1. The loss is, on interface tensors standardised
    by level 0's per-channel statistics, mean squared error plus one minus the cosine (PieBridge,
    SenSys 2024, «latent space alignment»); AdamW with cosine decay. Batch norms' statistics are
    measured afresh where channels went, and then stay: training with those of each batch is slower
    to learn and worse on images of another kind (docs/alignment.md). It runs on a GPU where there
    is one, in bfloat16 autocast; processes started by torchrun share each step's batch.

    A level that differs from the original in precision alone keeps the original's weights, and is
    only measured. Does nothing without calibration data: levels stay unaligned and unrouted.

    align_steps: steps per level; None lets `align_time` decide alone.
    align_time: minutes for the whole ladder, of which the first level that is trained gets half;
        None lets `align_steps` decide alone. With neither, ten minutes.
    """

    align_steps: int | None = None
    align_time: float | None = None
    stage: ClassVar[str] = "align"

    def __call__(self, program: Program) -> Program:
        calibration = program.calibration
        proxies = [level for level in program.levels if level > 0]
        if calibration is None or not proxies:
            return program.copy()
        program = program.copy()
        trained = [level for level in proxies if _gives_up_more_than_precision(program, level)]
        if trained:
            self._train(program, trained, len(proxies), calibration)
        # Rounding to integers is still to come, and is measured then.
        proxies = [level for level in proxies if program.ladder.precision(level) != INT8]
        if not proxies:
            return program
        values = sample_fidelity(program, proxies, calibration, calibration.held_out)
        levels = list(program.ladder.levels)
        for level, fidelity in zip(proxies, values.mean(0), strict=True):
            levels[level] = replace(levels[level], fidelity=float(fidelity), status=ALIGNED)
        return replace(program, ladder=replace(program.ladder, levels=tuple(levels)))

    def _train(
        self, program: Program, levels: Sequence[int], of: int, calibration: Calibration
    ) -> None:
        """Distil some levels, each from the one above; their graphs take the result over."""
        device = parallel.device()
        # A copy of its own: moving a module moves the tensors it shares.
        original = copy.deepcopy(Tapped(program, 0)).to(device).eval()
        standard = standards(
            original, (batch.to(device) for batch in unaugmented(calibration, STATISTICS_BATCHES))
        )
        for level in levels:
            self._start_from_above(program, level)
            # A copy of its own: tensors that no plan shrank are level 0's too.
            tapped = copy.deepcopy(Tapped(program, level))
            recalibrates = bool(program.plan[level]) and bool(_batch_norms(tapped))
            Distillation(
                original,
                tapped.to(device),
                standard,
                calibration,
                program.seed * 1000 + level,
                steps=self.align_steps,
                seconds=self._seconds(level == levels[0], len(levels)),
                saved=self._saved_as(program, level),
                rate=LEARNING_RATE_AFTER_PRUNING if recalibrates else LEARNING_RATE,
                task="align",
                label=f"level {level} of {of}",
                begin=partial(_recalibrate, tapped, calibration) if recalibrates else None,
            ).train()
            adopt(program, level, tapped.cpu())

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

    def _start_from_above(self, program: Program, level: int) -> None:
        """Replace a proxy's tensors by the slices of the level above, which is aligned already."""
        assert program.dims is not None
        if level == 1:
            return
        for kind in (prefix, body):
            if kind(level) not in program.graphs:
                continue
            graph, above = program.graphs[kind(level)], program.graphs[kind(level - 1)]
            for name in tensor_names(graph):
                replace_tensor(graph, name, program.dims.slice(
                    name, get_tensor(above, name), program.plan[level], program.plan[level - 1]
                ))  # fmt: skip

    def _saved_as(self, program: Program, level: int) -> Path | None:
        """Where this level's training is kept between interruptions, by all that decides it."""
        assert program.calibration is not None
        decided_by = [
            asdict(self),
            program.seed,
            program.plan[: level + 1],
            [program.ladder.resolution(above) for above in range(level + 1)],
            program.calibration.samples.digest(),
        ]
        graphs = (prefix(0), body(0))
        return work_file(program, f"align-{level}", decided_by, graphs, ".safetensors")


def _gives_up_more_than_precision(program: Program, level: int) -> bool:
    return bool(program.sizes[level]) or program.ladder.resolution(level) is not None


@torch.no_grad()
def _recalibrate(proxy: Tapped, calibration: Calibration) -> None:
    """Measure the batch norms' statistics afresh, of the channels that are left."""
    norms = _batch_norms(proxy)
    device = next(proxy.parameters()).device
    _use_batch_statistics(proxy, True)
    for number, images in enumerate(unaugmented(calibration, STATISTICS_BATCHES)):
        for graph, node in norms:
            _set_argument(graph, node, MOMENTUM, 1 / (number + 1))
        for graph in {id(g): g for g, _ in norms}.values():
            graph.recompile()
        proxy(images.to(device))
    _use_batch_statistics(proxy, False)


def _batch_norms(proxy: Tapped) -> list[tuple[GraphModule, torch.fx.Node]]:
    graphs = [g for g in (proxy.prefix, proxy.body) if g is not None]
    return [
        (graph, node)
        for graph in graphs
        for node in graph.graph.nodes
        if node.op == "call_function"
        and op_name(node) == "aten.batch_norm.default"
        and all(a.op == "get_attr" for a in node.args[1:5] if isinstance(a, torch.fx.Node))
    ]


def _set_argument(graph: GraphModule, node: torch.fx.Node, position: int, value: object) -> None:
    arguments = list(node.args)
    arguments[position] = value  # type: ignore[call-overload]
    node.args = tuple(arguments)


def _use_batch_statistics(proxy: Tapped, on: bool) -> None:
    """Switch batch norms between their batch's statistics (updating the running ones) and those."""
    for graph, node in _batch_norms(proxy):
        _set_argument(graph, node, TRAINING, on)
    for part in (proxy.prefix, proxy.body):
        if part is not None:
            part.recompile()
