"""The training run: prepare, then epoch by epoch, with a checkpoint to go on from at any time."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np

from pbc.bundle import Bundle
from pbc.bundle.ladder import Ladder
from pbc.data import Samples
from pbc.errors import PbcError
from pbc.runtime.allocator import keep_freed_memory
from pbc.runtime.engines import Engine
from pbc.runtime.evaluation import Evaluation, evaluate
from pbc.runtime.events import EpochReport, Note, Progress, Report, StepReport
from pbc.runtime.meter import Meter, peak_memory_bytes
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.checkpoint import Checkpoint, difference, join
from pbc.runtime.output.folder import Output
from pbc.runtime.output.metrics import Metrics
from pbc.runtime.output.personal import write_model
from pbc.runtime.parameters import initial_parameters, labelled_as, labelled_for
from pbc.runtime.routing.preparation import Decisions, Preparation, Prepared
from pbc.util.interrupt import Interrupt

# An fsync on an SD card takes as long as an epoch on cached features: epochs that are over sooner
# share a checkpoint.
_SHORT_EPOCH_SECONDS = 1.0


@dataclass
class Totals:
    """Sums over the epoch under way; they survive in the checkpoint."""

    loss: float = 0.0
    samples: int = 0
    skipped: int = 0
    visits: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Trainer:
    """One run, driven from outside: `prepare`, `run_epoch` while `not finished`, `finish`.

    epoch and step count what is done: whole epochs, and mini-batches of the epoch under way.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        samples: Samples,
        options: TrainOptions,
        output: Output,
        report: Report,
        val: Samples | None = None,
    ) -> None:
        self.options = options
        self.batch: int = options.batch or bundle.manifest["batch"]
        self.objective = options.objective
        self.epoch = 0
        self.step = 0
        self._bundle = bundle
        self._engine = engine
        self._samples = labelled_for(bundle, samples)
        self._val = labelled_as(self._samples.classes, val) if val is not None else None
        self._output = output
        self._report = report
        self._ladder = Ladder.from_json(
            bundle.manifest["levels"], bundle.manifest.get("cost_model", "macs")
        )
        keep_freed_memory()
        self._executable = engine.load(bundle, threads=options.threads)
        self._meter = Meter()
        self._totals = Totals()
        self._interrupt = Interrupt()
        self._saved_at = monotonic()
        self._epochs = options.epochs
        self._spent_seconds = 0.0
        self._late = False
        # Set by prepare().
        self._metrics: Metrics
        self._run: Prepared

    @property
    def finished(self) -> bool:
        """Return whether all epochs are done, or the time budget is."""
        return self._late or self.epoch >= self._epochs

    @property
    def cache_bytes(self) -> int:
        """Return the size of the feature cache, 0 without one; known once prepared."""
        cache = self._run.features.cache
        return 0 if cache is None else cache.size_bytes

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Return what the next epoch's report will count already, by stage."""
        return dict(self._meter.seconds)

    def parameters(self) -> dict[str, np.ndarray]:
        """Return a copy of the trainable parameters as they are now, in f32."""
        return self._executable.parameters()

    def prepare(self, *, resume: bool = False, interrupt: Interrupt | None = None) -> None:
        """Set up parameters, routing and cache; take up the checkpoint's state on `resume`.

        Once `interrupt` is requested, the next step ends with a checkpoint and KeyboardInterrupt.
        """
        options = self.options
        self._interrupt = interrupt or self._interrupt
        self._metrics = Metrics(
            self._output.metrics, self._output.tensorboard if options.tensorboard else None
        )
        parameters = initial_parameters(self._bundle, len(self._samples.classes), options.seed)
        checkpoint = self._resumable() if resume else None
        if checkpoint is not None:
            parameters = checkpoint.part("theta")
        self._executable.start(parameters, self.objective)
        self._meter.restart()
        preparation = self._preparation()
        known = Decisions.load(checkpoint, len(self._ladder)) if checkpoint else None
        self._run = preparation(known)
        # Measuring trained on the first samples: begin again.
        self._executable.start(parameters, self.objective)
        self._epochs = self._run.scheduler.epochs
        self._totals = self._no_totals()
        if checkpoint is not None:
            self._restore(checkpoint)
        self._metrics.rewind(self.epoch)
        if not self.finished:
            self._run = preparation.fill(self._run)
            self._epochs = self._run.scheduler.epochs
        if checkpoint is not None:
            self._run.scheduler.load_state(checkpoint.part("scheduler"))
        else:
            self.save_checkpoint()

    def run_epoch(self) -> EpochReport:
        """Run to the end of the epoch under way, from its beginning or where it was left."""
        meter, executable, run = self._meter, self._executable, self._run
        labels, totals, scheduler = self._samples.labels, self._totals, self._run.scheduler
        meter.restart()
        begun = meter.total_seconds()
        batches = scheduler.plan(self.epoch)
        planned = sum(len(batch.samples) for batch in batches)
        meter.lap("bookkeeping")
        fetched = run.fetch(batches, self.step, self.epoch)
        for batch, features in zip(batches[self.step :], fetched, strict=True):
            meter.lap("bookkeeping")
            losses, _ = executable.forward(batch.level, features, labels[batch.samples])
            loss = float(losses.mean())
            meter.lap("forward")
            if not math.isfinite(loss):
                raise PbcError(self._diverged(f"the loss is {loss}", self.step + 1))
            if scheduler.observe(batch, losses):
                executable.update()
                meter.lap("backward")
            else:
                totals.skipped += 1
            totals.loss += loss * len(batch.samples)
            totals.samples += len(batch.samples)
            for level in run.levels(batch).tolist():
                totals.visits[level] += 1
            self.step += 1
            self._tell_step(loss, len(batches), planned)
            if self._interrupt.requested:
                self.save_checkpoint()
                raise KeyboardInterrupt
            if monotonic() - self._saved_at > self.options.checkpoint_seconds:
                self.save_checkpoint()
            # Before the next features are fetched, whose laps are not to be charged with this.
            meter.lap("bookkeeping")
        scheduler.finish_epoch()
        meter.lap("bookkeeping")
        return self._end_epoch(len(batches), meter.total_seconds() - begun)

    def finish(self) -> Evaluation | None:
        """Write the personal model, evaluated at level 0 on the validation samples if any."""
        result = self.evaluate(self._val) if self._val is not None else None
        final: dict[str, Any] = {"final": True, "epochs": self.epoch}
        if result is not None:
            final |= {"val_accuracy": result.accuracy, "val_loss": result.loss}
        if self._run.decisions.findings:
            final["audit"] = [found.to_json() for found in self._run.decisions.findings]
        facts = {
            "classes": list(self._samples.classes),
            "samples": len(self._samples),
            "batch": self.batch,
            "options": {**self.options.to_json(), **self._resolved()},
            "fidelity_floor": self._run.floor,
            "metrics": final,
        }
        write_model(self._output, self._bundle, self.parameters(), facts)
        self._metrics.rewind(self.epoch)
        self._metrics.append(final)
        return result

    def evaluate(self, samples: Samples, level: int = 0) -> Evaluation:
        """Evaluate the parameters as they are now; its time is not a part of training's."""
        labelled = labelled_as(self._samples.classes, samples)
        return evaluate(self._executable, labelled, level, self.batch)

    def save_checkpoint(self) -> None:
        """Write all that `prepare(resume=True)` needs; refuses parameters that are not finite."""
        parts = {
            "theta": self._check_parameters(),
            "optimizer": self._executable.optimizer_state(),
            "scheduler": self._run.scheduler.state(),
            "policy": self._run.decisions.arrays(),
        }
        self._totals.seconds = dict(self._meter.seconds)
        facts = {
            **self._identity(),
            **self._run.decisions.facts(),
            "spent_seconds": self._spent_seconds,
            "late": self._late,
            "epoch": self.epoch,
            "step": self.step,
            "totals": dataclasses.asdict(self._totals),
        }
        Checkpoint(facts, join(parts)).save(self._output.checkpoint)
        self._saved_at = monotonic()
        self._meter.lap("bookkeeping")

    def _check_parameters(self) -> dict[str, np.ndarray]:
        """Return the trainable parameters; PbcError if one is not finite."""
        theta = self._executable.parameters()
        if not all(np.isfinite(value).all() for value in theta.values()):
            raise PbcError(self._diverged("a parameter is not finite", self.step))
        return theta

    def _prepared(self, stage: str, done: int, total: int) -> None:
        if self._interrupt.requested:
            raise KeyboardInterrupt
        self._report(Progress(stage, done, total))

    # ---- going on --------------------------------------------------------------------------

    def _preparation(self) -> Preparation:
        return Preparation(
            bundle=self._bundle,
            engine=self._engine,
            executable=self._executable,
            ladder=self._ladder,
            samples=self._samples,
            options=self.options,
            batch=self.batch,
            meter=self._meter,
            output=self._output,
            report=self._report,
            progress=self._prepared,
        )

    def _identity(self) -> dict[str, Any]:
        """Return all that decides the result of a run."""
        return {
            "bundle": self._bundle.digest,
            "data": self._samples.digest(),
            "options": {**self.options.deciding(), **self._resolved()},
        }

    def _resolved(self) -> dict[str, Any]:
        return {"batch": self.batch, "learning_rate": self.objective.learning_rate}

    def _resumable(self) -> Checkpoint | None:
        """Load the checkpoint if it is of this very run; None if there is none yet."""
        path = self._output.checkpoint
        if not path.exists():
            self._report(Note(f"no checkpoint in {self._output.root}: starting at the beginning"))
            return None
        checkpoint = Checkpoint.load(path)
        different = difference(checkpoint.facts, self._identity())
        done, wanted = checkpoint.facts["epoch"], self.options.epochs
        if different is None and done > wanted:
            different = f"{done} epochs are done already, not {wanted}"
        if different is not None:
            raise PbcError(
                f"cannot resume {self._output.root}: {different}; --overwrite starts again"
            )
        return checkpoint

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.epoch, self.step = checkpoint.facts["epoch"], checkpoint.facts["step"]
        self._totals = Totals(**checkpoint.facts["totals"])
        self._meter.seconds = dict(self._totals.seconds)
        self._spent_seconds = checkpoint.facts["spent_seconds"]
        self._late = checkpoint.facts["late"]
        self._executable.load_optimizer_state(checkpoint.part("optimizer"))

    # ---- telling ---------------------------------------------------------------------------

    def _no_totals(self) -> Totals:
        return Totals(visits=[0] * len(self._ladder))

    def _tell_step(self, loss: float, steps: int, planned: int) -> None:
        totals = self._totals
        self._report(
            StepReport(
                epoch=self.epoch + 1,
                step=self.step,
                steps=steps,
                samples=totals.samples,
                total=planned,
                loss=loss,
                levels=tuple(totals.visits),
            )
        )

    def _end_epoch(self, steps: int, stepping_seconds: float) -> EpochReport:
        """Report and save; `stepping_seconds` is what an epoch takes beside the preparation."""
        totals, seconds = self._totals, self._meter.total_seconds()
        report = EpochReport(
            epoch=self.epoch + 1,
            loss=totals.loss / totals.samples,
            levels=tuple(totals.visits),
            steps=steps,
            skipped=totals.skipped,
            samples_per_second=totals.samples / seconds,
            seconds=seconds,
            stage_seconds=dict(self._meter.seconds),
            peak_memory_bytes=peak_memory_bytes(),
            rested=len(self._samples) - totals.samples,
        )
        self._check_parameters()
        self._spent_seconds += seconds
        self.epoch, self.step = self.epoch + 1, 0
        self._totals = self._no_totals()
        self._meter.seconds = dict.fromkeys(self._meter.seconds, 0.0)
        self._late = self._is_late(stepping_seconds)
        # The line first: on resume, lines beyond the checkpoint's epoch are dropped.
        self._metrics.append(report.to_json())
        wait = min(_SHORT_EPOCH_SECONDS, self.options.checkpoint_seconds)
        if self.finished or monotonic() - self._saved_at >= wait:
            self.save_checkpoint()
        if self.finished:
            report = self._with_last_checkpoint(report)
        self._report(report)
        return report

    def _with_last_checkpoint(self, report: EpochReport) -> EpochReport:
        """Add what the last checkpoint took, as no epoch follows that could count it.

        The line in the metrics is without it: that was written first.
        """
        stages = {
            name: taken + self._meter.seconds[name] for name, taken in report.stage_seconds.items()
        }
        seconds = sum(stages.values())
        return dataclasses.replace(
            report,
            seconds=seconds,
            stage_seconds=stages,
            samples_per_second=report.samples_per_second * report.seconds / seconds,
        )

    def _is_late(self, epoch_seconds: float) -> bool:
        """Say whether another epoch would overrun the time budget, and tell the user so."""
        budget = self.options.time_budget
        if budget is None or self.finished or self._spent_seconds + epoch_seconds <= budget:
            return False
        self._report(
            Note(
                f"stopping after {self.epoch} of {self._epochs} epochs: another would overrun "
                f"the time budget of {budget:g} s ({self._spent_seconds:.1f} s are spent)"
            )
        )
        return True

    def _diverged(self, what: str, step: int) -> str:
        return (
            f"{what} in epoch {self.epoch + 1}, step {step}: lower the learning rate "
            f"(it is {self.objective.learning_rate:g}) and start again with --overwrite; "
            f"the last good checkpoint is in {self._output.root}"
        )
