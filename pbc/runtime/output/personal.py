"""A personal model: a bundle and the parameters that were trained on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from pbc import plugins
from pbc.bundle import Bundle
from pbc.bundle.trust import open_trusted
from pbc.data import InputSpec, Samples
from pbc.errors import PbcError
from pbc.runtime.engines import Executable, guarded
from pbc.runtime.engines.bounds import photos_at_once
from pbc.runtime.evaluation import Evaluation, evaluate, log_softmax
from pbc.runtime.objective import Objective
from pbc.runtime.output.folder import Output
from pbc.runtime.parameters import LONGEST_CLASS, checked_theta, labelled_as, theta_size
from pbc.util import strict_json
from pbc.util.atomic import replace_bytes
from pbc.util.files import read_bytes
from pbc.util.shapes import anything, check, dict_of, integer, list_of, maybe, number, record, text

_VALUE_BYTES = 8
_HEADER_BYTES = 16 << 20
_MODEL = record(
    {
        "bundle": text(),
        "classes": list_of(text(LONGEST_CLASS), 2, 1 << 20),
        "batch": integer(1, 1 << 20),
    },
    {
        "format": integer(),
        "samples": integer(),
        "options": dict_of(anything),
        "fidelity_floor": maybe(number()),
        "metrics": dict_of(anything),
        "level": integer(0, 63),
        "levels": list_of(
            record({"level": integer(0, 63), "accuracy": number(0, 1), "sample_ms": number()}),
            most=64,
        ),
    },
    more=True,
)


@dataclass(frozen=True)
class Personal:
    """A personal model, loaded from its folder and ready."""

    bundle: Bundle
    model: dict[str, Any]
    spec: InputSpec
    executable: Executable

    @classmethod
    def open(cls, root: Path | str, *, threads: int | None = None) -> Personal:
        """Load the folder; refuses one whose training has not ended."""
        bundle, model, parameters = stored(root)
        engine = plugins.load("pbc.engines", bundle.manifest["engine"])()
        executable: Executable = guarded.load(engine, bundle, threads=threads)
        # The optimizer is never stepped; an executable takes parameters in no other way.
        executable.start(parameters, Objective())
        return cls(bundle, model, InputSpec.from_json(bundle.manifest["input"]), executable)

    @property
    def classes(self) -> list[str]:
        """Return the class names by label."""
        return list(self.model["classes"])

    @property
    def level(self) -> int:
        """Return the level that it runs at unless told otherwise."""
        return deployed_level(self.model)

    def evaluate(self, samples: Samples, *, level: int | None = None) -> Evaluation:
        """Accuracy and loss on labelled samples, which need not cover every class."""
        labelled = labelled_as(self.classes, samples)
        batch = min(self.model["batch"], photos_at_once(self.bundle.manifest))
        return evaluate(self.executable, labelled, self._checked(level), batch)

    def predict(
        self, image: np.ndarray, *, top: int = 5, level: int | None = None
    ) -> list[tuple[str, float]]:
        """Return the likeliest (class, probability) for uint8[H, W, channels], best first."""
        level = self._checked(level)
        features = self.executable.prefix(level, self.spec.normalise(image[None]))
        shares = np.exp(log_softmax(self.executable.logits(level, features))[0])
        best = np.argsort(-shares, kind="stable")[:top]
        return [(self.classes[index], float(shares[index])) for index in best]

    def _checked(self, level: int | None) -> int:
        return self.level if level is None else self.bundle.ladder.require(level)


def stored(
    root: Path | str, *, used: bool = True
) -> tuple[Bundle, dict[str, Any], dict[str, np.ndarray]]:
    """Read a personal model's bundle, model.json and trained parameters; no engine is needed.

    used: whether it is more than looked at, for which somebody has to vouch for the bundle.
    """
    output = Output(Path(root))
    if not output.model.exists():
        unfinished = output.checkpoint.exists()
        hint = "finish it with pbc train … --resume" if unfinished else "pbc train makes one"
        raise PbcError(f"{root} holds no personal model; {hint}")
    try:
        model = strict_json.load(output.model)
        check(model, _MODEL, "model.json")
    except (OSError, ValueError) as error:
        raise PbcError(f"the personal model in {root} is damaged: {error}") from error
    bundle = open_trusted(output.bundle) if used else Bundle.open(output.bundle)
    if bundle.digest != model["bundle"]:
        raise PbcError(f"{output.bundle} is not the bundle that {root} was trained on")
    classes = len(model["classes"])
    most_bytes = _HEADER_BYTES + _VALUE_BYTES * theta_size(bundle, classes)
    try:
        bundle.ladder.require(deployed_level(model))
        parameters = safetensors.numpy.load(read_bytes(output.trainable, most_bytes))
        return bundle, model, checked_theta(bundle, parameters, classes)
    except (PbcError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise PbcError(f"the personal model in {root} is damaged: {error}") from error


def deployed_level(model: Mapping[str, Any]) -> int:
    """Return the level that model.json says to run; those of earlier versions say none."""
    return int(model.get("level", 0))


def write_model(
    output: Output,
    bundle: Bundle,
    theta: Mapping[str, np.ndarray],
    *,
    classes: Sequence[str],
    batch: int,
    samples: int = 0,
    options: Mapping[str, Any] = MappingProxyType({}),
    fidelity_floor: float | None = None,
    metrics: Mapping[str, Any] = MappingProxyType({}),
    level: int = 0,
    levels: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write bundle and trained parameters, then model.json with the facts: then all is there.

    classes: names by label. batch: samples per call when it is evaluated. samples: it was trained
    on, 0 if not here. options, fidelity_floor, metrics: of the run, for whoever reads model.json.
    level: that it runs at. levels: what is known of it and others (pbc.runtime.level_trial).
    """
    output.adopt(bundle)
    replace_bytes(output.trainable, safetensors.numpy.save(dict(theta)))
    model = {
        "format": 1,
        "bundle": bundle.digest,
        "classes": list(classes),
        "samples": samples,
        "batch": batch,
        "options": dict(options),
        "fidelity_floor": fidelity_floor,
        "metrics": dict(metrics),
        "level": level,
        "levels": [dict(one) for one in levels],
    }
    replace_bytes(output.model, (json.dumps(model, indent=1) + "\n").encode())
