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

    `train/` and `test/` inside of a folder or zip are such a pair; otherwise `test` names the test
    photos, and without it a third of each class is set apart, with a seed.
    """
    pair = _pair(data)
    if pair is not None and test is not None:
        raise PbcError(f"{data} holds train/ and test/ already; leave out --test, or name one")
    if pair is not None:
        data, test = pair
    train = ImageFolder.open(data, spec, progress=progress)
    if test is not None:
        return train, ImageFolder.open(test, spec, progress=progress), "given"
    rest, apart = split(train, 1 / 3, _SPLIT_SEED)
    return rest, apart, "a third of each class, set apart with seed 0"


def _pair(data: Path) -> tuple[Path, Path] | None:
    train, test = data / "train", data / "test"
    if {"train", "test"} != _folders(data):
        return None
    if data.is_file():
        raise PbcError(f"{data} holds train/ and test/; unpack it, or give two zip files")
    return train, test


def _folders(data: Path) -> set[str]:
    """Return the names of the top folders; empty if it is nothing that can be read."""
    if data.is_dir():
        return {path.name for path in data.iterdir() if path.is_dir() and path.name[0] != "."}
    if not zipfile.is_zipfile(data):
        return set()
    with zipfile.ZipFile(data) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist() if "/" in name}
    return {name for name in tops if not name.startswith((".", "__MACOSX"))}
