"""Align the proxies to the original at the interface, on calibration data."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from pbc.bundle.ladder import INT8
from pbc.ir.calibration import Calibration
from pbc.ir.dim_rules import dims_of
from pbc.ir.dims import Dims
from pbc.ir.graph import get_tensor, tensor_names
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
from pbc.proxies.halving import FIRST, LAST, WHOLE, Round, halves, worth_the_rest
from pbc.proxies.recalibration import batch_norms, recalibrate
from pbc.proxies.sample_fidelity import measured
from pbc.proxies.use import USED

# Of weights with this root mean square, and of whatever has one axis; of others in proportion.
LEARNING_RATE, TYPICAL_WEIGHT = 5e-4, 0.1
LEAST_WEIGHT = 1e-3  # zeros learn too
# Who lost channels has further to go; without batch norms that is not stable.
LEARNING_RATE_AFTER_PRUNING = 1e-3
# Of the ladder's time: the first proxy pays for all, since each further one starts from it.
FIRST_LEVEL_SHARE = 0.5


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

    Levels planned by use are aligned in two rounds (successive halving: Jamieson and Talwalkar,
    AISTATS 2016): after a quarter those that no run would use go, with a note, and the others get
    the rest. An alignment of less than 100 steps or 2 minutes is not parted.

    A level that differs from the original in precision alone keeps the original's weights, and is
    only measured. Does nothing without calibration data: levels stay unaligned and unrouted.

    align_loss: other terms of the loss, or more (pbc.proxies.align_losses): `logits` distils the
        scores of the classifier that came with the weights, `map` the last feature map, `nst` the
        pattern of it; `features+map` is a sum.
    align_steps: steps per level; None lets `align_time` decide alone.
    align_time: minutes for the whole ladder, of which the first level that is trained gets half;
        None lets `align_steps` decide alone. With neither, ten minutes.
    ladder: "even" gives no level up.
    """

    align_steps: int | None = None
    align_time: float | None = None
    align_loss: str = FEATURES
    ladder: str = USED
    stage: ClassVar[str] = "align"

    def __post_init__(self) -> None:
        """Refuse a term that there is not."""
        terms_of(self.align_loss)

    def __call__(self, program: Program) -> Program:
        calibration = program.calibration
        program = program.copy()
        if calibration is None or len(program.levels) < 2:
            return program
        if _trained(program):
            program = self._aligned(program, calibration)
        # Rounding to integers is still to come, and is measured then.
        proxies = [level for level in program.levels[1:] if level.precision != INT8]
        return measured(program, proxies, calibration)

    def _aligned(self, program: Program, calibration: Calibration) -> Program:
        """Distil levels in place, and return the program with those that were worth it."""
        teacher = _Teacher.of(program, calibration, self.align_loss)
        if not halves(self.ladder, self.align_steps, self._minutes()):
            self._round(program, teacher, WHOLE)
            return program
        self._round(program, teacher, FIRST)
        program = worth_the_rest(program, _trained(program))
        self._round(program, teacher, LAST)
        return program

    def _round(self, program: Program, teacher: _Teacher, turn: Round) -> None:
        """Distil levels, each from the one above; their graphs take the result over.

        After an earlier round the first one goes on from where it was.
        """
        numbers = _trained(program)
        for number in numbers:
            level, first = program.levels[number], number == numbers[0]
            fresh = turn.begins or not first
            if number > 1 and fresh:
                start_from_above(level, program.levels[number - 1], dims_of(program))
            # A copy of its own: tensors that no plan shrank are level 0's too.
            proxy = copy.deepcopy(teacher.looked_at(level))
            pruned = bool(level.keep) and bool(batch_norms(proxy))
            afresh = partial(recalibrate, proxy, teacher.calibration)
            Distillation(
                teacher.original,
                proxy.to(parallel.device()),
                teacher.loss,
                teacher.calibration,
                program.request.seed * 1000 + turn.seed + number,
                steps=turn.steps(self.align_steps),
                seconds=self._seconds(turn, first, len(numbers)),
                saved=self._saved_as(program, number, turn, teacher.calibration),
                rate=partial(
                    relative_rate, LEARNING_RATE_AFTER_PRUNING if pruned else LEARNING_RATE
                ),
                task="align",
                label=f"level {number} of {len(program.levels) - 1}{turn.words}",
                begin=afresh if pruned and fresh else None,
            ).train()
            adopt(level, proxy.cpu())

    def _minutes(self) -> float | None:
        """The time for the whole ladder; None when steps alone decide."""
        if self.align_time is None and self.align_steps is None:
            return MINUTES
        return self.align_time

    def _seconds(self, turn: Round, first: bool, count: int) -> float | None:
        """The time for one of `count` levels in a round; None when steps alone decide."""
        minutes, share = self._minutes(), 1.0
        if minutes is None:
            return None
        if count > 1:
            share = FIRST_LEVEL_SHARE if first else (1 - FIRST_LEVEL_SHARE) / (count - 1)
        return minutes * 60 * turn.share * share

    def _saved_as(
        self, program: Program, number: int, turn: Round, calibration: Calibration
    ) -> Path | None:
        """The file that keeps this level's training, named by all that decides it."""
        levels = program.levels[: number + 1]
        decided_by = [
            asdict(self),
            asdict(turn),
            program.request.seed,
            [level.keep for level in levels],
            [level.resolution for level in levels],
            [level.merges for level in levels],
            calibration.samples.digest(),
        ]
        name = f"align-{number}"
        return work_file(program, name, decided_by, program.levels[0].frozen, ".safetensors")


