"""A training run, driven by epochs or by rounds; it can go on from a checkpoint at any time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from typing import Any

import numpy as np

from pbc import plugins
from pbc.bundle import Bundle
from pbc.bundle.ladder import CLOSED, SGD
from pbc.data import Samples
from pbc.errors import PbcError, UsageError
from pbc.runtime.allocator import keep_freed_memory
from pbc.runtime.closed_head import ClosedHead, start_epochs, stratified, told
from pbc.runtime.costs import Costs
from pbc.runtime.engines import Engine, Executable, guarded
from pbc.runtime.engines.bounds import check_mini_batch
from pbc.runtime.evaluation import Evaluation
from pbc.runtime.events import EpochReport, Note, Plan, Progress, Report, SoFar, StepReport
from pbc.runtime.growing_model import GrowingModel
from pbc.runtime.loop import DivergedError, Learner, Steps, Totals, finite_parameters, train
from pbc.runtime.meter import Meter
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.checkpoint import Checkpoint
from pbc.runtime.output.folder import Output
from pbc.runtime.output.metrics import Metrics
from pbc.runtime.output.validation import Validation
from pbc.runtime.parameters import (
    body_inputs,
    checked_theta,
    initial_parameters,
    labelled_as,
    labelled_for,
    other_classes,
)
from pbc.runtime.results import Results
from pbc.runtime.resumption import Resumption, finite
from pbc.runtime.routing.context import RunContext
from pbc.runtime.routing.decisions import Decisions
from pbc.runtime.routing.preparation import Preparation
from pbc.runtime.routing.prepared import Prepared
from pbc.runtime.run_state import RunState
from pbc.runtime.schedulers import Batch
from pbc.runtime.selection import PROBES, Probe, Selection
from pbc.util.interrupt import Interrupt

# An fsync on an SD card takes as long as an epoch on cached features: epochs that are over sooner
# share a checkpoint.
_SHORT_EPOCH_SECONDS = 1.0


class Trainer:
    """One run: `prepare`, then `run_epoch` while `not finished`, then `finish`.

    Federated learning drives it by rounds: `set_parameters`, `run_round`, `parameters`, and so on.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        samples: Samples,
        options: TrainOptions,
        output: Output,
        report: Report,
        *,
        val: Samples | None = None,
        classes: Sequence[str] | None = None,
        executable: Executable | None = None,
    ) -> None:
        """Take a run's parts; see `Runtime.trainer` for the optional ones."""
        self.options = options = options.for_bundle(bundle)
        self.batch = options.samples_per_batch
        self.objective = options.objective
        self._bundle = bundle
        self._engine = engine
        self._samples = labelled_for(bundle, samples, classes)
        self._val = labelled_as(self._samples.classes, val) if val is not None else None
        self._output = output
        self._report = report
        keep_freed_memory()
        self._executable = executable or guarded.load(engine, bundle, threads=options.threads)
        self._meter = Meter()
        self._state = RunState.at_start(len(bundle.ladder))
        self._interrupt = Interrupt()
        self._replaces = False
        self._saved_at = monotonic()
        self._epochs = options.epochs
        # Set by check(); the closed form is None where SGD alone makes the head.
        self._initial: dict[str, np.ndarray] = {}
        self._closed: ClosedHead | None = None
        self._growing: GrowingModel
        self._selection: Selection | None = None
        self._metrics: Metrics
        self._run: Prepared
        self._learner: Learner
        self._resumption: Resumption
        self._results: Results
        bundle.ladder.require(options.fixed_level or 0)

    @property
    def epoch(self) -> int:
        """Return the number of whole epochs that are done."""
        return self._state.epoch

    @property
    def step(self) -> int:
        """Return the number of iterations that are done of the epoch under way."""
        return self._state.step

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class names by label."""
        return tuple(self._samples.classes)

    @property
    def finished(self) -> bool:
        """Return whether all epochs are done, or the time budget is, or enough was learnt."""
        return self._state.late or self._state.stopped or self.epoch >= self._epochs

    @property
    def cache_bytes(self) -> int:
        """Return the size of the feature cache, 0 without one; known once prepared."""
        cache = self._run.features.cache
        return 0 if cache is None else cache.size_bytes

    @property
    def all_cached(self) -> bool:
        """Return whether the cache has a row for every view of every sample; once prepared."""
        cache = self._run.features.cache
        return cache is not None and cache.complete

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Return what the next epoch's report will count already, by stage."""
        return dict(self._meter.seconds)

    @contextmanager
    def unmeasured(self) -> Iterator[None]:
        """Do what is not the run's own, between two steps: its time belongs to no stage."""
        self._meter.lap("bookkeeping")
        try:
            yield
        finally:
            self._meter.restart()

    def parameters(self) -> dict[str, np.ndarray]:
        """Return a copy of the trainable parameters as they are now, in f32."""
        return self._executable.parameters()

    def set_parameters(self, theta: Mapping[str, np.ndarray], *, keep_optimizer: bool) -> None:
        """Go on from other trainable parameters, once prepared; an epoch under way begins again.

        theta: every parameter by name; raises PbcError for other names or shapes, and for values
        that are not finite. keep_optimizer: whether momentum and the like stay, or are zero again.
        """
        self._refuse_rounds()
        checked = checked_theta(self._bundle, theta, len(self._samples.classes))
        state = self._executable.optimizer_state()
        self._executable.start(checked, self.objective)
        if keep_optimizer:
            self._executable.load_optimizer_state(state)
        self._state.begin_epoch_again()

    def check(self, *, resume: bool = False) -> None:
        """Refuse options that these samples cannot be trained with, before anything is written.

        `prepare` does it too; whoever removes an earlier run first wants to know before that.
        """
        options, bundle, classes = self.options, self._bundle, len(self._samples.classes)
        check_mini_batch(bundle.manifest, min(self.batch, len(self._samples)))
        plugins.load("pbc.schedulers", options.scheduler)
        if options.costs is not None and not resume:
            Costs.load(options.costs, len(bundle.ladder))
        self._executable.foresee(body_inputs(bundle, classes))
        self._initial = initial_parameters(bundle, classes, options.seed)
        self._closed = ClosedHead.find(
            bundle, self._executable, self._initial, options, len(self._samples)
        )
        visiting = options if self._closed is None else self._closed.options(options)
        self._growing = GrowingModel.of(self._val, visiting, len(self._samples))
        self._require_held_out()
        if options.selector is not None:
            plugins.load("pbc.selectors", options.selector)
            if self._closed is not None and self._closed.complete:
                raise UsageError(
                    "a head in closed form has no steps to select for: give --head sgd"
                )

    def prepare(
        self,
        *,
        resume: bool = False,
        replaces: bool = False,
        interrupt: Interrupt | None = None,
    ) -> None:
        """Set up parameters, routing and cache; take up the checkpoint's state on `resume`.

        replaces: whether another run is in the folder, which stays until there is something learnt.
        Once `interrupt` is requested, the next step ends with a checkpoint and KeyboardInterrupt.
        """
        options = self.options
        self._interrupt = interrupt or self._interrupt
        self._replaces = replaces
        self._metrics = Metrics(self._output.metrics)
        self._meter.restart()
        self._resumption = Resumption(self._output.checkpoint, self._identity(), options.epochs)
        if not self._initial:
            self.check(resume=resume)
        parameters, self._initial = self._initial, {}
        checkpoint = self._resumable() if resume else None
        for line in filter(None, [other_classes(self._bundle, self._samples.classes)]):
            self._report(Note(line))
        if self._val is not None:
            self._report(Note(_split_line(self._samples, self._val)))
        if checkpoint is not None:
            with self._resumption.reading():
                theta = checkpoint.part("theta")
                parameters = checked_theta(self._bundle, theta, len(self._samples.classes))
        self._executable.start(parameters, self.objective)
        preparation = Preparation(self._context())
        context = replace(self._context(), options=options)
        self._results = Results(context, self._val, options.fixed_level or 0)
        known = None
        if checkpoint is not None:
            with self._resumption.reading():
                known = Decisions.load(checkpoint, len(self._bundle.ladder), len(self._samples))
                self._state = RunState.from_facts(checkpoint.facts, len(self._bundle.ladder))
                if known.costs is None and preparation.context.scheduler_class.cost_aware:
                    raise ValueError("it has no costs")
                best = checkpoint.part("best")
                if best:
                    best = checked_theta(self._bundle, best, len(self._samples.classes))
                self._growing.load(checkpoint.facts, best)
        self._run = preparation(known)
        # Measuring trained on the first samples: begin again.
        self._executable.start(parameters, self.objective)
        self._epochs = self._run.scheduler.epochs
        if checkpoint is not None:
            self._meter.seconds = dict(self._state.totals.seconds)
            with self._resumption.reading():
                self._executable.load_optimizer_state(finite(checkpoint.part("optimizer")))
        if not replaces:
            self._metrics.rewind(self.epoch)
        # No total of epochs bounds rounds: who is driven by them goes on with what is cached.
        if not self.finished or self._state.rounds:
            self._run = preparation.fill(self._run)
            self._epochs = self._run.scheduler.epochs
        self._learner = Steps(self._executable, self._run.scheduler)
        if self._closed is not None:
            self._begin_closed(self._closed, checkpoint)
        if options.selector is not None:
            self._selection = self._selecting(options.selector, checkpoint)
        if checkpoint is not None:
            with self._resumption.reading():
                self._run.scheduler.load_state(checkpoint.part("scheduler"))
        elif not replaces:
            self.save_checkpoint()
        self._report(Plan(self._epochs))
        self._meter.lap("bookkeeping")

    def run_epoch(self) -> EpochReport:
        """Run to the end of the epoch under way, from its beginning or where it was left."""
        report, iterating_seconds = self._iterate()
        self._judge_epoch()
        self._state.late = self._is_late(iterating_seconds)
        return self._end_epoch(report, last=self.finished)

    def run_round(self, epochs: int) -> tuple[EpochReport, ...]:
        """Run N epochs, which no total or time budget bounds, and save a checkpoint.

        Views that the options' epochs do not show are not cached: with `augment`, `options.epochs`
        should be as many as the views.
        """
        self._refuse_rounds()
        if epochs < 1:
            raise UsageError(f"a round of {epochs} epochs; it must have at least 1")
        self._state.rounds += 1
        reports = []
        for left in reversed(range(epochs)):
            report, _ = self._iterate()
            reports.append(self._end_epoch(report, last=left == 0))
        return tuple(reports)

    def finish(self) -> Validation | None:
        """Write the personal model, evaluated at its level on the validation samples if any.

        Where `deploy_level` is auto, the level is chosen here; what that takes is no epoch's time.
        """
        if self.options.patience is not None and self._growing.best:
            self._executable.start(self._growing.best, self.objective)
        validation, final = self._results.finish(self._run, self.epoch, self._state.head)
        self._metrics.rewind(self.epoch)
        self._metrics.append(final)
        return validation

    def evaluate(self, samples: Samples) -> Evaluation:
        """Evaluate the parameters as they are now; its time is not a part of training's."""
        return self._results.evaluate(samples)

    def save_checkpoint(self) -> None:
        """Write all that `prepare(resume=True)` needs; refuses parameters that are not finite."""
        parts = {
            "theta": self._finite_parameters(),
            "optimizer": self._executable.optimizer_state(),
            "scheduler": self._run.scheduler.state(),
            "decisions": self._run.decisions.arrays(),
            "closed": self._sums(),
            "best": self._growing.best,
        }
        self._state.totals.seconds = dict(self._meter.seconds)
        facts = {
            **self._run.decisions.facts(),
            **self._state.facts(),
            **self._growing.facts(),
            "selection": None if self._selection is None else self._selection.state(),
        }
        self._take_over()
        self._resumption.save(facts, parts)
        self._saved_at = monotonic()
        self._meter.lap("bookkeeping")

    def _take_over(self) -> None:
        """Remove the run that this one replaces, now that there is something to put there."""
        if self._replaces:
            self._output.clear()
            self._output.adopt(self._bundle)
            self._metrics.rewind(0)
            self._replaces = False

    # ---- an epoch --------------------------------------------------------------------------

    def _iterate(self) -> tuple[EpochReport, float]:
        """Run the rest of the epoch; return its report, and its seconds without preparation."""
        meter, state, totals = self._meter, self._state, self._state.totals
        meter.restart()
        begun_seconds = meter.total_seconds() - totals.iterating_seconds
        batches = self._run.scheduler.plan(state.epoch)
        if self._closed is not None and self._closed.complete:
            batches = stratified(batches, self._samples.labels)
        planned = sum(len(batch.samples) for batch in batches)
        if self._selection is not None and state.step == 0:
            self._select(self._selection, batches)
        losses = train(
            self._learner,
            self._run,
            self._samples.labels,
            batches,
            meter,
            totals,
            epoch=state.epoch,
            first=state.step,
        )
        try:
            for loss in losses:
                state.step += 1
                totals.iterating_seconds = meter.total_seconds() - begun_seconds
                self._after_step(loss, len(batches), planned)
                if state.stopped:
                    break
        except DivergedError as error:
            raise self._diverged(error, self.step + 1) from error
        if self._closed is not None and self._closed.complete:
            self._settle(self._closed)
        self._finite_parameters()
        report = totals.report(self.epoch + 1, meter.seconds, planned, len(self._samples))
        if self._selection is not None:
            report = replace(report, selected=self._selection.names)
        state.end_epoch(report.seconds)
        iterating_seconds = meter.total_seconds() - begun_seconds
        meter.reset()
        return report, iterating_seconds

    def _selecting(self, name: str, checkpoint: Checkpoint | None) -> Selection:
        """Return what selects tensors in this run, at the checkpoint's choice."""
        selector = plugins.load("pbc.selectors", name)()
        head = list(self._bundle.manifest["head"])
        found = Selection(self._executable, selector, self.objective, head, self.options.rho)
        if checkpoint is not None:
            with self._resumption.reading():
                found.load_state(checkpoint.facts["selection"])
        return found

    def _select(self, selection: Selection, batches: Sequence[Batch]) -> None:
        """Choose what trains from this epoch on, if it is time, and keep the choice."""
        if self.epoch % self.options.select_every or selection.epoch == self.epoch:
            return
        probed = batches[:PROBES]
        with self._meter.only("measure"):
            features = self._run.fetch(probed, 0, self.epoch)
            selection.choose(
                self.epoch,
                [
                    Probe(batch.level, values, self._samples.labels[batch.samples])
                    for batch, values in zip(probed, features, strict=True)
                ],
            )
        self.save_checkpoint()
        names, share = selection.names or (), selection.share or 1.0
        self._report(
            Note(
                f"from epoch {self.epoch + 1} on, {len(names)} of {len(self.parameters())} tensors "
                f"train: a training iteration takes {share:.0%} of a full one's time"
            )
        )

    def _leave(self, closed: ClosedHead) -> None:
        """Leave the model that there is so far, if its head is new and the best on held-out photos.

        Whoever stops here has one that works. Measuring it counts in no stage.
        """
        if closed.head is None or closed.head is self._growing.shown:
            return
        visited = self._state.totals.samples
        summed, total = self.epoch * len(self._samples) + visited, self._growing.total
        with self.unmeasured():
            judged = self._growing.of_head(closed.head, summed, self._executable, self.batch)
        self._stop(self._growing.reason_to_stop())
        if judged is None:
            return
        what = "photos" if self.options.views == 1 else "views"
        self._report(SoFar(f"after {summed} of {total} {what}: {judged}"))
        self._leave_model(visited)

    def _leave_what_there_is(self) -> None:
        """Leave a model of what was learnt so far, whatever comes of the rest."""
        if self._closed is not None and self._closed.complete:
            self._closed.settle(last=False)
            self._leave(self._closed)
        else:
            visited = self._state.totals.samples
            self._leave_model(visited)

    def _leave_model(self, visited: int) -> None:
        self._take_over()
        facts = {"final": False, "epochs": self.epoch, "visited": visited}
        self._results.write(self._run.floor, facts)

    def _judge_epoch(self) -> None:
        """Judge what an epoch of steps ended with, where that decides how long the run is."""
        if not self._growing.watched or self._learner is self._closed:
            return
        visited = self.epoch * len(self._samples)
        with self.unmeasured():
            self._growing.of_epoch(visited, self._executable, self.batch)
        self._stop(self._growing.reason_to_stop())

    def _stop(self, reason: str | None) -> None:
        if reason is not None and not self._state.stopped:
            self._state.stopped = True
            self._report(Note(reason))

    def _require_held_out(self) -> None:
        """Refuse to judge epochs by nothing; sums judge themselves."""
        summed = self._closed is not None and self._closed.complete
        if self._growing.watched and self._val is None and not summed:
            raise UsageError(
                "patience and an early stop need held-out photos to judge by: give some (--val)"
            )

    def _settle(self, closed: ClosedHead) -> None:
        """Make the head of all samples, and tell how it was judged."""
        head = closed.settle(last=True)
        self._state.head = head.facts()
        self._state.totals.loss = self._state.totals.samples * (
            math.nan if head.loss is None else head.loss
        )
        self._meter.lap("backward")
        self._report(Note(told(head)))

    def _begin_closed(self, closed: ClosedHead, checkpoint: Checkpoint | None) -> None:
        """Take up the sums of a closed form, or start the epochs with its head."""
        if closed.complete:
            if checkpoint is not None:
                closed.load_state(checkpoint.part("closed"), self._state.head)
            closed.use(self.parameters())
            self._learner = closed
            return
        cache = self._run.features.cache
        # Without the features a start would cost as much as an epoch.
        affordable = self.options.head == "closed" or (cache is not None and cache.complete)
        if checkpoint is None and affordable:
            labels, totals = self._samples.labels, Totals.zero(len(self._bundle.ladder))
            for visited in start_epochs(closed, self._run, labels, self._meter, totals):
                self._prepared("starting the head", visited, len(self._samples))
            self._state.head = None if closed.head is None else closed.head.facts()

    def _sums(self) -> dict[str, np.ndarray]:
        """Return what the closed form was made of; once every view was seen, nothing."""
        if self._closed is None or self.epoch >= self.options.views:
            return {}
        return self._closed.state()

    def _refuse_rounds(self) -> None:
        """Refuse to be driven by rounds where sums make the head, and no steps do."""
        if self._closed is not None and self._closed.complete:
            raise UsageError("rounds train by steps: give TrainOptions(head='sgd')")

    def _after_step(self, loss: float, steps: int, planned: int) -> None:
        self._report(
            StepReport(
                epoch=self.epoch + 1,
                step=self.step,
                steps=steps,
                samples=self._state.totals.samples,
                total=planned,
                loss=loss,
                levels=tuple(self._state.totals.visits),
            )
        )
        # Before a checkpoint: a run that goes on from it makes the head of this step no more.
        if self._closed is not None and self._closed.complete:
            self._leave(self._closed)
        if self._growing.stop is not None:
            spent = self._state.spent_seconds + self._meter.total_seconds()
            self._stop(self._growing.stop.late(spent))
        if self._state.stopped:
            return  # its epoch ends here, and a checkpoint before that would end the run without
        if self._interrupt.requested:
            self.save_checkpoint()
            self._leave_what_there_is()
            raise KeyboardInterrupt
        if monotonic() - self._saved_at > self.options.checkpoint_seconds:
            self.save_checkpoint()

    def _end_epoch(self, report: EpochReport, *, last: bool) -> EpochReport:
        """Write the metrics and, after the last epoch or once it is time, a checkpoint."""
        self._take_over()
        # The line first: on resume, lines beyond the checkpoint's epoch are dropped.
        self._metrics.append(report.to_json())
        wait = min(_SHORT_EPOCH_SECONDS, self.options.checkpoint_seconds)
        if last or monotonic() - self._saved_at >= wait:
            self.save_checkpoint()
        if last:
            # The line in the metrics is without this checkpoint: that was written first.
            report = report.longer_by(self._meter.seconds)
        self._report(report)
        return report

    def _is_late(self, epoch_seconds: float) -> bool:
        """Say whether another epoch would overrun the time budget, and tell the user so."""
        budget = self.options.time_budget
        if budget is None or self.finished or self._state.spent_seconds + epoch_seconds <= budget:
            return False
        self._report(
            Note(
                f"stopping after {self.epoch} of {self._epochs} epochs: another would overrun "
                f"the time budget of {budget:g} s ({self._state.spent_seconds:.1f} s are spent)"
            )
        )
        return True

    def _finite_parameters(self) -> dict[str, np.ndarray]:
        try:
            return finite_parameters(self._executable)
        except DivergedError as error:
            raise self._diverged(error, self.step) from error

    def _diverged(self, error: DivergedError, step: int) -> PbcError:
        root = self._output.root
        left = "the earlier run is still" if self._replaces else "the last good checkpoint is"
        return PbcError(
            f"{error} in epoch {self.epoch + 1}, step {step}: lower the learning rate "
            f"(it is {self.objective.learning_rate:g}) and start again with --overwrite; "
            f"{left} in {root}"
        )

    # ---- going on --------------------------------------------------------------------------

    def _context(self) -> RunContext:
        return RunContext(
            bundle=self._bundle,
            engine=self._engine,
            executable=self._executable,
            samples=self._samples,
            options=self.options if self._closed is None else self._closed.options(self.options),
            batch=self.batch,
            meter=self._meter,
            output=self._output,
            report=self._report,
            progress=self._prepared,
            head=CLOSED if self._closed is not None and self._closed.complete else SGD,
        )

    def _prepared(self, stage: str, done: int, total: int) -> None:
        if self._interrupt.requested:
            raise KeyboardInterrupt
        self._report(Progress(stage, done, total))

    def _identity(self) -> dict[str, Any]:
        """Return all that decides the result of a run."""
        return {
            "bundle": self._bundle.digest,
            "data": self._samples.digest(),
            "options": {**self.options.deciding(), **self.options.resolved(self.batch)},
        }

    def _resumable(self) -> Checkpoint | None:
        """Load the checkpoint if it is of this very run; None if there is none yet."""
        if not self._output.checkpoint.exists():
            self._report(Note(f"no checkpoint in {self._output.root}: starting at the beginning"))
            return None
        return self._resumption.load()


def _split_line(samples: Samples, val: Samples) -> str:
    """Say how many photos are learnt from, and how many and which classes the result is shown."""
    without = len(samples.classes) - len(set(val.labels.tolist()))
    none = f" (none of {without} classes)" if without else ""
    return f"{len(samples)} photos to train on, {len(val)} to measure the result on{none}"
