"""Weights & Biases: a run per training, by the settings of its own environment variables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import wandb

from pbc.callbacks import scalars
from pbc.runtime.events import EpochReport, Event, Finished


class WeightsAndBiases:
    """Log scalars per epoch; the result is the run's summary."""

    def __init__(self, out: Path, options: dict[str, Any]) -> None:
        self._run = wandb.init(name=out.resolve().name, config=options)

    def __call__(self, event: Event) -> None:
        if isinstance(event, EpochReport):
            values = {f"train/{name}": value for name, value in scalars(event)}
            self._run.log(values, step=event.epoch)
        elif isinstance(event, Finished):
            self._run.summary.update({f"val/{name}": value for name, value in event.scalars()})
            self._run.finish()
