"""The trainable parameters at the start of a run: from the bundle, and a seeded head."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pbc.bundle import Bundle
from pbc.data import Samples
from pbc.errors import PbcError


def initial_parameters(bundle: Bundle, classes: int, seed: int) -> dict[str, np.ndarray]:
    """Return every trainable parameter in f32, in the manifest's order."""
    manifest = bundle.manifest
    stored = bundle.tensors(manifest["trainable"])
    head = {manifest["head"]["weight"], manifest["head"]["bias"]}
    missing = [name for name in manifest["parameters"] if name not in stored and name not in head]
    if missing:
        raise PbcError(f"{bundle.path} has no initial value for {missing[0]!r}; compile it again")
    return with_head(manifest, stored, classes, seed)


def with_head(
    manifest: Mapping[str, Any], stored: Mapping[str, np.ndarray], classes: int, seed: int
) -> dict[str, np.ndarray]:
    """Add a head to the stored parameters; all in f32, in the manifest's order.

    The head is always drawn here, uniformly from ±1/sqrt(in_features), so that a seed means the
    same for a bundle whose classes were known at compile time and for one left open.
    """
    head = manifest["head"]
    random = np.random.Generator(np.random.PCG64(seed))
    bound = 1 / math.sqrt(head["in_features"])
    theta = dict(stored)
    for name in (head["weight"], head["bias"]):
        if name is not None:
            shape = [classes if size is None else size for size in manifest["parameters"][name]]
            theta[name] = random.uniform(-bound, bound, shape)
    return {name: theta[name].astype(np.float32) for name in manifest["parameters"]}


def labelled_for(bundle: Bundle, samples: Samples) -> Samples:
    """Number the labels as the bundle does; an open head takes the classes of the data."""
    if len(samples.classes) < 2:
        raise PbcError(f"the data has one class, {samples.classes[0]!r}; two are the least")
    names, count = bundle.manifest.get("classes"), bundle.manifest.get("class_count")
    if names is not None:
        differences = _differences(set(samples.classes), _composed(names), "data", "bundle")
        if differences:
            raise PbcError(f"the classes of data and bundle differ: {differences}")
        return samples.with_classes(names)
    if count is not None and count != len(samples.classes):
        raise PbcError(f"the data has {len(samples.classes)} classes, the bundle {count}")
    return samples


def labelled_as(classes: Sequence[str], samples: Samples) -> Samples:
    """Number the labels as a trained model does; it must know every class, not meet every one."""
    unknown = sorted(set(samples.classes) - _composed(classes))
    if unknown:
        raise PbcError(f"the model knows no class {_first(unknown)}; it has {_first(classes)}")
    return samples.with_classes(classes)


def _composed(names: Iterable[str]) -> set[str]:
    """Return names in Unicode's form NFC, which those of samples are in."""
    return {unicodedata.normalize("NFC", name) for name in names}


def _differences(a: set[str], b: set[str], a_name: str, b_name: str) -> str:
    found = (
        f"only the {name} has {_first(sorted(extra))}"
        for name, extra in ((a_name, a - b), (b_name, b - a))
        if extra
    )
    return "; ".join(found)


def _first(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(repr(name) for name in names[:count]) + more
