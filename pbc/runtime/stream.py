"""Training on a stream: samples that come once, are learnt from once, and are never stored.

Nothing can be cached and nobody is visited twice, so what is left to save is the prefix: blocks of
samples are routed to proxies and their features computed ahead of the iterations, as in an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pbc.bundle import Bundle
from pbc.bundle.ladder import CLOSED, SGD
from pbc.data import Samples
from pbc.errors import PbcError, UsageError
from pbc.runtime.allocator import keep_freed_memory
from pbc.runtime.closed_head import ClosedHead, told
from pbc.runtime.engines import Engine, Executable, guarded
from pbc.runtime.engines.bounds import check_mini_batch
from pbc.runtime.events import EpochReport, Note, Progress, Report, silent
from pbc.runtime.frames import Stream, blocks
from pbc.runtime.loop import DivergedError, Steps, Totals, finite_parameters, train
from pbc.runtime.meter import Meter
from pbc.runtime.options import AUTO, TrainOptions
from pbc.runtime.output.folder import Output
from pbc.runtime.output.metrics import Metrics
from pbc.runtime.output.personal import write_model
from pbc.runtime.parameters import body_inputs, initial_parameters
from pbc.runtime.routing.context import RunContext
from pbc.runtime.routing.preparation import Preparation
from pbc.runtime.routing.prepared import Prepared
from pbc.runtime.routing.survey import Survey
from pbc.util.interrupt import Interrupt

# Mini-batches per block: enough to fill a prefix call of every level, few enough to hold.
_BATCHES = 16


class StreamTraining:
    """One pass over a stream, from its first block to a personal model.

    A kill loses it: what was seen cannot be seen again. Ctrl-C ends the stream early.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        classes: Sequence[str],
        options: TrainOptions,
        output: Output,
        report: Report,
        interrupt: Interrupt,
    ) -> None:
        _refuse_what_needs_photos_again(options)
        # What a second visit would need is off.
        options = replace(options, epochs=1, cache="off", augment=0, time_budget=None)
        self._options = options.for_bundle(bundle)
        self._bundle = bundle
        bundle.ladder.require(self._options.fixed_level or 0)
        self._engine = engine
        self._classes = tuple(classes)
        self._output = output
        self._report = report
        self._interrupt = interrupt
        self._batch = self._options.samples_per_batch
        keep_freed_memory()
        self._executable: Executable = guarded.load(engine, bundle, threads=options.threads)
        self._meter = Meter()
        self._closed: ClosedHead | None = None  # known with the first block

    def __call__(self, stream: Stream) -> EpochReport:
        """Train on (image, label) pairs, and write the personal model.

        image: uint8[H, W, 3], or floats in 0…1, of any size. label: a class name or its index in
        `classes`. Raises PbcError for an image or label that is neither, and for an empty stream.
        """
        totals, meter = Totals.zero(len(self._bundle.ladder)), self._meter
        run: Prepared | None = None
        meter.restart()
        for block in blocks(self._bundle, stream, self._classes, self._batch * _BATCHES):
            meter.lap("decode")
            run = self._prepared(block, run)
            self._learn(run, block, totals)
            classes = block.classes
            self._report(Progress("streaming", totals.samples, totals.samples))
            meter.lap("bookkeeping")
            if self._interrupt.requested:
                break
        if run is None:
            raise PbcError("the stream is empty; it must yield at least one (image, label)")
        head: dict[str, Any] = {}
        if self._closed is not None:
            found = self._closed.settle(last=True)
            totals.loss = totals.samples * (math.nan if found.loss is None else found.loss)
            head = {"head": found.facts()}
            meter.lap("backward")
            self._report(Note(told(found)))
        try:
            theta = finite_parameters(self._executable)
        except DivergedError as error:
            raise _diverged(error, totals) from error
        result = totals.report(1, meter.seconds, totals.samples, totals.samples)
        self._output.clear()
        metrics = Metrics(self._output.metrics)
        metrics.rewind(0)
        metrics.append(result.to_json())
        final = {"final": True, "epochs": 1, **head}
        write_model(
            self._output,
            self._bundle,
            theta,
            classes=classes,
            batch=self._batch,
            samples=totals.samples,
            options={**self._options.to_json(), **self._options.resolved(self._batch)},
            fidelity_floor=run.floor,
            metrics=final,
            level=self._options.fixed_level or 0,
        )
        metrics.append(final)
        return result

    def _prepared(self, block: Samples, before: Prepared | None) -> Prepared:
        """Decide about a block: all on the first one, then only where its own samples run."""
        if before is None:
            check_mini_batch(self._bundle.manifest, min(self._batch, len(block)))
            self._executable.foresee(body_inputs(self._bundle, len(block.classes)))
        theta = initial_parameters(self._bundle, len(block.classes), self._options.seed)
        if before is None:
            self._closed = ClosedHead.find(
                self._bundle, self._executable, theta, self._options, samples=None
            )
        context = RunContext(
            bundle=self._bundle,
            engine=self._engine,
            executable=self._executable,
            samples=block,
            options=self._options,
            batch=self._batch,
            meter=self._meter,
            output=self._output,
            report=self._report if before is None else silent,
            progress=lambda stage, done, total: None,
            head=SGD if self._closed is None else CLOSED,
        )
        preparation = Preparation(context)
        if before is not None:
            run = preparation(Survey(context).again(before.decisions))
            run.scheduler.carry(before.scheduler.state())
            return run
        objective = self._options.objective
        self._executable.start(theta, objective)
        run = preparation(None)
        # Measuring trained on the first samples: begin again.
        self._executable.start(theta, objective)
        return run

    def _learn(self, run: Prepared, block: Samples, totals: Totals) -> None:
        batches = run.scheduler.plan(0)
        learner = self._closed or Steps(self._executable, run.scheduler)
        losses = train(learner, run, block.labels, batches, self._meter, totals)
        try:
            for _ in losses:
                pass
        except DivergedError as error:
            raise _diverged(error, totals) from error


def _refuse_what_needs_photos_again(options: TrainOptions) -> None:
    """Raise UsageError for an option that a stream, of which nothing is kept, cannot follow."""
    asked = (
        ("stop", options.stop, None),
        ("patience", options.patience, None),
        ("selector", options.selector, None),
        ("deploy_level", options.deploy_level if options.deploy_level == AUTO else 0, 0),
    )
    for name, value, default in asked:
        if value != default:
            raise UsageError(
                f"{name} is {value!r}; a stream comes once, and nothing of it is kept to judge by: "
                f"it must be {default}"
            )


def _diverged(error: DivergedError, totals: Totals) -> PbcError:
    return PbcError(
        f"{error} after {totals.samples} samples of the stream: lower the learning rate"
    )
