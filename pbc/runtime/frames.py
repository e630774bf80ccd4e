"""Blocks of a stream's frames: pixels of the network's size, labels as the bundle numbers them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from pbc.bundle import Bundle
from pbc.data import InputSpec, Samples
from pbc.data.arrays import decoded, label_index, pixels
from pbc.runtime.parameters import labelled_for

Stream = Iterable[tuple[np.ndarray, int | str]]


def blocks(bundle: Bundle, stream: Stream, classes: Sequence[str], size: int) -> Iterator[Samples]:
    """Yield a stream as sets of `size` samples; the last may be smaller.

    Raises PbcError for an image or label that is none.
    """
    spec = InputSpec.from_json(bundle.manifest["input"])
    number = {name: index for index, name in enumerate(classes)}
    pairs, first = iter(stream), 0
    while block := list(islice(pairs, size)):
        names = [f"sample {first + at}" for at in range(len(block))]
        images = np.stack(
            [pixels(image, spec, name) for (image, _), name in zip(block, names, strict=True)]
        )
        labels = [
            label_index(label, number, name) for (_, label), name in zip(block, names, strict=True)
        ]
        samples = decoded(images, np.array(labels, dtype=np.int64), classes, spec, first)
        yield labelled_for(bundle, samples)
        first += len(block)
