"""Records: the results of cells as lines of JSON, so that a run can go on after an interruption."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cell import Cell, Result

Key = tuple[str, str, str, int]


@dataclass(frozen=True)
class Record:
    """A cell and its result. The last record of a cell holds."""

    network: str
    strategy: str
    engine: str
    levels: int
    outcome: str
    reason: str
    trace: str
    seconds: float

    @classmethod
    def of(cls, cell: Cell, result: Result, seconds: float) -> Record:
        """The record of what a cell came to."""
        return cls(*cls.key_of(cell), **vars(result), seconds=round(seconds, 1))

    @staticmethod
    def key_of(cell: Cell) -> Key:
        """What tells a cell from the others."""
        return cell.network.name, cell.strategy, cell.engine, cell.levels

    @property
    def key(self) -> Key:
        return self.network, self.strategy, self.engine, self.levels

    @property
    def line(self) -> str:
        """The record for a person who watches."""
        cell = f"{self.network} {self.strategy} {self.engine}"
        return f"{cell}: {self.outcome} in {self.seconds:.0f} s {self.reason}".rstrip()


def read(path: Path) -> list[Record]:
    """The last record of every cell, in the order of the cells' first ones."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [Record(**json.loads(line)) for line in lines]
    return list({record.key: record for record in records}.values())


def append(path: Path, record: Record) -> None:
    """Add a record at the end of the file, which is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")
