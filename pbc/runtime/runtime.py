"""What a script uses: open a bundle, fit it to samples.

runtime = Runtime.open("model.pbc")
samples = ImageFolder.open("photos", runtime.spec)
runtime.fit(samples, TrainOptions(epochs=12, cache="ram"), "mine")
Personal.open("mine").predict(read_image("photo.jpg", runtime.spec))
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pbc import registry
from pbc.bundle import Bundle
from pbc.data import InputSpec, Samples
from pbc.errors import PbcError
from pbc.runtime.engines import Engine
from pbc.runtime.evaluation import Evaluation
from pbc.runtime.events import Report, silent
from pbc.runtime.interrupt import deferred_interrupt
from pbc.runtime.options import TrainOptions
from pbc.runtime.output import Output
from pbc.runtime.trainer import Trainer


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
        engine: Engine = registry.load("pbc.engines", bundle.manifest["engine"])()
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
            used = output.checkpoint.exists() or output.model.exists()
            if used and not resume and not overwrite:
                raise PbcError(
                    f"{out} holds a run already: --resume goes on with it, "
                    "--overwrite starts again, -o names another folder"
                )
            if not resume:
                # Gone first: a folder is never half of one run and half of another.
                for path in (output.model, output.checkpoint, output.trainable):
                    path.unlink(missing_ok=True)
            trainer.prepare(resume=resume, interrupt=interrupt)
            output.adopt(self.bundle)
            while not trainer.finished:
                trainer.run_epoch()
            return trainer.finish()
