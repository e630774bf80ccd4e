"""The photos of a bench: what is trained on, what is tested on, and parts of both."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pbc.data import ImageFolder, InputSpec, Samples
from pbc.errors import PbcError

_SPLIT_SEED = 0
_RAM_BYTES = 4 << 30

Progress = Callable[[int, int], None]


def subset(samples: Samples, indices: np.ndarray) -> Samples:
    """Return some of the samples, int64[n], decoded in memory; the classes stay."""
    return replace(
        samples,
        names=tuple(samples.names[index] for index in indices),
        labels=samples.labels[indices],
        hashes=tuple(samples.hashes[index] for index in indices),
        _decoded=samples.batch(indices),
    )


def first_of_each(samples: Samples, count: int, seed: int) -> Samples:
    """Return at most `count` samples of each class, drawn with a seed, in their own order."""
    random = np.random.Generator(np.random.PCG64(seed))
    chosen = [
        random.permutation(np.flatnonzero(samples.labels == label))[:count]
        for label in range(len(samples.classes))
    ]
    return subset(samples, np.sort(np.concatenate(chosen)))


def split(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """Split off a share of every class: (the rest, the share), at least one sample in each.

    A class of one sample stays in the rest.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    apart = []
    for label in range(len(samples.classes)):
        members = random.permutation(np.flatnonzero(samples.labels == label))
        count = min(max(1, round(share * len(members))), len(members) - 1)
        apart.append(members[: max(count, 0)])
    chosen = np.sort(np.concatenate(apart))
    if len(chosen) == 0:
        raise PbcError("no class has two samples to split; give the test photos with --test")
    rest = np.setdiff1d(np.arange(len(samples)), chosen)
    return subset(samples, rest), subset(samples, chosen)


def train_and_test(
    data: Path, test: Path | None, spec: InputSpec, progress: Progress
) -> tuple[Samples, Samples, str]:
    """Read the photos: (train, test, where the test photos come from).

    `train/` and `test/` inside of a folder are such a pair if class folders are in them, whatever
    lies beside them (`val/` is not read); otherwise `test` names the test
    photos, and without it a third of each class is set apart, with a seed.
    """
    pair = _pair(data)
    if pair is not None and test is not None:
        raise PbcError(f"{data} holds train/ and test/ already; leave out --test, or name one")
    if pair is not None:
        data, test = pair
    train = ImageFolder.open(data, spec, ram_bytes=_RAM_BYTES, progress=progress)
    if test is not None:
        tested = ImageFolder.open(test, spec, ram_bytes=_RAM_BYTES, progress=progress)
        return train, tested, "given"
    rest, apart = split(train, 1 / 3, _SPLIT_SEED)
    return rest, apart, "a third of each class, set apart with seed 0"


def in_memory(samples: Samples) -> bool:
    """Return whether all photos stay decoded; the others are decoded whenever they are read."""
    return len(samples._decoded) == len(samples)


def _pair(data: Path) -> tuple[Path, Path] | None:
    train, test = data / "train", data / "test"
    if not {"train", "test"} <= _folders_of_folders(data):
        return None
    if data.is_file():
        raise PbcError(f"{data} holds train/ and test/; unpack it, or give two zip files")
    return train, test


def _folders_of_folders(data: Path) -> set[str]:
    """Return the top folders that hold folders; empty if it is nothing that can be read.

    A class that is called `train` holds photos only.
    """
    if data.is_dir():
        return {path.parent.name for path in data.glob("*/[!.]*") if path.is_dir()}
    if not zipfile.is_zipfile(data):
        return set()
    with zipfile.ZipFile(data) as archive:
        return {name.partition("/")[0] for name in archive.namelist() if name.count("/") > 1}
