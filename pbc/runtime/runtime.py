"""What a script uses: open a bundle, fit it to samples.

runtime = Runtime.open("model.pbc")
samples = ImageFolder.open("photos", runtime.spec)
runtime.fit(samples, TrainOptions(epochs=12, cache="ram"), "mine")
Personal.open("mine").predict(read_image("photo.jpg", runtime.spec))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pbc import plugins
from pbc.bundle import Bundle
from pbc.data import InputSpec, Samples
from pbc.runtime.engines import Engine
from pbc.runtime.evaluation import Evaluation
from pbc.runtime.events import EpochReport, Report, silent
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.folder import Output
from pbc.runtime.stream import Stream, StreamTraining
from pbc.runtime.trainer import Trainer
from pbc.util.interrupt import deferred_interrupt


@dataclass(frozen=True)
class Runtime:
    """An opened bundle and the engine that executes it."""

    bundle: Bundle
    engine: Engine
    spec: InputSpec

    @classmethod
    def open(cls, path: Path | str) -> Runtime:
        """Verify the bundle's manifest and find its engine."""
        bundle = Bundle.open(path)
        engine: Engine = plugins.load("pbc.engines", bundle.manifest["engine"])()
        return cls(bundle, engine, InputSpec.from_json(bundle.manifest["input"]))

    def trainer(
        self,
        samples: Samples,
        options: TrainOptions,
        out: Path | str,
        *,
        val: Samples | None = None,
        report: Report = silent,
    ) -> Trainer:
        """Return a run to be driven epoch by epoch."""
        return Trainer(self.bundle, self.engine, samples, options, Output(Path(out)), report, val)

    def fit(
        self,
        samples: Samples,
        options: TrainOptions,
        out: Path | str,
        *,
        val: Samples | None = None,
        resume: bool = False,
        overwrite: bool = False,
        report: Report = silent,
    ) -> Evaluation | None:
        """Train, and write the personal model into the folder `out`; evaluate it on `val`.

        A folder that holds a run already needs `resume` (go on) or `overwrite` (start again).
        Ctrl-C writes a checkpoint, then raises KeyboardInterrupt.
        """
        output = Output(Path(out))
        trainer = self.trainer(samples, options, out, val=val, report=report)
        with output.locked(), deferred_interrupt() as interrupt:
            if not resume:
                output.clear(overwrite=overwrite)
            trainer.prepare(resume=resume, interrupt=interrupt)
            output.adopt(self.bundle)
            while not trainer.finished:
                trainer.run_epoch()
            return trainer.finish()

    def fit_stream(
        self,
        stream: Stream,
        classes: Sequence[str],
        options: TrainOptions,
        out: Path | str,
        *,
        overwrite: bool = False,
        report: Report = silent,
    ) -> EpochReport:
        """Train on (image, label) pairs that come once, and write the personal model into `out`.

        image: uint8[H, W, 3] or floats in 0…1. label: a class name or its index in `classes`.
        Nothing of the stream is kept. Ctrl-C ends the stream: the model is written, then
        KeyboardInterrupt raised.
        """
        output = Output(Path(out))
        with output.locked(), deferred_interrupt() as interrupt:
            output.clear(overwrite=overwrite)
            output.adopt(self.bundle)
            training = StreamTraining(
                self.bundle, self.engine, tuple(classes), options, output, report, interrupt
            )
            result = training(stream)
            if interrupt.requested:
                raise KeyboardInterrupt
            return result
