"""Quantise the prefixes of int8 levels, and align them again as they will run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from pbc.bundle.ladder import INT8
from pbc.ir.calibration import Calibration
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.work import work_file
from pbc.proxies import parallel
from pbc.proxies.align_losses import AlignmentLoss, feature_loss
from pbc.proxies.as_run import up_to_interface
from pbc.proxies.distillation import (
    MINUTES,
    STATISTICS_BATCHES,
    Distillation,
    adopt,
    spread,
    unaugmented,
)
from pbc.proxies.fidelity import Standard, UpToInterface, standards
from pbc.proxies.quantization import (
    calibrated,
    correct_biases,
    folded,
    integers,
    quantized,
    scheme,
    simulated,
)
from pbc.proxies.sample_fidelity import measured

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

        %conv2d: [b, 16, 8, 8] = conv2d(%x, @conv1.weight_folded, @conv1.weight_folded_bias)
        %relu: [b, 16, 8, 8] = relu(%conv2d)

    After (the float32 weight has left the graph)::

        %quantize_…: [b, 3, 8, 8] = quantize_per_tensor(%x, 0.02, 114, 0, 255, torch.uint8)
        %dequantize_…: [b, 3, 8, 8] = dequantize_per_tensor(%quantize_…, 0.02, 114, 0, 255, …)
        %dequantize_…_1 = dequantize_per_channel(@conv1.weight_folded_int8, @…_scale, None, 0, …)
        %conv2d: [b, 16, 8, 8] = conv2d(%dequantize_…, %dequantize_…_1, @…_bias)
        %relu: [b, 16, 8, 8] = relu(%conv2d)
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
        program = program.copy()
        numbers = [
            number
            for number, level in enumerate(program.levels)
            if level.precision == INT8 and level.prefix is not None
        ]
        if not numbers:
            return program
        if program.calibration is None:
            return _with_ranges_of_the_example(program, numbers)
        return self._quantized(program, numbers, program.calibration)

    def _quantized(
        self, program: Program, numbers: Sequence[int], calibration: Calibration
    ) -> Program:
        device = parallel.device()
        # A copy of its own: moving a module moves the tensors it shares.
        original = copy.deepcopy(UpToInterface(program, program.levels[0])).to(device).eval()
        tensors = up_to_interface(program, program.levels[0], calibration)
        statistics = map(tensors, spread(calibration, STATISTICS_BATCHES))
        standard = [
            Standard(one.mean.to(device), one.std.to(device))
            for one in standards(program, statistics)
        ]
        levels = list(program.levels)
        for turn, number in enumerate(numbers, 1):
            levels[number] = _Quantization(program, calibration, original, standard, number).run(
                self._steps(),
                self._seconds(len(numbers)),
                self._saved_as(program, number, calibration),
                f"level {turn} of {len(numbers)} in int8",
            )
        program = replace(program, levels=tuple(levels))
        return measured(program, [levels[number] for number in numbers], calibration)

    def _steps(self) -> int | None:
        return None if self.align_steps is None else max(1, round(self.align_steps * SHARE))

    def _seconds(self, count: int) -> float | None:
        """The time for one of `count` levels; None when steps alone decide."""
        minutes = self.align_time
        if minutes is None and self.align_steps is None:
            minutes = MINUTES
        return None if minutes is None else minutes * 60 * SHARE / count

    def _saved_as(self, program: Program, number: int, calibration: Calibration) -> Path | None:
        """The file that keeps this level's training, named by all that decides it."""
        decided_by = [asdict(self), program.request.seed, calibration.samples.digest()]
        graphs = [*program.levels[0].frozen, *program.levels[number].frozen]
        return work_file(program, f"quantize-{number}", decided_by, graphs, ".safetensors")


def _with_ranges_of_the_example(program: Program, numbers: Sequence[int]) -> Program:
    levels = tuple(
        replace(level, prefix=quantized(level.prefix, program.network.example))
        if number in numbers and level.prefix is not None
        else level
        for number, level in enumerate(program.levels)
    )
    named = ", ".join(map(str, numbers))
    note = f"no --calibration: int8 levels ({named}) have the ranges of random images"
    return replace(program, levels=levels, notes=(*program.notes, note))


class _Quantization:
    """The rounding of one level's prefix."""

    def __init__(
        self,
        program: Program,
        calibration: Calibration,
        original: UpToInterface,
        standard: list[Standard],
        number: int,
    ) -> None:
        self._program = program
        self._calibration = calibration
        self._original = original
        self._standard = standard
        self._level, self._number = program.levels[number], number
        self._device = parallel.device()
        prefix = self._level.prefix
        assert prefix is not None  # int8 is a prefix's precision
        # Moved in a copy, as the original is.
        self._float = copy.deepcopy(folded(prefix)).to(self._device)

    def _batches(self, count: int) -> Iterator[Tensor]:
        for images in unaugmented(self._calibration, count):
            yield images.to(self._device)

    def run(
        self, steps: int | None, seconds: float | None, saved: Path | None, label: str
    ) -> LevelGraphs:
        """Return the level with the prefix that comes nearest to the original."""
        chosen = scheme(self._float)
        batches = partial(self._batches, RANGE_BATCHES)
        # Processes of one compilation must come to the same graphs.
        ranges = parallel.once(lambda: calibrated(self._float, chosen, batches))
        rounded = self._up_to_interface(simulated(self._float, chosen, ranges))
        corrected = copy.deepcopy(rounded)
        assert corrected.prefix is not None
        images = next(self._batches(1))
        correct_biases(corrected.prefix, self._float, images)
        judged = {level: self._judged(level) for level in (rounded, corrected)}
        start = min(judged, key=lambda level: judged[level])
        trained = copy.deepcopy(start)
        Distillation(
            self._original,
            trained,
            AlignmentLoss(self._standard),
            self._calibration,
            self._program.request.seed * 1000 + self._number,
            steps=steps,
            seconds=seconds,
            saved=saved,
            rate=lambda _: LEARNING_RATE,
            task="quantize",
            label=label,
            autocast=False,  # rounding is simulated in float32
        ).train()
        return self._in_integers(trained if self._judged(trained) < judged[start] else start)

    def _in_integers(self, simulation: UpToInterface) -> LevelGraphs:
        """The level with the weights of a simulation, rounded."""
        simulation = copy.deepcopy(simulation).cpu()
        assert simulation.prefix is not None
        level = replace(self._level.copy(), prefix=simulation.prefix)
        adopt(level, simulation)
        return replace(level, prefix=integers(simulation.prefix))

    def _up_to_interface(self, simulation: GraphModule) -> UpToInterface:
        """The level with this prefix, in tensors of its own."""
        level = replace(self._level, prefix=simulation)
        return copy.deepcopy(UpToInterface(self._program, level)).to(self._device)

    def _judged(self, level: UpToInterface) -> float:
        return parallel.once(lambda: self._loss(level))

    def _loss(self, simulation: UpToInterface) -> float:
        """On images of the alignment set, as they are, and as the engine computes it."""
        program, data = self._program, self._calibration
        runs = [
            up_to_interface(program, level, data)
            for level in (self._in_integers(simulation), program.levels[0])
        ]
        total = 0.0
        with torch.no_grad():
            for indices in spread(data, JUDGED_BATCHES):
                sent, target = ([t.to(self._device) for t in run(indices)] for run in runs)
                total += float(feature_loss(sent, target, self._standard))
        return total
