"""Training metrics: JSON lines beside the model, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pbc.errors import PbcError
from pbc.util.atomic import cannot_write, replace_bytes


class Metrics:
    """metrics.jsonl: a line per epoch and a final one, readable by the owner only."""

    def __init__(self, path: Path, tensorboard: Path | None) -> None:
        self._path = path
        self._writer = _tensorboard_writer(tensorboard) if tensorboard is not None else None

    def rewind(self, epoch: int) -> None:
        """Drop the final line and those of `epoch` and later, which are going to be run again."""
        kept: list[bytes] = []
        if self._path.exists():
            for line in self._path.read_bytes().splitlines(keepends=True):
                try:
                    record = json.loads(line)
                except ValueError:  # a line that a kill cut short
                    continue
                if "epoch" in record and record["epoch"] <= epoch:
                    kept.append(line)
        replace_bytes(self._path, b"".join(kept))

    def append(self, record: dict[str, Any]) -> None:
        """Write one line."""
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise PbcError(cannot_write(self._path, error)) from error
        if self._writer is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "epoch":
                    self._writer.add_scalar(f"train/{name}", value, record.get("epoch", 0))
            self._writer.flush()


def _tensorboard_writer(folder: Path) -> Any:
    try:
        import tensorboard  # noqa: F401
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise PbcError(
            "--tensorboard needs tensorboard, which is not installed: "
            "pip install 'pbc[tensorboard]'"
        ) from error
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return SummaryWriter(str(folder))
