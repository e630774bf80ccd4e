"""The checkpoint: one safetensors file that holds all a run needs to go on to the same bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from pbc.errors import PbcError
from pbc.util import strict_json
from pbc.util.atomic import replace_bytes
from pbc.util.files import opened
from pbc.util.memory import refuse_large
from pbc.util.shapes import anything, dict_of, flag, integer, number, record, text

FORMAT = 2
FACTS = record(
    {
        "bundle": text(),
        "data": text(),
        "options": dict_of(anything),
        "epoch": integer(),
        "step": integer(),
        "rounds": integer(),
        "spent_seconds": number(),
        "late": flag,
        "totals": dict_of(anything),
    },
    more=True,
)
"""Shape of the facts that a training run writes."""


@dataclass(frozen=True)
class Checkpoint:
    """Arrays by `part/name`, and the JSON-able facts beside them."""

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def part(self, part: str) -> dict[str, np.ndarray]:
        """Return the arrays of one part, without its prefix."""
        prefix = f"{part}/"
        return {
            name[len(prefix) :]: array
            for name, array in self.arrays.items()
            if name.startswith(prefix)
        }

    def save(self, path: Path) -> None:
        """Write in one step, readable by the owner only."""
        metadata = {"format": str(FORMAT), "facts": json.dumps(self.facts)}
        contiguous = {name: np.asarray(array, order="C") for name, array in self.arrays.items()}
        replace_bytes(path, safetensors.numpy.save(contiguous, metadata))

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read what `save` wrote; raises PbcError if it is damaged."""
        try:
            with opened(path) as file:  # a pipe would be waited for
                refuse_large(file)
            with safe_open(path, framework="numpy") as tensors:
                metadata = tensors.metadata() or {}
                arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            if metadata["format"] != str(FORMAT):
                raise PbcError(
                    f"{path} has checkpoint format {metadata['format']}; this pbc reads {FORMAT}: "
                    "start again with --overwrite"
                )
            facts = strict_json.loads(metadata["facts"])
            if not isinstance(facts, dict):
                raise ValueError("its facts are no object")
            return cls(facts, arrays)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise PbcError(
                f"the checkpoint {path} is damaged ({error}); start again with --overwrite"
            ) from error


def join(parts: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Name the arrays of several parts `part/name`."""
    return {
        f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()
    }


def difference(then: Mapping[str, Any], now: Mapping[str, Any], epochs: int) -> str | None:
    """Say in what the run of a checkpoint differs from the one that wants to resume it.

    Both hold `bundle` and `data` (digests) and `options` (values by name), the checkpoint's too the
    `epoch` that it is in and the `rounds` that were begun: no total of epochs bounds those.
    """
    if then["bundle"] != now["bundle"]:
        return "it was started with another bundle"
    if then["data"] != now["data"]:
        return "it was started with other photos to train on (other data, or another --val)"
    for name, value in now["options"].items():
        before = then["options"].get(name)
        if before != value:
            return f"it was started with {name} {before}, not {value}"
    if then["epoch"] > epochs and not then["rounds"]:
        return f"{then['epoch']} epochs are done already, not {epochs}"
    return None
