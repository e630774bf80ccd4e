"""The library's front door for scripts: open a bundle, fit it to samples.

runtime = Runtime.open("model.pbc")
samples = ImageFolder.open("photos", runtime.spec)
runtime.fit(samples, TrainOptions(epochs=12, cache="ram"), "mine")
Personal.open("mine").predict(read_image("photo.jpg", runtime.spec))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pbc import plugins
from pbc.bundle import Bundle
from pbc.bundle.trust import open_trusted
from pbc.data import InputSpec, Samples
from pbc.errors import PbcError
from pbc.runtime.engines import Engine, Executable
from pbc.runtime.events import EpochReport, Finished, Report, silent
from pbc.runtime.frames import Stream
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.folder import Output
from pbc.runtime.output.personal import write_model
from pbc.runtime.output.validation import Validation
from pbc.runtime.parameters import checked_theta, numbered_classes
from pbc.runtime.stream import StreamTraining
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
        return cls.of(open_trusted(path))

    @classmethod
    def of(cls, bundle: Bundle) -> Runtime:
        """Find the engine of a bundle that is trusted."""
        engine: Engine = plugins.load("pbc.engines", bundle.manifest["engine"])()
        return cls(bundle, engine, InputSpec.from_json(bundle.manifest["input"]))

    def trainer(
        self,
        samples: Samples,
        options: TrainOptions,
        out: Path | str,
        *,
        val: Samples | None = None,
        classes: Sequence[str] | None = None,
        executable: Executable | None = None,
        report: Report = silent,
    ) -> Trainer:
        """Return a run to be driven epoch by epoch, or round by round.

        classes: all classes of the task, where `samples` need not have every one, as a client of
        federated learning; by default those of `samples`. executable: what several trainers share,
        see pbc.runtime.engines.sharing; by default one is loaded.
        """
        return Trainer(
            self.bundle,
            self.engine,
            samples,
            options,
            Output(Path(out)),
            report,
            val=val,
            classes=classes,
            executable=executable,
        )

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
    ) -> Validation | None:
        """Train, and write the personal model into the folder `out`; evaluate it on `val`.

        `pbc.data.held_out.train_and_validation` sets photos aside for `val`, as `pbc train` does.

        A folder that holds a run already needs `resume` (go on) or `overwrite` (start again): it
        stays until the new one has learnt something that it keeps.
        Ctrl-C writes a checkpoint, then raises KeyboardInterrupt.
        """
        output = Output(Path(out))
        trainer = Trainer(self.bundle, self.engine, samples, options, output, report, val=val)
        with output.locked(), deferred_interrupt() as interrupt:
            replaces = False
            if resume:
                output.adopt(self.bundle)
            else:
                trainer.check()  # before an earlier run loses its cache
                replaces = output.begin(self.bundle, overwrite=overwrite)
            trainer.prepare(resume=resume, replaces=replaces, interrupt=interrupt)
            while not trainer.finished:
                trainer.run_epoch()
            result = trainer.finish()
            report(Finished(result))
            return result

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
        Nothing of the stream is kept. A run that is overwritten stays until its end. Ctrl-C ends
        the stream: the model is written, then KeyboardInterrupt raised.
        """
        output = Output(Path(out))
        with output.locked(), deferred_interrupt() as interrupt:
            training = StreamTraining(
                self.bundle, self.engine, tuple(classes), options, output, report, interrupt
            )
            output.begin(self.bundle, overwrite=overwrite)
            result = training(stream)
            if interrupt.requested:
                raise KeyboardInterrupt
            return result

    def personalize(
        self,
        theta: Mapping[str, np.ndarray],
        classes: Sequence[str],
        out: Path | str,
        *,
        overwrite: bool = False,
    ) -> None:
        """Write trainable parameters that were trained elsewhere as the personal model in `out`.

        theta: as `Trainer.parameters` returns it. classes: names by label. Raises PbcError for
        classes or parameters that are not the bundle's, and for a folder that holds a run already.
        """
        names = numbered_classes(self.bundle, classes)
        if names != tuple(classes):
            raise PbcError(
                "the classes are not in the bundle's order, so the head may not be either"
            )
        checked = checked_theta(self.bundle, theta, len(names))
        output = Output(Path(out))
        with output.locked():
            output.begin(self.bundle, overwrite=overwrite)
            output.clear()
            batch = self.bundle.manifest["batch"]
            write_model(output, self.bundle, checked, classes=names, batch=batch)
