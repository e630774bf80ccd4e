"""Images that are in memory already, with their labels: any of the usual forms becomes Samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pbc.data.inventory import Inventory
from pbc.data.samples import Samples
from pbc.data.spec import InputSpec
from pbc.errors import PbcError

Pair = tuple[Any, Any]
"""An image and its label; see `pixels` and `numbered`."""

_CHANNELS = (1, 3)


def from_pairs(
    pairs: Iterable[Pair],
    spec: InputSpec,
    names: Sequence[str] | None = None,
    *,
    progress: Callable[[], None] | None = None,
) -> Samples:
    """Return images of any size, with labels, as samples of the network's size, all in memory.

    names: classes by label; None finds them in the labels. progress: called for every image.
    Raises PbcError for an image or a label that is none, and where there is nothing.
    """
    images: list[np.ndarray] = []
    labels: list[Any] = []
    for image, label in pairs:
        images.append(pixels(image, spec, f"sample {len(images)}"))
        labels.append(label)
        if progress is not None:
            progress()
    if not images:
        raise PbcError("the data is empty; it must have at least one (image, label)")
    return decoded(np.stack(images), *numbered(labels, names), spec)


def decoded(
    images: np.ndarray, labels: np.ndarray, classes: Sequence[str], spec: InputSpec, first: int = 0
) -> Samples:
    """Return uint8[N, H, W, 3] of the network's size as samples, which count from `first`."""
    names = tuple(f"sample {first + at}" for at in range(len(images)))
    return Samples(
        spec,
        names,
        labels,
        tuple(classes),
        tuple(hashlib.sha256(image.tobytes()).digest() for image in images),
        Inventory(read=len(names)),
        images,
        lambda name: b"",  # all are decoded
    )


def numbered(
    labels: Sequence[Any], names: Sequence[str] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return int64[N] labels, and the classes that they count in.

    A label is the name of a class or a number. `names` are classes by number; without them, and
    where all numbers are names themselves, every different label is a class, in their order.
    """
    plain = [_plain(label, f"sample {at}") for at, label in enumerate(labels)]
    known = None if names is None else {name: index for index, name in enumerate(names)}
    if known is None or (names is not None and all(str(label) in known for label in plain)):
        ordered = sorted(set(plain), key=lambda label: (isinstance(label, str), label))
        found = tuple(dict.fromkeys(map(str, ordered)))
        number = {name: index for index, name in enumerate(found)}
        return np.array([number[str(label)] for label in plain], dtype=np.int64), found
    indices = [label_index(label, known, f"sample {at}") for at, label in enumerate(plain)]
    return np.array(indices, dtype=np.int64), tuple(known)


def label_index(label: int | str, number: dict[str, int], name: str) -> int:
    """Return the index of a label in the classes; raises PbcError for one that is none."""
    if isinstance(label, str) and label in number:
        return number[label]
    if isinstance(label, int | np.integer) and 0 <= label < len(number):
        return int(label)
    raise PbcError(f"{name} has label {label!r}; expected one of {len(number)} classes")


def _plain(label: Any, name: str) -> int | str:
    """Return a label as Python's own number or text; those of numpy and torch are unwrapped."""
    value = label.item() if callable(getattr(label, "item", None)) else label
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise PbcError(f"{name} has label {value!r}; expected a class name or its number")
    return value


def pixels(image: Any, spec: InputSpec, name: str) -> np.ndarray:
    """Return uint8[H, W, 3] of the network's size for an image of any size.

    image: a PIL image, or an array or CPU tensor of [H, W], [H, W, C] or [C, H, W] with one or
    three channels: uint8, or floats in 0…1. Raises PbcError for anything else.
    """
    if isinstance(image, Image.Image):
        return spec.fitted(_rgb(image))
    values = _channels_last(np.asarray(image), name)
    if np.issubdtype(values.dtype, np.floating):
        if not (values.min() >= 0 and values.max() <= 1):
            raise PbcError(
                f"{name} has floats in {values.min():.3g}…{values.max():.3g}; expected 0…1, "
                "not normalised: pbc does that itself"
            )
        values = np.rint(values * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise PbcError(f"{name} is of {values.dtype}; expected uint8 or floats in 0…1")
    return spec.fitted(Image.fromarray(np.ascontiguousarray(values)))


def _channels_last(values: np.ndarray, name: str) -> np.ndarray:
    """Return [H, W, 3]; what has no shape of an image is refused."""
    shape = values.shape
    if values.ndim == 2:
        values = values[..., None]
    elif values.ndim == 3 and shape[2] not in _CHANNELS and shape[0] in _CHANNELS:
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or values.shape[2] not in _CHANNELS or 0 in shape:
        raise PbcError(f"{name} has shape {list(shape)}; expected [height, width, 3]")
    return np.broadcast_to(values, (*values.shape[:2], 3))


def _rgb(image: Image.Image) -> Image.Image:
    """Return a picture upright and in RGB, transparency laid on white as in files."""
    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")
