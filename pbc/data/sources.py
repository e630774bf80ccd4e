"""Whatever photos are in becomes Samples: a path, arrays, or a data set of another library.

Other libraries' data sets are known by the names of their classes' modules, so that nothing is
imported to look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pbc.data.arrays import Pair, from_pairs
from pbc.data.samples import ImageFolder, Samples
from pbc.data.spec import InputSpec
from pbc.errors import PbcError, suggest
from pbc.util.extras import missing

HUB = "hf://"
_IMAGES = ("image", "img", "images", "pixel_values", "photo", "x")
_LABELS = ("label", "labels", "fine_label", "target", "class", "y")
_TRAIN = ("train", "training")
_HELD_OUT = ("validation", "val", "valid", "dev", "test")


def open_samples(
    data: Any,
    spec: InputSpec,
    *,
    held_out: bool = False,
    classes: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Read and decode labelled photos.

    data: a folder of class folders or a zip of one; (images, labels), the images as arrays or as
    PIL's; a torch Dataset or DataLoader of (image, label); a Hugging Face Dataset, or `hf://NAME`
    of one (`hf://NAME:CONFIG` where it has several). Of data in parts the part to train on is read
    or, if `held_out`, the other one. classes: names by number, where the data has numbers only.
    Raises PbcError for what is none of these. All but files are kept in memory at the network's
    size, H x W x 3 bytes each.
    """
    if isinstance(data, Samples):
        return data
    if is_hub(data):
        data = _from_hub(data.removeprefix(HUB))
    if isinstance(data, str | Path):
        return ImageFolder.open(data, spec, held_out=held_out, progress=progress)
    if _is(data, "datasets") and isinstance(data, dict):
        data = _part(data, _HELD_OUT if held_out else _TRAIN)
    total, pairs, names = _pairs(data)
    if names is None:
        names = classes
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        if progress is not None and (done % 64 == 0 or done == total):
            progress(done, total)

    return from_pairs(pairs, spec, names, progress=one_more)


def is_hub(data: Any) -> bool:
    """Whether this is the name of a data set of the Hugging Face hub."""
    return isinstance(data, str) and data.startswith(HUB)


def _pairs(data: Any) -> tuple[int, Iterator[Pair], Sequence[str] | None]:
    """Return how many samples there are, their images and labels, and the classes if known."""
    if isinstance(data, tuple) and len(data) == 2:
        return _arrays(*data)
    if _is(data, "datasets") and hasattr(data, "features"):
        return _hugging_face(data)
    if _is(data, "torch.utils.data") and hasattr(data, "batch_size"):
        return len(data.dataset), _loaded(data), _class_names(data.dataset)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, list):
        return len(data), (_pair(data[at]) for at in range(len(data))), _class_names(data)
    raise PbcError(
        f"cannot read photos from {type(data).__name__}; expected a path, (images, labels), "
        "a torch Dataset or DataLoader, or a Hugging Face Dataset"
    )


def _is(data: Any, module: str) -> bool:
    return any(f"{base.__module__}.".startswith(f"{module}.") for base in type(data).__mro__)


def _arrays(images: Any, labels: Any) -> tuple[int, Iterator[Pair], None]:
    if len(images) != len(labels):
        raise PbcError(f"there are {len(images)} images and {len(labels)} labels; expected as many")
    return len(images), zip(images, labels, strict=True), None


# ---- torch ---------------------------------------------------------------------------------


def _loaded(loader: Any) -> Iterator[Pair]:
    for batch in loader:
        images, labels = _pair(batch)
        yield from zip(images, labels, strict=True)


def _pair(item: Any) -> Pair:
    """Return image and label of what a data set yields: a tuple, or a dict by the usual names."""
    if isinstance(item, dict):
        return item[_column(item, _IMAGES)], item[_column(item, _LABELS)]
    if isinstance(item, tuple | list) and len(item) >= 2:
        return item[0], item[1]
    raise PbcError(f"the data set yields {type(item).__name__}; expected (image, label)")


def _class_names(data: Any) -> Sequence[str] | None:
    """Return the classes of a torch data set, or of what it is a subset of; None if unknown."""
    while data is not None:
        names = getattr(data, "classes", None)
        if names is not None:
            return [str(name) for name in names]
        data = getattr(data, "dataset", None)
    return None


# ---- Hugging Face --------------------------------------------------------------------------


def _from_hub(name: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        needs = missing(error) or str(error)
        raise PbcError(f"{HUB}{name} needs {needs}") from error
    path, _, config = name.partition(":")
    try:
        return datasets.load_dataset(path, config or None)
    except Exception as error:  # it raises nearly anything for a name that is none
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise PbcError(f"{HUB}{name} cannot be loaded: {lines[0]}") from error


def _part(parts: Any, order: Sequence[str]) -> Any:
    for name in order:
        if name in parts:
            return parts[name]
    raise PbcError(f"the data set has the parts {', '.join(parts)}; expected one of {order[0]!r}")


def _hugging_face(data: Any) -> tuple[int, Iterator[Pair], Sequence[str] | None]:
    kinds = {name: type(feature).__name__ for name, feature in data.features.items()}
    image = _first_of(kinds, "Image") or _column(kinds, _IMAGES)
    label = _first_of(kinds, "ClassLabel") or _column(kinds, _LABELS)
    names = getattr(data.features[label], "names", None)
    rows = ((row[image], row[label]) for row in data)
    return len(data), ((_array(value), answer) for value, answer in rows), names


def _array(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, list) else value


def _first_of(kinds: dict[str, str], kind: str) -> str | None:
    return next((name for name, known in kinds.items() if known == kind), None)


def _column(columns: Any, known: Sequence[str]) -> str:
    """Return the column with the first of the usual names that is there."""
    for name in known:
        if name in columns:
            return name
    raise PbcError(suggest("column", known[0], columns))
