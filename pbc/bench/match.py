"""The match: all rivals of a seed take turns, epoch by epoch, in one process."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pbc import plugins
from pbc.bench.cells import Cell, EntryProgress, Work
from pbc.bench.energy import EnergyMeter, NoMeter
from pbc.bench.evaluator import Evaluator
from pbc.bench.marks import FIRST_EPOCH, Marks
from pbc.bench.rival import GROUP, Rival, RivalSetting, way
from pbc.data import Samples
from pbc.errors import PbcError
from pbc.runtime.options import TrainOptions
from pbc.runtime.runtime import Runtime
from pbc.util.extras import missing

Tell = Callable[[str], None]


@dataclass(frozen=True)
class MatchPlan:
    """The rivals of a match, their seeds and epochs.

    options: what every rival trains with; batch and learning_rate are set. epochs_of: epochs of
    those rivals that run fewer. rate_of: learning rates of those that need their own.
    """

    rivals: tuple[str, ...]
    seeds: int
    options: TrainOptions
    epochs_of: Mapping[str, int] = field(default_factory=dict)
    rate_of: Mapping[str, float] = field(default_factory=dict)
    weights: Path | None = None
    torch_compile: bool = True

    def epochs(self, rival: str) -> int:
        """Return how many epochs a rival runs."""
        return min(self.epochs_of.get(rival, self.options.epochs), self.options.epochs)

    def setting(
        self, rival: str, seed: int, runtime: Runtime, samples: Samples, folder: Path
    ) -> RivalSetting:
        """Return what a rival is made from."""
        rate = self.rate_of.get(rival, self.options.learning_rate)
        options = replace(self.options, seed=seed, learning_rate=rate)
        return RivalSetting(runtime, samples, options, folder, self.weights, self.torch_compile)


@dataclass(frozen=True)
class Outcome:
    """Cells per rival and seed, facts per rival, and why some rivals did not run."""

    cells: Mapping[tuple[str, int], tuple[Cell, ...]]
    facts: Mapping[str, Mapping[str, Any]]
    left_out: Mapping[str, str]


class Entry:
    """A rival in the match of one seed, with its cells so far."""

    def __init__(
        self, name: str, seed: int, rival: Rival, progress: EntryProgress, marks: Marks
    ) -> None:
        self.name = name
        self.seed = seed
        self.cells = list(progress.cells)
        self._rival = rival
        self._marks = marks
        self._notes: list[str] = list((progress.facts or {}).get("notes", []))
        self._preparation_joules = 0.0

    def prepare(self, progress: EntryProgress, meter: EnergyMeter) -> None:
        """Get ready; what is done again after an interruption counts no energy."""
        before = meter.joules()
        self._rival.prepare(progress.state)
        if progress.state is None:
            self._preparation_joules = meter.joules() - before

    def run_epoch(self, evaluator: Evaluator, test: Samples, meter: EnergyMeter) -> Cell:
        """Run an epoch, then evaluate; the evaluation is outside of what is measured.

        Raises PbcError where the training has diverged: there is nothing to compare then.
        """
        marking_joules = 0.0

        def accuracy() -> float:
            theta = self._rival.parameters()
            return self._rival.evaluate(test) if theta is None else evaluator.accuracy(theta)

        def marked() -> float:
            nonlocal marking_joules
            before = meter.joules()
            found = accuracy()
            marking_joules += meter.joules() - before
            return found

        self._marks.begin(() if self.cells else FIRST_EPOCH, marked)
        before = meter.joules()
        times = self._rival.run_epoch()
        joules = meter.joules() - before - marking_joules + self._preparation_joules
        self._preparation_joules = 0.0
        if times.loss is not None and not math.isfinite(times.loss):
            raise PbcError(
                f"the loss of seed {self.seed}, epoch {len(self.cells) + 1} is {times.loss}; "
                f"--lr-of {self.name}=X gives it a lower learning rate"
            )
        cell = Cell(
            self.name,
            self.seed,
            len(self.cells) + 1,
            times.seconds,
            dict(times.stage_seconds),
            tuple(times.levels),
            times.loss,
            accuracy(),
            None if isinstance(meter, NoMeter) else joules,
            tuple(self._marks.found),
            times.last,
        )
        self.cells.append(cell)
        return cell

    @property
    def done(self) -> bool:
        """Return whether the rival wants no further epoch."""
        return done(self.cells)

    def progress(self, last: bool) -> EntryProgress:
        """Return what is to be kept; after the last epoch the state is not needed."""
        state = {} if last else self._rival.state()
        facts = self._rival.facts()
        # Those from before an interruption first; a rival that goes on need not tell them again.
        self._notes = list(dict.fromkeys([*self._notes, *facts.get("notes", [])]))
        return EntryProgress(tuple(self.cells), state, {**facts, "notes": self._notes})


def done(cells: Sequence[Cell]) -> bool:
    """Return whether a rival was done with the last of its cells."""
    return bool(cells) and cells[-1].last


def run_match(
    plan: MatchPlan,
    runtime: Runtime,
    train: Samples,
    test: Samples,
    work: Work,
    meter: EnergyMeter,
    tell: Tell,
    runtimes: Mapping[str, Runtime] = MappingProxyType({}),
) -> Outcome:
    """Run all seeds, or what is left of them after an interruption.

    A rival that cannot run (PbcError, a package that is missing) is reported and left out; the
    others go on. runtimes: of rivals that train by another strategy than the bundle's.
    """
    own = {name: runtimes.get(name, runtime) for name in plan.rivals}
    # One for rivals of one bundle: it keeps what that one's prefix sends.
    evaluators = {
        bundle: Evaluator(other, test, plan.options.threads)
        for bundle, other in {each.bundle.digest: each for each in own.values()}.items()
    }
    known = {
        (name, seed): work.load(name, seed) for name in plan.rivals for seed in range(plan.seeds)
    }
    work.relist([cell for progress in known.values() for cell in progress.cells])
    left_out: dict[str, str] = {}

    def leave_out(name: str, error: PbcError) -> None:
        left_out[name] = str(error)
        tell(f"{name} is left out: {error}")

    for seed in range(plan.seeds):
        entries = []
        for name in plan.rivals:
            progress = known[name, seed]
            ran = len(progress.cells)
            if name in left_out or ran >= plan.epochs(name) or done(progress.cells):
                continue
            setting = plan.setting(name, seed, own[name], train, work.scratch(name, seed))
            try:
                rival = made(name, setting)
                entry = Entry(name, seed, rival, progress, setting.marks)
                entry.prepare(progress, meter)
            except PbcError as error:
                leave_out(name, error)
                continue
            except ModuleNotFoundError as error:
                if error.name is None or error.name.partition(".")[0] == "pbc":
                    raise  # not a package that could be installed
                needs = missing(error) or f"{error.name}, which is not installed"
                leave_out(name, PbcError(f"it needs {needs}"))
                continue
            entries.append(entry)
        for epoch in range(plan.options.epochs):
            # After full training the processor's caches are cold: not always for the same rival.
            turn = epoch % max(len(entries), 1)
            for entry in entries[turn:] + entries[:turn]:
                wanted = plan.epochs(entry.name)
                if len(entry.cells) != epoch or epoch >= wanted or entry.done:
                    continue
                if entry.name in left_out:
                    continue
                try:
                    evaluator = evaluators[own[entry.name].bundle.digest]
                    cell = entry.run_epoch(evaluator, test, meter)
                except PbcError as error:
                    leave_out(entry.name, error)
                    continue
                progress = entry.progress(last=epoch + 1 == wanted or entry.done)
                work.save(progress)
                known[entry.name, seed] = progress
                tell(cell_line(cell, plan))
        del entries
        gc.collect()  # caches of gigabytes do not wait for the next seed
    finished = [name for name in plan.rivals if name not in left_out]
    return Outcome(
        {(name, seed): known[name, seed].cells for name in finished for seed in range(plan.seeds)},
        {name: known[name, 0].facts or {} for name in finished},
        left_out,
    )


def made(name: str, setting: RivalSetting) -> Rival:
    """Return a rival; raises PbcError where it cannot run."""
    rival: Rival = plugins.load(GROUP, way(name))(setting)
    return rival


def trial(
    name: str, plan: MatchPlan, runtime: Runtime, train: Samples, validation: Samples, folder: Path
) -> tuple[float, float]:
    """Return the accuracy, 0…1, of a rival on other photos than it learns, and its last loss there.

    Raises PbcError where it cannot run, or diverges.
    """
    rival = made(name, plan.setting(name, 0, runtime, train, folder))
    rival.prepare(None)
    for _ in range(plan.epochs(name)):
        times = rival.run_epoch()
        if times.loss is not None and not math.isfinite(times.loss):
            raise PbcError(f"the loss is {times.loss}")
        if times.last:
            break
    loss = math.inf if times.loss is None else times.loss
    theta = rival.parameters()
    if theta is None:
        return rival.evaluate(validation), loss
    return Evaluator(runtime, validation, plan.options.threads).accuracy(theta), loss


def cell_line(cell: Cell, plan: MatchPlan) -> str:
    """Return one line that says what an epoch of a rival gave."""
    total = sum(cell.levels)
    shares = " ".join(
        f"L{level} {visits / total:.0%}" for level, visits in enumerate(cell.levels) if visits
    )
    return (
        f"seed {cell.seed}  epoch {cell.epoch}/{plan.epochs(cell.rival)}  {cell.rival:<12} "
        f"{cell.seconds:8.3f} s  accuracy {cell.accuracy:6.2%}  {shares}"
    )
