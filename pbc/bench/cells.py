"""The cells of a bench: what each epoch of each rival and seed gave, kept as it comes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from pbc.bench.rival import Arrays
from pbc.errors import PbcError
from pbc.util.atomic import replace_bytes

FORMAT = 1


@dataclass(frozen=True)
class Cell:
    """One epoch of one rival and seed; epoch counts from 1, accuracy is the test set's, 0…1.

    energy_joules: None where there is no meter. marks: (seconds since the epoch began, accuracy)
    inside the epoch. last: whether the rival was done with it, however many were planned.
    """

    rival: str
    seed: int
    epoch: int
    seconds: float
    stage_seconds: dict[str, float]
    levels: tuple[int, ...]
    loss: float | None
    accuracy: float
    energy_joules: float | None = None
    marks: tuple[tuple[float, float], ...] = ()
    last: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Cell:
        marks = tuple((seconds, accuracy) for seconds, accuracy in row.get("marks", ()))
        return Cell(**{**row, "levels": tuple(row["levels"]), "marks": marks})


@dataclass(frozen=True)
class EntryProgress:
    """The cells of one rival and seed so far, the state to go on from, and the rival's facts."""

    cells: tuple[Cell, ...] = ()
    state: Arrays | None = None
    facts: Mapping[str, Any] | None = None


class Work:
    """The folder that a bench writes: `bench.json`, a state per rival and seed, `cells.jsonl`.

    A state and the cells that led to it are one file, replaced in one step, so that a kill at any
    moment leaves them agreeing. `cells.jsonl` repeats the cells, to be watched.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._log = root / "cells.jsonl"

    def begin(self, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> bool:
        """Take the folder for a bench; returns whether there is something to go on from.

        identity: all that decides the results, JSON. Raises PbcError for a folder that holds
        another bench, or one that neither `resume` nor `overwrite` was said for.
        """
        path = self.root / "bench.json"
        wanted = json.loads(json.dumps(dict(identity)))
        if path.exists() and resume:
            different = _difference(_read_json(path)["identity"], wanted)
            if different is not None:
                raise PbcError(f"cannot resume {self.root}: {different}; --overwrite starts again")
            return True
        if path.exists() and not overwrite:
            raise PbcError(
                f"{self.root} holds a bench already: --resume goes on with it, "
                "--overwrite starts again, --work names another folder"
            )
        if path.exists():
            self._discard()
        elif (self.root / "states").exists():
            raise PbcError(
                f"{self.root} holds states/ without the bench.json that says of what: "
                "remove it, or name another folder with --work"
            )
        content = {"format": FORMAT, "identity": wanted}
        replace_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
        return False

    def _discard(self) -> None:
        """Drop all states in one step, before the identity changes.

        Killed in between, the folder holds the old bench from its start, never one's states under
        the other's identity.
        """
        states, discarded = self.root / "states", self.root / "discarded"
        shutil.rmtree(discarded, ignore_errors=True)
        if states.exists():
            states.rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)
        for folder in ("runs", "bundles"):
            shutil.rmtree(self.root / folder, ignore_errors=True)
        self._log.unlink(missing_ok=True)

    def scratch(self, rival: str, seed: int) -> Path:
        """Return the folder in which one rival may write."""
        return self.root / "runs" / f"{rival}-{seed}"

    def bundle(self, strategy: str) -> Path:
        """Return where the bundle of another strategy lies, once it is compiled."""
        return self.root / "bundles" / f"{strategy}.pbc"

    def remembered(self, name: str) -> Any:
        """Return what `remember` kept under this name, or None."""
        path = self.root / "states" / f"{name}.json"
        return _read_json(path) if path.exists() else None

    def remember(self, name: str, value: Any) -> None:
        """Keep a JSON value for a resumed bench."""
        replace_bytes(self.root / "states" / f"{name}.json", json.dumps(value).encode())

    def load(self, rival: str, seed: int) -> EntryProgress:
        """Return what is known of a rival and seed."""
        path = self._state(rival, seed)
        if not path.exists():
            return EntryProgress()
        try:
            with safe_open(path, framework="numpy") as file:
                known = json.loads((file.metadata() or {})["progress"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise PbcError(f"{path} is damaged ({error}); --overwrite starts again") from error
        cells = tuple(Cell.from_json(row) for row in known["cells"])
        return EntryProgress(cells, state, known["facts"])

    def save(self, progress: EntryProgress) -> None:
        """Keep the cells of a rival and seed with the state after the last of them."""
        last = progress.cells[-1]
        known = {
            "cells": [cell.to_json() for cell in progress.cells],
            "facts": dict(progress.facts or {}),
        }
        arrays = {
            name: np.asarray(value, order="C") for name, value in (progress.state or {}).items()
        }
        data = safetensors.numpy.save(arrays, {"progress": json.dumps(known)})
        replace_bytes(self._state(last.rival, last.seed), data)
        with self._log.open("a") as log:
            log.write(json.dumps(last.to_json()) + "\n")

    def relist(self, cells: Sequence[Cell]) -> None:
        """Write `cells.jsonl` anew: a kill may have cut its last line short."""
        lines = "".join(json.dumps(cell.to_json()) + "\n" for cell in cells)
        replace_bytes(self._log, lines.encode())

    def _state(self, rival: str, seed: int) -> Path:
        return self.root / "states" / f"{rival}-{seed}.safetensors"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PbcError(f"{path} is damaged ({error}); --overwrite starts again") from error


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Say in what two benches differ first; digests are not worth showing."""
    for name in {**now, **then}:
        before, value = then.get(name), now.get(name)
        if before == value:
            continue
        if name in ("bundle", "train", "test"):
            what = {"bundle": "bundle", "train": "training data", "test": "test data"}[name]
            return f"it was started with another {what}"
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            return f"{name}: {_difference(before, value)}"
        return f"it was started with {name} {before}, not {value}"
    return None
