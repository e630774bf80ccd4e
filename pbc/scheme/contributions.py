"""Contributions: what training a layer, or the last biases, is worth; as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pbc.errors import PbcError
from pbc.scheme.scheme import FRACTIONS
from pbc.util import strict_json
from pbc.util.atomic import replace_bytes
from pbc.util.shapes import ShapeError, check, dict_of, maybe, number, one_of, record, text

ACCURACY, FISHER = "accuracy", "fisher"

_SETTING = maybe(text())
_FILE = record(
    {
        "measure": one_of(ACCURACY, FISHER),
        "settings": dict_of(_SETTING),
        "baseline": maybe(number()),
        "layers": dict_of(dict_of(number(), key=one_of(*map(str, FRACTIONS)))),
        "biases": dict_of(number()),
    }
)


@dataclass(frozen=True)
class Contributions:
    """What is gained over training the head alone.

    measure: `accuracy`, points on held-out photos, or `fisher`, a score that ranks and no more.
    settings: what they depend on, as words. baseline: accuracy in per cent of the head alone.
    layers: by layer and share of its weight. biases: of the last k layers, by k.
    """

    measure: str
    settings: Mapping[str, str | None]
    baseline: float | None
    layers: Mapping[str, Mapping[Fraction, float]]
    biases: Mapping[int, float]

    @classmethod
    def open(cls, path: Path) -> Contributions:
        """Read a file; raises PbcError where it is none."""
        try:
            found = strict_json.load(path)
            check(found, _FILE, "it")
            biases = {int(count): value for count, value in found["biases"].items()}
        except OSError as error:
            raise PbcError(f"{path}: {error.strerror or error}") from error
        except (ShapeError, ValueError) as error:
            raise PbcError(f"{path} holds no contributions of `pbc analyze`: {error}") from error
        layers = {
            name: {Fraction(share): value for share, value in shares.items()}
            for name, shares in found["layers"].items()
        }
        return cls(found["measure"], found["settings"], found["baseline"], layers, biases)

    def save(self, path: Path) -> None:
        """Write the file in one step."""
        replace_bytes(path, (json.dumps(self.to_json(), indent=1) + "\n").encode(), mode=0o644)

    def to_json(self) -> dict[str, Any]:
        return {
            "measure": self.measure,
            "settings": dict(self.settings),
            "baseline": self.baseline,
            "layers": {
                name: {str(share): value for share, value in shares.items()}
                for name, shares in self.layers.items()
            },
            "biases": {str(count): value for count, value in self.biases.items()},
        }
