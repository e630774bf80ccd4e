"""The photos of a bench: what is trained on, what is tested on, and parts of both."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pbc.data import ImageFolder, InputSpec, Samples
from pbc.data.archive import is_zip
from pbc.data.held_out import hold_out
from pbc.errors import PbcError

_SPLIT_SEED = 0
_RAM_BYTES = 4 << 30


def in_memory(samples: Samples) -> Samples:
    """Return the samples decoded in memory."""
    decoded = samples.batch(np.arange(len(samples)))
    return replace(samples, _decoded=decoded, _rows=None)


def first_of_each(samples: Samples, count: int, seed: int) -> Samples:
    """Return at most `count` samples of each class, drawn with a seed, in their own order."""
    random = np.random.Generator(np.random.PCG64(seed))
    chosen = [
        random.permutation(np.flatnonzero(samples.labels == label))[:count]
        for label in range(len(samples.classes))
    ]
    return in_memory(samples.subset(np.sort(np.concatenate(chosen))))


def split(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """Split off a share of every class: (the rest, the share); see pbc.data.held_out."""
    rest, apart = hold_out(samples, share, seed)
    if len(apart) == 0:
        raise PbcError("no class has two samples to split; give the test photos with --test")
    return in_memory(rest), in_memory(apart)


def train_and_test(
    data: Path, test: Path | None, spec: InputSpec, tell: Callable[[str], None]
) -> tuple[Samples, Samples, str]:
    """Read the photos: (train, test, where the test photos come from).

    tell: takes a line for each thing that was left out or changed, and why.

    `train/` and `test/` inside of a folder are such a pair if class folders are in them, whatever
    lies beside them (`val/` is not read); otherwise `test` names the test
    photos, and without it a third of each class is set apart, with a seed.
    """
    pair = _pair(data)
    if pair is not None and test is not None:
        raise PbcError(f"{data} holds train/ and test/ already; leave out --test, or name one")
    if pair is not None:
        data, test = pair
    train = ImageFolder.open(data, spec, ram_bytes=_RAM_BYTES)
    for line in train.inventory.lines():
        tell(line)
    if test is not None:
        tested = ImageFolder.open(test, spec, ram_bytes=_RAM_BYTES)
        for line in tested.inventory.lines():
            tell(f"test photos: {line}")
        return train, tested, "given"
    rest, apart = split(train, 1 / 3, _SPLIT_SEED)
    return rest, apart, "a third of each class, set apart with seed 0"


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
    if not is_zip(data):
        return set()
    with zipfile.ZipFile(data) as archive:
        return {name.partition("/")[0] for name in archive.namelist() if name.count("/") > 1}
