"""Blocks of a stream's frames: pixels of the network's size, labels as the bundle numbers them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from PIL import Image

from pbc.bundle import Bundle
from pbc.data import InputSpec, Inventory, Samples
from pbc.errors import PbcError
from pbc.runtime.parameters import labelled_for

Stream = Iterable[tuple[np.ndarray, int | str]]

# Of frames that are not of the network's size; files of photos follow the bundle's own rule.
_RESIZING = Image.Resampling.BILINEAR


def blocks(bundle: Bundle, stream: Stream, classes: Sequence[str], size: int) -> Iterator[Samples]:
    """Yield a stream as sets of `size` samples; the last may be smaller.

    Raises PbcError for an image or label that is none.
    """
    spec = InputSpec.from_json(bundle.manifest["input"])
    number = {name: index for index, name in enumerate(classes)}
    pairs, first = iter(stream), 0
    while block := list(islice(pairs, size)):
        names = tuple(f"sample {first + at}" for at in range(len(block)))
        images = np.stack(
            [_image(image, spec, name) for (image, _), name in zip(block, names, strict=True)]
        )
        labels = [
            _label(label, number, name) for (_, label), name in zip(block, names, strict=True)
        ]
        yield labelled_for(
            bundle,
            Samples(
                spec,
                names,
                np.array(labels, dtype=np.int64),
                tuple(classes),
                tuple(hashlib.sha256(image.tobytes()).digest() for image in images),
                Inventory(read=len(names)),
                images,
                lambda name: b"",  # all are decoded
            ),
        )
        first += len(block)


def _image(image: np.ndarray, spec: InputSpec, name: str) -> np.ndarray:
    """Return uint8 of the network's size."""
    values = np.asarray(image)
    if values.ndim != 3 or values.shape[2] != 3 or 0 in values.shape:
        raise PbcError(f"{name} has shape {list(values.shape)}; expected [height, width, 3]")
    if np.issubdtype(values.dtype, np.floating):
        if not (values.min() >= 0 and values.max() <= 1):
            raise PbcError(
                f"{name} has floats in {values.min():.3g}…{values.max():.3g}; expected 0…1"
            )
        values = np.rint(values * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise PbcError(f"{name} is of {values.dtype}; expected uint8 or floats in 0…1")
    _, height, width = spec.shape
    if values.shape[:2] == (height, width):
        return values
    return np.asarray(Image.fromarray(values).resize((width, height), _RESIZING))


def _label(label: int | str, number: dict[str, int], name: str) -> int:
    """Return the index of a label in the classes."""
    if isinstance(label, str) and label in number:
        return number[label]
    if isinstance(label, int | np.integer) and 0 <= label < len(number):
        return int(label)
    raise PbcError(f"{name} has label {label!r}; expected one of {len(number)} classes")
