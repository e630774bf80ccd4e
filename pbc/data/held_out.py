"""Photos that training does not see, so that what it learnt can be measured."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pbc.data.layout import has_held_out
from pbc.data.samples import ImageFolder, Samples
from pbc.data.spec import InputSpec
from pbc.errors import UsageError

DEFAULT_SHARE = 0.2


def hold_out(samples: Samples, share: float, seed: int = 0) -> tuple[Samples, Samples]:
    """Split off a share of every class by the content of its photos: (the rest, the share).

    Which photos those are depends on the content of all, not on names or order. Copies of a photo
    are on one side, and a photo that is in several classes in the rest, as is at least one of every
    class: of two photos none is held out by a fifth.
    """
    owners: dict[bytes, set[int]] = defaultdict(set)
    for content, label in zip(samples.hashes, samples.labels.tolist(), strict=True):
        owners[content].add(label)
    apart: list[int] = []
    for label in range(len(samples.classes)):
        members = np.flatnonzero(samples.labels == label).tolist()
        copies = Counter(samples.hashes[index] for index in members)
        room = min(round(share * len(members)), len(members) - 1)
        chosen = set()
        for content in sorted(copies, key=lambda content: _place(content, seed)):
            if len(owners[content]) == 1 and copies[content] <= room:
                room -= copies[content]
                chosen.add(content)
        apart += [index for index in members if samples.hashes[index] in chosen]
    held = np.sort(np.array(apart, dtype=np.int64))
    rest = np.setdiff1d(np.arange(len(samples)), held)
    return samples.subset(rest), samples.subset(held)


def train_and_validation(
    data: Path | str,
    spec: InputSpec,
    val: Path | float | None = DEFAULT_SHARE,
    *,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Samples, Samples | None]:
    """Read the photos to train on, and those to measure the result on.

    val: a share to hold out of every class; a folder or zip of other photos; None to train on all.
    None in the place of the latter: no class has enough photos to hold some out.
    """
    samples = ImageFolder.open(data, spec, strict=strict, progress=progress)
    if val is None:
        return samples, None
    if isinstance(val, Path):
        other = ImageFolder.open(val, spec, held_out=True, strict=strict, progress=progress)
        return samples, other
    return held_out_of(samples, val)


def held_out_of(samples: Samples, share: float) -> tuple[Samples, Samples | None]:
    """Split off a share of every class; None where no class has enough photos for it."""
    if not 0 < share < 1:
        raise UsageError(
            f"a share of {share:g} photos to hold out; it must be more than 0, less than 1"
        )
    rest, held = hold_out(samples, share)
    return (rest, held) if len(held) else (samples, None)


def default_validation(data: Path | str) -> Path | float:
    """Return what to measure on if nobody says: the data set's own val/ part, or a fifth of it."""
    return Path(data) if has_held_out(data) else DEFAULT_SHARE


def _place(content: bytes, seed: int) -> bytes:
    return hashlib.sha256(seed.to_bytes(8, "little") + content).digest()
