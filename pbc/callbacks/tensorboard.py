"""TensorBoard: event files in the folder of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pbc.callbacks import scalars
from pbc.runtime.events import EpochReport, Event, Finished
from pbc.runtime.output.folder import Output


class TensorBoard:
    """Write scalars per epoch; `tensorboard --logdir OUT` shows them."""

    def __init__(self, out: Path, options: dict[str, Any]) -> None:
        self._writer = SummaryWriter(str(Output(out).tensorboard))

    def __call__(self, event: Event) -> None:
        if isinstance(event, EpochReport):
            for name, value in scalars(event):
                self._writer.add_scalar(f"train/{name}", value, event.epoch)
            self._writer.flush()
        elif isinstance(event, Finished):
            for name, value in event.scalars():
                self._writer.add_scalar(f"val/{name}", value)
            self._writer.close()
