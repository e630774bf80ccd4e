"""pbc itself, as `pbc train` runs it, and the schedules that it is compared with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pbc.bench.rival import Arrays, EpochTimes, RivalSetting
from pbc.data import Samples
from pbc.runtime.engines import Executable, guarded
from pbc.runtime.events import Event, Note, SoFar, StepReport
from pbc.runtime.output.checkpoint import Checkpoint
from pbc.runtime.output.folder import Output
from pbc.util.atomic import replace_bytes


class Pbc:
    """pbc with its defaults: its own scheduler, the feature cache on."""

    changes: ClassVar[dict[str, Any]] = {}

    def __init__(self, setting: RivalSetting) -> None:
        options = dataclasses.replace(setting.options, **self.changes)
        self._marks, self._samples = setting.marks, len(setting.samples)
        self._checkpoint: Path = Output(setting.folder).checkpoint
        self._notes: list[str] = []
        self._trainer = setting.runtime.trainer(
            setting.samples,
            options,
            setting.folder,
            report=self._take,
            executable=_loaded(setting),
        )
        self._uncounted: dict[str, float] = {}

    def prepare(self, state: Arrays | None) -> None:
        if state is None:
            self._trainer.prepare()
            return
        replace_bytes(self._checkpoint, state["checkpoint"].tobytes())
        self._trainer.prepare(resume=True)
        self._uncounted = self._trainer.stage_seconds

    def run_epoch(self) -> EpochTimes:
        report = self._trainer.run_epoch()
        spent = self._counted(report.stage_seconds)
        self._uncounted = {}
        last = self._trainer.finished
        # No run of this trainer goes on with a loss that is not finite.
        loss = None if math.isnan(report.loss) else report.loss
        return EpochTimes(sum(spent.values()), spent, report.levels, loss, last)

    def parameters(self) -> dict[str, np.ndarray]:
        return self._trainer.parameters()

    def evaluate(self, samples: Samples) -> float:
        return self._trainer.evaluate(samples).accuracy

    def state(self) -> dict[str, np.ndarray]:
        """Return the run's own checkpoint; short epochs share one, so it may have to be written.

        That one is the bench's alone, and its lap begins before the evaluation: neither counts.
        """
        if self._saved().facts["epoch"] < self._trainer.epoch:
            before = self._trainer.stage_seconds
            self._trainer.save_checkpoint()
            after = self._trainer.stage_seconds
            self._uncounted = {stage: after[stage] - before[stage] for stage in after}
        return {"checkpoint": np.frombuffer(self._checkpoint.read_bytes(), np.uint8)}

    def facts(self) -> dict[str, Any]:
        return {"notes": self._notes, "cache_bytes": self._trainer.cache_bytes}

    def _counted(self, stage_seconds: Mapping[str, float]) -> dict[str, float]:
        return {
            stage: max(0.0, seconds - self._uncounted.get(stage, 0.0))
            for stage, seconds in stage_seconds.items()
        }

    def _saved(self) -> Checkpoint:
        return Checkpoint.load(self._checkpoint)

    def _take(self, event: Event) -> None:
        if isinstance(event, Note):
            if not isinstance(event, SoFar):
                self._notes.append(event.text)
        elif isinstance(event, StepReport) and self._marks.due(event.samples / self._samples):
            with self._trainer.unmeasured():
                seconds = sum(self._counted(self._trainer.stage_seconds).values())
                self._marks.take(event.samples / self._samples, seconds)


def _loaded(setting: RivalSetting) -> Executable:
    """Load level 0 and run it once: as for the other rivals, that is in nobody's time."""
    runtime = setting.runtime
    executable = guarded.load(runtime.engine, runtime.bundle, threads=setting.options.threads)
    executable.prefix(0, np.zeros((setting.batch, *runtime.spec.shape), np.float32))
    return executable


class PbcNoCache(Pbc):
    """pbc with its defaults, the feature cache off."""

    changes: ClassVar[dict[str, Any]] = {"cache": "off"}


class PieBridge(Pbc):
    """The paper's PieBridge: predicted difficulty, skipped backwards move samples on, no cache."""

    changes: ClassVar[dict[str, Any]] = {
        "scheduler": "piebridge",
        "head": "sgd",
        "cache": "off",
        "routing": True,
        "skip": True,
    }
