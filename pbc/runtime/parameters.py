"""The trainable parameters at the start of a run: from the bundle, and a seeded head."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pbc.bundle import Bundle
from pbc.bundle.shape import MOST_HEAD_VALUES
from pbc.data import Samples
from pbc.errors import PbcError
from pbc.runtime.engines.bounds import SAMPLES

LONGEST_CLASS = 1024
"""Characters of a class name."""

_DRAWN_AT_ONCE = 1 << 18
_REAL = "fiu"  # kinds of numpy's types


def initial_parameters(bundle: Bundle, classes: int, seed: int) -> dict[str, np.ndarray]:
    """Return every trainable parameter in f32, in the manifest's order."""
    manifest = bundle.manifest
    stored = bundle.tensors(manifest["trainable"])
    head = manifest["head"]
    for name, sizes in manifest["parameters"].items():
        if name not in head and (name not in stored or list(stored[name].shape) != sizes):
            raise PbcError(f"{bundle.path} has no initial value for {name!r}; compile it again")
    return with_head(manifest, stored, classes, seed)


def with_head(
    manifest: Mapping[str, Any], stored: Mapping[str, np.ndarray], classes: int, seed: int
) -> dict[str, np.ndarray]:
    """Add a head to the stored parameters; all in f32, in the manifest's order.

    The head is always drawn here, each parameter uniformly from ±1/sqrt(width of its layer), so
    that a seed means the same for a bundle whose classes were known at compile time and for one
    left open. Weights come before biases, whatever the order in the manifest.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    theta = dict(stored)
    shapes = parameter_shapes(manifest, classes)
    for name in sorted(manifest["head"], key=lambda name: (-len(shapes[name]), name)):
        bound = 1 / math.sqrt(manifest["head"][name])
        theta[name] = _drawn(random, bound, shapes[name])
    return {name: theta[name].astype(np.float32, copy=False) for name in manifest["parameters"]}


def _drawn(random: np.random.Generator, bound: float, shape: tuple[int, ...]) -> np.ndarray:
    """Draw f64 values by f64 values, of which only the f32 take memory."""
    drawn = np.empty(math.prod(shape), np.float32)
    for start in range(0, drawn.size, _DRAWN_AT_ONCE):
        part = drawn[start : start + _DRAWN_AT_ONCE]
        part[...] = random.uniform(-bound, bound, part.size)
    return drawn.reshape(shape)


def parameter_shapes(manifest: Mapping[str, Any], classes: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the trainable parameters, with a head of `classes`.

    Raises PbcError for a larger head than any device holds.
    """
    shapes = {
        name: tuple(classes if size is None else size for size in sizes)
        for name, sizes in manifest["parameters"].items()
    }
    for name in manifest["head"]:
        if math.prod(shapes[name]) > MOST_HEAD_VALUES:
            raise PbcError(
                f"the head's {name[:60]!r} would have {math.prod(shapes[name])} values for "
                f"{classes} classes; at most {MOST_HEAD_VALUES} are held"
            )
    return shapes


def body_inputs(bundle: Bundle, classes: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all that a body reads, for as many samples as bounds are for."""
    features = {name: (SAMPLES, *sizes) for name, sizes in bundle.manifest["features"].items()}
    return {**features, **parameter_shapes(bundle.manifest, classes)}


def theta_size(bundle: Bundle, classes: int) -> int:
    """Return how many values the trainable parameters have, with a head of `classes`."""
    return sum(map(math.prod, parameter_shapes(bundle.manifest, classes).values()))


def checked_theta(
    bundle: Bundle, theta: Mapping[str, np.ndarray], classes: int
) -> dict[str, np.ndarray]:
    """Return trainable parameters in f32 and in the manifest's order, for a head of `classes`.

    Raises PbcError where names or shapes are not the bundle's, or a value is not finite.
    """
    parameters = bundle.manifest["parameters"]
    differences = _differences(set(theta), set(parameters), "parameters given", "bundle")
    if differences:
        raise PbcError(f"the parameters are not the bundle's: {differences}")
    checked = {}
    for name, sizes in parameters.items():
        shape = tuple(classes if size is None else size for size in sizes)
        value = np.asarray(theta[name])
        if value.shape != shape:
            raise PbcError(
                f"the parameter {name!r} has shape {list(value.shape)}; expected {list(shape)}"
            )
        if value.dtype.kind not in _REAL:
            raise PbcError(f"the parameter {name!r} is {value.dtype}; expected numbers")
        if not np.isfinite(value).all():
            raise PbcError(f"the parameter {name!r} is not finite; nothing can be learnt from it")
        checked[name] = value.astype(np.float32)
    return checked


def labelled_for(bundle: Bundle, samples: Samples, classes: Sequence[str] | None = None) -> Samples:
    """Number the labels as the bundle does; an open head takes the classes of the data.

    classes: all classes of the task, where these samples are a part of its data that need not have
    every class. Raises PbcError for classes that the bundle, or `classes`, does not know.
    """
    names = numbered_classes(bundle, samples.classes if classes is None else classes)
    return labelled_as(names, samples)


def numbered_classes(bundle: Bundle, classes: Sequence[str]) -> tuple[str, ...]:
    """Return class names by label: in the bundle's order if they are its own, else as given.

    Raises PbcError for fewer than two, for a name that no model is kept with, and for another
    number than a bundle's graphs are bound to.
    """
    if len(set(classes)) != len(classes):
        raise PbcError(f"a class is named twice among {_first(classes)}")
    if len(classes) < 2:
        raise PbcError(f"the data has one class, {_first(classes)}; two are the least")
    longest = max(classes, key=len)
    if len(longest) > LONGEST_CLASS:
        raise PbcError(
            f"the class {longest[:60]!r}… has a name of {len(longest)} characters; "
            f"{LONGEST_CLASS} are the most"
        )
    names, count = bundle.manifest.get("classes"), bundle.manifest.get("class_count")
    if names is not None and _composed(classes) == _composed(names):
        return tuple(names)
    if count is not None and count != len(classes):
        raise PbcError(
            f"the data has {len(classes)} classes, and this network's head could be compiled for "
            f"{count} alone; compile it again with --data that has those of the photos"
        )
    return tuple(classes)


def other_classes(bundle: Bundle, classes: Sequence[str]) -> str | None:
    """Say that these classes are not those that the bundle was compiled with; None if they are."""
    names = bundle.manifest.get("classes")
    if names is None or _composed(classes) == _composed(names):
        return None
    differences = _differences(_composed(classes), _composed(names), "data", "bundle")
    return f"the head is sized for the {len(classes)} classes of the data: {differences}"


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
