"""MLflow: a run per training, where MLFLOW_TRACKING_URI says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow

from pbc.callbacks import scalars
from pbc.runtime.events import EpochReport, Event, Finished


class MlFlow:
    """Log the options as parameters, and scalars per epoch."""

    def __init__(self, out: Path, options: dict[str, Any]) -> None:
        mlflow.start_run(run_name=out.resolve().name)
        mlflow.log_params(options)

    def __call__(self, event: Event) -> None:
        if isinstance(event, EpochReport):
            values = {f"train.{name}": value for name, value in scalars(event)}
            mlflow.log_metrics(values, step=event.epoch)
        elif isinstance(event, Finished):
            mlflow.log_metrics({f"val.{name}": value for name, value in event.scalars()})
            mlflow.end_run()
