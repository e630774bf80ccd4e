"""Records of what tuning measured, a line per trial: compiling again need not measure again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pbc.errors import PbcError
from pbc.util.atomic import cannot_write, replace_bytes

ScheduleSettings = Mapping[str, Any]
"""Differences from how a schedule decides by itself, as JSON; empty for the schedule as it is."""


@dataclass(frozen=True)
class Record:
    """One trial: code made with some settings beside the code that is there without tuning.

    key: of what was tuned and for which machine. code: a hash of what the settings made of it.
    seconds, baseline: per call, with the settings and without; where the trial ended otherwise,
    failure says how, and both are 0.
    """

    key: str
    settings: ScheduleSettings
    code: str
    seconds: float
    baseline: float
    failure: str = ""

    @property
    def gain(self) -> float:
        """Speed as a multiple of that without the settings; 0 for what failed."""
        return self.baseline / self.seconds if self.seconds > 0 else 0.0


class Records:
    """The trials so far. With a file, each is on the disk before the next one begins."""

    def __init__(self, path: Path | None) -> None:
        """Read the file; what is damaged in it is counted in `damaged`, and goes."""
        self._path = path
        self._known: dict[tuple[str, str], Record] = {}
        self.damaged = 0
        if path is None or not path.is_file():
            return
        for line in path.read_bytes().splitlines():
            record = _record(line)
            if record is None:
                self.damaged += 1
            else:
                self._keep(record)
        if self.damaged:
            lines = [_line(record) for record in self._known.values()]
            replace_bytes(path, b"".join(lines), mode=0o644)

    def find(self, key: str, settings: ScheduleSettings) -> Record | None:
        return self._known.get((key, _canonical(settings)))

    def add(self, record: Record) -> None:
        self._keep(record)
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(_line(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise PbcError(cannot_write(self._path, error)) from error

    def _keep(self, record: Record) -> None:
        self._known[record.key, _canonical(record.settings)] = record


def _record(line: bytes) -> Record | None:
    """Return the record of a line; None where it is damaged."""
    try:
        record = Record(**json.loads(line))
    except (ValueError, TypeError):
        return None
    wanted: dict[str, type | tuple[type, ...]] = {
        **{field.name: str for field in fields(Record)},
        "settings": dict,
        "seconds": (int, float),
        "baseline": (int, float),
    }
    whole = all(isinstance(getattr(record, name), kind) for name, kind in wanted.items())
    return record if whole else None


def _line(record: Record) -> bytes:
    return json.dumps(asdict(record), sort_keys=True).encode() + b"\n"


def _canonical(settings: ScheduleSettings) -> str:
    return json.dumps(settings, sort_keys=True)
