"""All that a bench found, as one value that can be written as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pbc.bench.cells import Cell
from pbc.bench.standings import Standing
from pbc.bench.sweep import Study

FORMAT = 1


@dataclass(frozen=True)
class Results:
    """Everything that a bench found.

    about: bundle, data, protocol and machine, as facts to show. ladder: the manifest's levels.
    energy: the meter's name. notes: what a reader must know to read the figures right.
    """

    about: Mapping[str, Mapping[str, Any]]
    ladder: Sequence[Mapping[str, Any]]
    standings: Sequence[Standing]
    sweeps: Sequence[Study]
    cells: Sequence[Cell]
    notes: Sequence[str]
    peak_memory_bytes: int
    energy: str

    def standing(self, rival: str) -> Standing | None:
        """Return how a rival did; None if it did not run."""
        return next((s for s in self.standings if s.rival == rival), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **{name: dict(facts) for name, facts in self.about.items()},
            "levels": [dict(level) for level in self.ladder],
            "rivals": {standing.rival: standing.to_json() for standing in self.standings},
            "sweeps": {study.name: study.to_json() for study in self.sweeps},
            "notes": list(self.notes),
            "peak_memory_bytes": self.peak_memory_bytes,
            "energy_meter": self.energy,
            "cells": [cell.to_json() for cell in self.cells],
        }
