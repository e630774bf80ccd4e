"""Training metrics: JSON lines beside the model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pbc.errors import PbcError
from pbc.util.atomic import cannot_write, replace_bytes


class Metrics:
    """metrics.jsonl: a line per epoch and a final one, readable by the owner only."""

    def __init__(self, path: Path) -> None:
        self._path = path

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
