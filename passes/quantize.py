"""Quantise the prefixes of int8 levels, and align them again as they will run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from pbc.bundle.ladder import ALIGNED, INT8
from pbc.ir.calibration import Calibration
from pbc.ir.program import Program, body, prefix
from pbc.ir.work import work_file
from pbc.passes.align import MINUTES, STATISTICS_BATCHES
from pbc.proxies import parallel
from pbc.proxies.distillation import Distillation, adopt, alignment_loss, unaugmented
from pbc.proxies.fidelity import Standard, Tapped, sample_fidelity, standards
from pbc.proxies.quantization import (
    calibrated,
    correct_biases,
    folded,
    integers,
    quantized,
    scheme,
    simulated,
)

# Of what alignment takes, as much again is added for the int8 levels together.
SHARE = 0.25
LEARNING_RATE = 2e-5
# Batches of the alignment images that ranges are measured on, and that a choice is judged by.
RANGE_BATCHES = 4
JUDGED_BATCHES = 4


@dataclass(frozen=True)
class Quantize:
    """Round the prefix of every int8 level to eight bits and distil it through the rounding.

    Before, folded::

        %batch_norm: [b, 16, 8, 8] = conv2d(%x, @conv1.weight_folded, @conv1.weight_folded_bias)
        %relu: [b, 16, 8, 8] = relu(%batch_norm)

    After (the float32 weight has left the graph)::

        %quantize_…: [b, 3, 8, 8] = quantize_per_tensor(%x, 0.02, 114, 0, 255, torch.uint8)
        %dequantize_…: [b, 3, 8, 8] = dequantize_per_tensor(%quantize_…, 0.02, 114, 0, 255, …)
        %dequantize_…_1 = dequantize_per_channel(@conv1.weight_folded_int8, @…_scale, None, 0, …)
        %batch_norm: [b, 16, 8, 8] = conv2d(%dequantize_…, %dequantize_…_1, @…_bias)
        %relu: [b, 16, 8, 8] = relu(%batch_norm)
        … and the same pair for %relu

    Ranges, biases, then weights (pbc.proxies.quantization): each tensor's range is the one with
    the least error relative to each image; biases take the usual error out; distillation, as
    `align` does it, learns with straight-through gradients. Biases and distilled weights are kept
    only where they bring images of the alignment set nearer to the original. Bodies stay float32:
    gradients pass through them. Fidelities are measured on the rounded graphs.

    Without calibration data the levels stay unaligned, with the ranges of the example input, and a
    note says so. Does nothing without int8 levels.

    align_steps, align_time: as for `align`; a quarter of either is spent on int8 levels, on top.
    """

    align_steps: int | None = None
    align_time: float | None = None
    stage: ClassVar[str] = "quantize"

    def __call__(self, program: Program) -> Program:
        levels = [
            level
            for level in program.levels
            if program.ladder.precision(level) == INT8 and prefix(level) in program.graphs
        ]
        program = program.copy()
        if not levels:
            return program
        if program.calibration is None:
            for level in levels:
                graph = program.graphs[prefix(level)]
                program.graphs[prefix(level)] = quantized(graph, program.example)
            named = ", ".join(map(str, levels))
            note = f"no --calibration: int8 levels ({named}) have the ranges of random images"
            return replace(program, notes=(*program.notes, note))
        device = parallel.device()
        # A copy of its own: moving a module moves the tensors it shares.
        original = copy.deepcopy(Tapped(program, 0)).to(device).eval()
        batches = unaugmented(program.calibration, STATISTICS_BATCHES)
        standard = standards(original, (batch.to(device) for batch in batches))
        for number, level in enumerate(levels, 1):
            _Quantization(program, original, standard, level).run(
                self._steps(),
                self._seconds(len(levels)),
                self._saved_as(program, level),
                f"level {number} of {len(levels)} in int8",
            )
        values = sample_fidelity(program, levels, program.calibration, program.calibration.held_out)
        rows = list(program.ladder.levels)
        for level, fidelity in zip(levels, values.mean(0), strict=True):
            rows[level] = replace(rows[level], fidelity=float(fidelity), status=ALIGNED)
        return replace(program, ladder=replace(program.ladder, levels=tuple(rows)))

    def _steps(self) -> int | None:
        return None if self.align_steps is None else max(1, round(self.align_steps * SHARE))

    def _seconds(self, count: int) -> float | None:
        """The time for one of `count` levels; None when steps alone decide."""
        minutes = self.align_time
        if minutes is None and self.align_steps is None:
            minutes = MINUTES
        return None if minutes is None else minutes * 60 * SHARE / count

    def _saved_as(self, program: Program, level: int) -> Path | None:
        """Where this level's training is kept between interruptions, by all that decides it."""
        assert program.calibration is not None
        decided_by = [asdict(self), program.seed, program.calibration.samples.digest()]
        graphs = [kind(at) for kind in (prefix, body) for at in (0, level)]
        return work_file(program, f"quantize-{level}", decided_by, graphs, ".safetensors")


class _Quantization:
    """One level's: it changes the program's graphs, which are this pass's own."""

    def __init__(
        self, program: Program, original: Tapped, standard: list[Standard], level: int
    ) -> None:
        assert program.calibration is not None
        self._program = program
        self._calibration: Calibration = program.calibration
        self._original = original
        self._standard = standard
        self._level = level
        self._device = parallel.device()
        # Moved in a copy, as the original is.
        self._float = copy.deepcopy(folded(program.graphs[prefix(level)])).to(self._device)

    def _batches(self, count: int) -> Iterator[Tensor]:
        for images in unaugmented(self._calibration, count):
            yield images.to(self._device)

    def run(self, steps: int | None, seconds: float | None, saved: Path | None, label: str) -> None:
        chosen = scheme(self._float)
        batches = partial(self._batches, RANGE_BATCHES)
        # Processes of one compilation must come to the same graphs.
        ranges = parallel.once(lambda: calibrated(self._float, chosen, batches))
        rounded = self._tapped(simulated(self._float, chosen, ranges))
        corrected = copy.deepcopy(rounded)
        assert corrected.prefix is not None
        images = next(self._batches(1))
        correct_biases(corrected.prefix, self._float, images)
        start = min((rounded, corrected), key=self._judged)
        trained = copy.deepcopy(start)
        Distillation(
            self._original,
            trained,
            self._standard,
            self._calibration,
            self._program.seed * 1000 + self._level,
            steps=steps,
            seconds=seconds,
            saved=saved,
            rate=LEARNING_RATE,
            task="quantize",
            label=label,
            autocast=False,  # rounding is simulated in float32
        ).train()
        best = min((start, trained), key=self._judged).cpu()
        assert best.prefix is not None
        graphs = self._program.graphs
        graphs[prefix(self._level)] = best.prefix
        adopt(self._program, self._level, best)
        graphs[prefix(self._level)] = integers(best.prefix)

    def _tapped(self, simulation: GraphModule) -> Tapped:
        """The level with this prefix, in tensors of its own."""
        graphs = {**self._program.graphs, prefix(self._level): simulation}
        return copy.deepcopy(Tapped(replace(self._program, graphs=graphs), self._level)).to(
            self._device
        )

    def _judged(self, tapped: Tapped) -> float:
        return parallel.once(lambda: self._loss(tapped))

    def _loss(self, tapped: Tapped) -> float:
        """On images of the alignment set, as they are."""
        total = 0.0
        with torch.no_grad():
            for images in self._batches(JUDGED_BATCHES):
                total += float(
                    alignment_loss(tapped(images), self._original(images), self._standard)
                )
        return total