@dataclass(frozen=True)
class _Teacher:
    """What levels learn from: level 0, up to what the loss looks at, and its statistics."""

    program: Program
    calibration: Calibration
    original: UpToInterface
    loss: AlignmentLoss

    @staticmethod
    def of(program: Program, calibration: Calibration, terms: str) -> _Teacher:
        device = parallel.device()
        # A copy of its own: moving a module moves the tensors it shares.
        plain = copy.deepcopy(UpToInterface(program, program.levels[0])).to(device).eval()
        images = unaugmented(calibration, STATISTICS_BATCHES)
        standard = standards(program, (plain(batch.to(device)) for batch in images))
        loss = AlignmentLoss.of(program, standard, terms_of(terms))
        original = copy.deepcopy(_looked_at(program, program.levels[0], loss)).to(device).eval()
        return _Teacher(program, calibration, original, loss)

    def looked_at(self, level: LevelGraphs) -> UpToInterface:
        return _looked_at(self.program, level, self.loss)


def _looked_at(program: Program, level: LevelGraphs, loss: AlignmentLoss) -> UpToInterface:
    inside = None if loss.feature_map is None else loss.feature_map.node
    return UpToInterface(program, level, inside=inside, logits=LOGITS in loss.terms)


def _trained(program: Program) -> list[int]:
    """The levels that give up more than precision."""
    return [
        number
        for number, level in enumerate(program.levels)
        if level.keep or level.resolution is not None or level.merges
    ]


def relative_rate(rate: float, tensor: Tensor) -> float:
    """The learning rate of a tensor, in proportion to its values.

    AdamW's steps are as long whatever the weights are: ResNet-50's are a fifth of MobileNetV3's,
    and steps that suit these ruin those (docs/alignment.md). Relative step sizes are those of
    Adafactor (Shazeer and Stern, ICML 2018, section 8).
    """
    if tensor.dim() < 2:
        return rate
    size = float(tensor.detach().square().mean().sqrt())
    return rate * max(size, LEAST_WEIGHT) / TYPICAL_WEIGHT


def start_from_above(level: LevelGraphs, above: LevelGraphs, dims: Dims) -> None:
    """Replace a proxy's tensors by the slices of the level above, which is aligned already."""
    for graph, aligned in zip(level.frozen, above.frozen, strict=True):
        for name in tensor_names(graph):
            kept = dims.slice(name, get_tensor(aligned, name), level.keep, above.keep)
            replace_tensor(graph, name, kept)
