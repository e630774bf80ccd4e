"""The training run: prepare, then epoch by epoch, with a checkpoint to go on from at any time."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np
import safetensors.numpy

from pbc import registry
from pbc.atomic import replace_bytes
from pbc.bundle import Bundle
from pbc.data import Samples
from pbc.errors import PbcError
from pbc.ladder import Ladder
from pbc.runtime.checkpoint import Checkpoint, difference, join
from pbc.runtime.engines import Engine
from pbc.runtime.evaluation import Evaluation, evaluate
from pbc.runtime.events import EpochReport, Note, Progress, Report, StepReport
from pbc.runtime.features import Features, has_prefix, level_key, one_body, open_cache
from pbc.runtime.interrupt import Interrupt
from pbc.runtime.meter import Meter, peak_memory_bytes
from pbc.runtime.metrics import Metrics
from pbc.runtime.options import LEARNING_RATES, TrainOptions
from pbc.runtime.output import Output
from pbc.runtime.parameters import initial_parameters, labelled_as, labelled_for
from pbc.runtime.router import Routing, predict, routable, route, stay
from pbc.runtime.schedulers import Scheduler, Setting

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
        self.learning_rate: float = options.learning_rate or LEARNING_RATES[options.optimizer]
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
        self._executable = engine.load(bundle, threads=options.threads)
        self._meter = Meter()
        self._totals = Totals()
        self._interrupt = Interrupt()
        self._saved_at = monotonic()
        # Set by prepare().
        self._metrics: Metrics
        self._predicted: np.ndarray | None
        self._features: Features
        self._free_mixing: bool
        self._scheduler: Scheduler

    @property
    def finished(self) -> bool:
        """Return whether all epochs are done."""
        return self.epoch >= self.options.epochs

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
        self._executable.start(parameters, options.optimizer, self.learning_rate)
        self._meter.restart()
        self._predicted = checkpoint.part("policy").get("predicted") if checkpoint else None
        if self._predicted is None:
            self._predicted = self._predict()
        self._features, routing = self._caching(self._route())
        setting = Setting(
            levels=routing.levels,
            allowed=routing.allowed,
            batch=self.batch,
            seed=options.seed,
            alpha=options.alpha if options.skip else None,
            grouped=not self._free_mixing,
        )
        scheduler = registry.load("pbc.schedulers", options.scheduler)
        self._scheduler = scheduler(setting)
        self._totals = self._no_totals()
        if checkpoint is not None:
            self._restore(checkpoint)
        self._metrics.rewind(self.epoch)
        if not self.finished:
            self._fill_cache()
        if checkpoint is None:
            self.save_checkpoint()

    def run_epoch(self) -> EpochReport:
        """Run to the end of the epoch under way, from its beginning or where it was left."""
        meter, executable, scheduler = self._meter, self._executable, self._scheduler
        features, labels, totals = self._features, self._samples.labels, self._totals
        meter.restart()
        batches = scheduler.plan(self.epoch)
        for batch in batches[self.step :]:
            meter.lap("bookkeeping")
            inputs = features(batch.level, batch.samples)
            losses, _ = executable.forward(batch.level, inputs, labels[batch.samples])
            loss = float(losses.mean())
            meter.lap("forward")
            if not math.isfinite(loss):
                raise PbcError(self._diverged(f"the loss is {loss}", self.step + 1))
            if scheduler.observe(batch, loss):
                executable.update()
                meter.lap("backward")
            else:
                totals.skipped += 1
            totals.loss += loss * len(batch.samples)
            totals.samples += len(batch.samples)
            if self._free_mixing:
                for level in scheduler.levels[batch.samples].tolist():
                    totals.visits[level] += 1
            else:
                totals.visits[batch.level] += len(batch.samples)
            self.step += 1
            self._tell_step(loss, len(batches))
            if self._interrupt.requested:
                self.save_checkpoint()
                raise KeyboardInterrupt
            if monotonic() - self._saved_at > self.options.checkpoint_seconds:
                self.save_checkpoint()
        scheduler.finish_epoch()
        meter.lap("bookkeeping")
        return self._end_epoch(len(batches))

    def finish(self) -> Evaluation | None:
        """Write the personal model, evaluated at level 0 on the validation samples if any."""
        result = self.evaluate(self._val) if self._val is not None else None
        theta = self._executable.parameters()
        replace_bytes(self._output.trainable, safetensors.numpy.save(theta))
        final: dict[str, Any] = {"final": True, "epochs": self.epoch}
        if result is not None:
            final |= {"val_accuracy": result.accuracy, "val_loss": result.loss}
        model = {
            "format": 1,
            "bundle": self._bundle.digest,
            "classes": list(self._samples.classes),
            "samples": len(self._samples),
            "batch": self.batch,
            "options": {**dataclasses.asdict(self.options), **self._resolved()},
            "metrics": final,
        }
        replace_bytes(self._output.model, (json.dumps(model, indent=1) + "\n").encode())
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
            "scheduler": self._scheduler.state(),
        }
        if self._predicted is not None:
            parts["policy"] = {"predicted": self._predicted}
        self._totals.seconds = dict(self._meter.seconds)
        facts = {
            **self._identity(),
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

    # ---- preparation -----------------------------------------------------------------------

    def _predict(self) -> np.ndarray | None:
        """Ask the policy about every sample, f32[n, N]; None where no answer would matter."""
        policy = self._bundle.manifest.get("policy")
        floor = self.options.fidelity_floor
        if not self.options.routing:
            return None
        if policy is None or not routable(self._ladder, floor)[1:].any():
            reason = "has no policy" if policy is None else f"has no proxy of fidelity {floor:g}"
            self._report(Note(f"the bundle {reason}: every sample runs at level 0"))
            return None
        _, height, width = policy["view"]
        return predict(
            self._samples,
            self._executable,
            (height, width),
            self.batch,
            self._meter,
            functools.partial(self._prepared, "routing"),
        )

    def _route(self) -> Routing:
        if self._predicted is None:
            return stay(np.zeros(len(self._samples), np.int64), self._ladder)
        return route(self._predicted, self._ladder, self.options.fidelity_floor)

    def _caching(self, routing: Routing) -> tuple[Features, Routing]:
        """Make the source of features; with a cache, samples stay where they are cached."""
        cache, bundle, options = None, self._bundle, self.options
        if options.cache != "off" and not has_prefix(bundle):
            self._report(
                Note(
                    f"--cache {options.cache} is off: with {bundle.manifest['strategy']} nothing "
                    "is frozen before the first trainable layer"
                )
            )
        elif options.cache != "off":
            cache = open_cache(bundle, options, len(self._samples), self._output.cache)
            if cache is None:
                self._report(Note(f"the cache is off: no sample fits in {options.cache_mb} MiB"))
        if cache is not None:
            routing = stay(routing.levels, self._ladder)
        mixed = one_body(bundle)
        # Only where every sample is cached does no mini-batch run a prefix at one level.
        self._free_mixing = mixed and cache is not None and cache.complete
        features = Features(
            self._samples, self._executable, self._meter, cache, routing.levels, mixed
        )
        return features, routing

    def _fill_cache(self) -> None:
        cache = self._features.cache
        if cache is None:
            return
        engine = f"{self._engine.name} {self._engine.version()}"
        cache.fill(
            self._features.levels,
            self._samples.hashes,
            self.batch,
            functools.lru_cache(
                level_key(self._bundle, self._samples.spec, engine, self.options.cache_dtype)
            ),
            self._features.compute,
            functools.partial(self._prepared, "caching"),
        )
        self._meter.lap("cache")

    def _prepared(self, stage: str, done: int, total: int) -> None:
        if self._interrupt.requested:
            raise KeyboardInterrupt
        self._report(Progress(stage, done, total))

    # ---- going on --------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """Return all that decides the result of a run."""
        return {
            "bundle": self._bundle.digest,
            "data": self._samples.digest(),
            "options": {**self.options.deciding(), **self._resolved()},
        }

    def _resolved(self) -> dict[str, Any]:
        return {"batch": self.batch, "learning_rate": self.learning_rate}

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
        self._executable.load_optimizer_state(checkpoint.part("optimizer"))
        self._scheduler.load_state(checkpoint.part("scheduler"))

    # ---- telling ---------------------------------------------------------------------------

    def _no_totals(self) -> Totals:
        return Totals(visits=[0] * len(self._ladder))

    def _tell_step(self, loss: float, steps: int) -> None:
        totals, total = self._totals, len(self._samples)
        visits = tuple(totals.visits)
        self._report(
            StepReport(self.epoch + 1, self.step, steps, totals.samples, total, loss, visits)
        )

    def _end_epoch(self, steps: int) -> EpochReport:
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
        )
        self._check_parameters()
        self.epoch, self.step = self.epoch + 1, 0
        self._totals = self._no_totals()
        self._meter.seconds = dict.fromkeys(self._meter.seconds, 0.0)
        # The line first: on resume, lines beyond the checkpoint's epoch are dropped.
        self._metrics.append(report.to_json())
        wait = min(_SHORT_EPOCH_SECONDS, self.options.checkpoint_seconds)
        if self.finished or monotonic() - self._saved_at >= wait:
            self.save_checkpoint()
        self._report(report)
        return report

    def _diverged(self, what: str, step: int) -> str:
        return (
            f"{what} in epoch {self.epoch + 1}, step {step}: lower the learning rate "
            f"(it is {self.learning_rate:g}) and start again with --overwrite; "
            f"the last good checkpoint is in {self._output.root}"
        )
