"""Training metrics: JSON lines beside the model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pbc.errors import PbcError
from pbc.util import strict_json
from pbc.util.atomic import cannot_write, replace_bytes
from pbc.util.files import read_bytes
from pbc.util.shapes import check, dict_of, integer, list_of, maybe, number, record, text

_MOST_BYTES = 256 << 20
_EPOCH_LINE = record({"epoch": integer()}, more=True)
_REPORT_LINE = record(
    {
        "epoch": integer(),
        "loss": maybe(number()),
        "levels": list_of(integer(), 1),
        "seconds": number(0),
        "stage_seconds": dict_of(number(0)),
        "peak_memory_bytes": integer(),
    },
    {"selected": list_of(text(), most=2**16)},
    more=True,
)


class Metrics:
    """metrics.jsonl: a line per epoch and a final one, readable by the owner only."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def rewind(self, epoch: int) -> None:
        """Drop the final line and those of `epoch` and later, which are going to be run again."""
        kept: list[bytes] = []
        if self._path.exists():
            for line in self._lines():
                try:
                    facts = strict_json.loads(line)
                    check(facts, _EPOCH_LINE)
                except ValueError:  # a line that a kill cut short
                    continue
                if facts["epoch"] <= epoch:
                    kept.append(line)
        replace_bytes(self._path, b"".join(kept))

    def epochs(self) -> list[dict[str, Any]]:
        """Return the lines of epochs, as EpochReport.to_json wrote them; none without a file."""
        found = []
        for line in self._lines() if self._path.exists() else ():
            try:
                facts = strict_json.loads(line)
                check(facts, _REPORT_LINE)
            except ValueError:  # the final line, or one that a kill cut short
                continue
            found.append(facts)
        return found

    def _lines(self) -> list[bytes]:
        try:
            return read_bytes(self._path, _MOST_BYTES).splitlines(keepends=True)
        except OSError as error:
            raise PbcError(f"cannot read {self._path}: {error.strerror or error}") from error

    def append(self, record: dict[str, Any]) -> None:
        """Write one line."""
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise PbcError(cannot_write(self._path, error)) from error
