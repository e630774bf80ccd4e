"""Let the frozen weights of a layer share few values, so that a bundle packs smaller."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from pbc.bundle.ladder import INT8
from pbc.errors import UsageError
from pbc.ir.calibration import Calibration
from pbc.ir.graph import get_tensor, tensor_names
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.rewrite import replace_tensor
from pbc.ir.work import work_file
from pbc.passes.align import MINUTES, STATISTICS_BATCHES
from pbc.proxies import compression, parallel
from pbc.proxies.align_losses import AlignmentLoss, feature_loss
from pbc.proxies.codebooks import MOST_BITS, bits_of, codebook, from_codebooks, with_codebooks
from pbc.proxies.compression import weight_names
from pbc.proxies.distillation import Distillation, adopt, unaugmented
from pbc.proxies.fidelity import Standard, UpToInterface, standards

# Of what alignment takes, as much again is added for all levels together.
SHARE = 0.25
LEARNING_RATE = 2e-4
JUDGED_BATCHES = 4


@dataclass(frozen=True)
class ClusterWeights:
    """Round the frozen weights of each layer to 2**bits values (Deep Compression, section 3).

    `cluster-weights:4`: one-dimensional k-means with linear initialisation, a codebook for each
    layer (Han et al., ICLR 2016). A bundle then stores values and Huffman-coded indices
    (pbc.bundle.packing) in place of float32 numbers; what a device computes with is float32 as
    ever, so that speed and memory stay. Weights are those that fold-batch-norm leaves; depthwise
    layers get 256 values each; biases, norms, small layers (pbc.proxies.compression), what trains,
    and int8 levels stay. Zeros that prune-weights made stay zero.

    With calibration data, each level's codebooks, biases and what else it has then learn to send
    what level 0 sent before, as `align` does it: a value's gradient is the sum of its members'. The
    result is kept where it brings images of the alignment set nearer. Tensors that a level has in
    common with level 0 stay in common.

    Graphs keep their form. Level 0 is the clustered network from here on: `checks.compression` has
    its fidelity to what it was.

    align_steps, align_time: as for `align`; a quarter of either is spent here, on top.
    """

    bits: int = 4
    align_steps: int | None = None
    align_time: float | None = None
    stage: ClassVar[str] = "quantize"
    after: ClassVar[tuple[str, ...]] = ("quantize",)
    default: ClassVar[bool] = False

    @staticmethod
    def options(argument: str) -> Mapping[str, Any]:
        """Return the fields that `4` asks for."""
        if not argument.isdigit() or not 1 <= int(argument) <= MOST_BITS:
            raise UsageError(
                f"cluster-weights:{argument} is no number of bits; expected 1 to {MOST_BITS}, "
                "for example cluster-weights:4"
            )
        return {"bits": int(argument)}

    def __call__(self, program: Program) -> Program:
        changed = compression.replaced(program, self._clustered)
        if program.calibration is not None:
            changed = self._trained(program, changed, program.calibration)
        return compression.judged(program, changed, "cluster-weights")

    def _clustered(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        clustered = {}
        for name, weight in weights.items():
            values, indices = codebook(weight, bits_of(weight, self.bits))
            clustered[name] = values[indices.long()]
        return clustered

    def _trained(self, before: Program, program: Program, calibration: Calibration) -> Program:
        """Train the codebooks of level 0, and of each level that has weights of its own."""
        first = before.levels[0]
        numbers = [0, *(n for n, level in enumerate(before.levels) if _has_own(level, first))]
        device = parallel.device()
        original = copy.deepcopy(UpToInterface(before, first)).to(device).eval()
        batches = unaugmented(calibration, STATISTICS_BATCHES)
        standard = standards(before, (original(batch.to(device)) for batch in batches))
        training = _Training(self, before, original, standard)
        levels = list(program.levels)
        for turn, number in enumerate(numbers, 1):
            label = f"level {turn} of {len(numbers)}, {2**self.bits} values a layer"
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
    """The training of codebooks, towards what level 0 sent before it was clustered."""

    options: ClusterWeights
    before: Program
    original: UpToInterface
    standard: list[Standard]

    def run(self, number: int, clustered: LevelGraphs, label: str, count: int) -> LevelGraphs:
        """Return the level with trained codebooks, or as it is where training does not help.

        count: how many levels share the time.
        """
        options, was = self.options, self.before.levels[number]
        level = replace(
            clustered,
            body=self._with_codebooks(was.body),
            prefix=None if was.prefix is None else self._with_codebooks(was.prefix),
        )
        learner = copy.deepcopy(UpToInterface(self.before, level)).to(parallel.device())
        loss = parallel.once(lambda: self._loss(learner))
        assert self.before.calibration is not None  # or there is no training
        Distillation(
            self.original,
            learner,
            AlignmentLoss(self.standard),
            self.before.calibration,
            self.before.request.seed * 1000 + number,
            steps=None
            if options.align_steps is None
            else max(1, round(options.align_steps * SHARE)),
            seconds=self._seconds(count),
            saved=self._saved_as(number),
            rate=LEARNING_RATE,
            task="cluster-weights",
            label=label,
        ).train()
        if parallel.once(lambda: self._loss(learner)) >= loss:
            return clustered
        adopt(level, learner.cpu())
        for graph, trained, old in zip(clustered.frozen, level.frozen, was.frozen, strict=True):
            for name, value in from_codebooks(trained, weight_names(old)).items():
                replace_tensor(graph, name, value.reshape(get_tensor(old, name).shape))
            for name in set(tensor_names(old)) - set(weight_names(old)):
                replace_tensor(graph, name, get_tensor(trained, name))
        return clustered

    def _with_codebooks(self, graph: GraphModule) -> GraphModule:
        bits = {
            name: bits_of(get_tensor(graph, name), self.options.bits)
            for name in weight_names(graph)
        }
        return with_codebooks(graph, bits)

    def _loss(self, level: UpToInterface) -> float:
        """On images of the alignment set, as they are."""
        total, data = 0.0, self.before.calibration
        assert data is not None
        with torch.no_grad():
            for batch in unaugmented(data, JUDGED_BATCHES):
                images = batch.to(parallel.device())
                total += float(feature_loss(level(images), self.original(images), self.standard))
        return total

    def _seconds(self, count: int) -> float | None:
        """The time for one of `count` levels; None when steps alone decide."""
        minutes = self.options.align_time
        if minutes is None and self.options.align_steps is None:
            minutes = MINUTES
        return None if minutes is None else minutes * 60 * SHARE / count

    def _saved_as(self, number: int) -> Path | None:
        """The file that keeps this level's training, named by all that decides it."""
        data = self.before.calibration
        assert data is not None
        decided_by = [asdict(self.options), self.before.request.seed, data.samples.digest()]
        graphs = [*self.before.levels[0].frozen, *self.before.levels[number].frozen]
        return work_file(self.before, f"cluster-{number}", decided_by, graphs, ".safetensors")
