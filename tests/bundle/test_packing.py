"""Packed files come back to the byte, or are refused in one line."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from pbc import bundle
from pbc.bundle.packing import packed, unpacked
from pbc.bundle.reader import MANIFEST, Bundle, manifest_digest
from pbc.errors import PbcError

FILE = "weights/big.safetensors"


def clustered(values: int = 16, count: int = 200_000) -> bytes:
    """A file of one tensor of so many values, and one that has as many as elements."""
    random = np.random.default_rng(0)
    book = random.normal(0, 1, values).astype(np.float32)
    tensors = {
        "weight": book[random.integers(0, values, (count // 100, 100))],
        "bias": random.normal(0, 1, 64).astype(np.float32),
    }
    return safetensors.numpy.save(tensors)


def written(path: Path, *, as_folder: bool = False) -> Bundle:
    manifest, files = tiny.contents()
    return bundle.write(path, manifest, {**files, FILE: clustered()}, as_folder=as_folder)


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_a_bundle_is_smaller_and_reads_the_same(tmp_path: Path, as_folder: bool) -> None:
    made = written(tmp_path / "m.pbc", as_folder=as_folder)
    assert made.read(FILE) == clustered()
    assert made.manifest["schema"] == 3
    assert list(made.manifest["packed"]) == [FILE]
    assert made.size_bytes(FILE) == len(clustered())
    # Sixteen values are four bits, if they are as frequent.
    assert 7.5 < made.size_bytes(FILE) / len(made.read_entry(FILE)) < 8.5
    assert made.tensors(FILE)["weight"].shape == (2000, 100)
    made.verify()


def test_a_bundle_of_other_tensors_stays_as_it_was(tmp_path: Path) -> None:
    made = tiny.write(tmp_path / "m.pbc")
    assert made.manifest["schema"] == 2
    assert "packed" not in made.manifest


@settings(max_examples=30, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["f4", "f8", "f2", "i8", "i4", "u1", "i2"]), max_size=5),
    values=st.integers(1, 300),
    zeros=st.sampled_from([0.0, 0.4, 0.9]),
    seed=st.integers(0, 2**16),
)
def test_what_is_unpacked_is_what_was_packed(
    kinds: list[str], values: int, zeros: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    tensors = {
        f"t{n}": random.integers(0, values, (n, 3000)).astype(kind) for n, kind in enumerate(kinds)
    }
    for tensor in tensors.values():
        tensor[random.random(tensor.shape) < zeros] = 0
    file = safetensors.numpy.save(tensors, {"of": "a test"})
    small = packed(file)
    if small is not None:
        assert unpacked(small, len(file)) == file
        assert len(small) < 0.8 * len(file)


@pytest.mark.parametrize(("share", "most"), [(0.5, 0.54), (0.8, 0.24)])
def test_zeros_take_a_bit_each(share: float, most: float) -> None:
    random = np.random.default_rng(0)
    weight = random.normal(0, 1, 40_000).astype(np.float32)
    weight[random.random(40_000) < share] = 0
    weight[:2] = -0.0, np.nan
    file = safetensors.numpy.save({"weight": weight, "none": np.zeros((0, 3), np.float32)})
    small = packed(file)
    assert small is not None
    assert len(small) < most * len(file)
    assert unpacked(small, len(file)) == file


def test_noise_is_not_packed() -> None:
    noise = np.random.default_rng(0).normal(0, 1, 40_000).astype(np.float32)
    assert packed(safetensors.numpy.save({"weight": noise})) is None


def broken(source: Bundle, path: Path, data: bytes, size_bytes: int) -> Bundle:
    """The bundle with another packed file, and a manifest that fits."""
    manifest, files = tiny.contents()
    plain = bundle.write(path, manifest, {**files, FILE + "x": data})
    facts = plain.manifest["files"][FILE + "x"]
    changed = {
        **plain.manifest,
        "schema": 3,
        "packed": {FILE + "x": {"sha256": facts["sha256"], "size_bytes": size_bytes}},
    }
    text = json.dumps({**changed, "digest": manifest_digest(changed)}).encode()
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**entries, MANIFEST: text}.items():
            archive.writestr(name, content)
    return Bundle.open(path)


def test_what_cannot_be_unpacked_is_refused(tmp_path: Path) -> None:
    made = written(tmp_path / "m.pbc")
    good, size = made.read_entry(FILE), len(clustered())
    empty = safetensors.numpy.save({"header": np.zeros(8, np.uint8)})
    tensors = {"weight": np.zeros(4, np.float32)}
    header = np.frombuffer(safetensors.numpy.save(tensors)[:-16], np.uint8)
    two = np.ones(8, np.uint8)  # words, for three places
    short = {"header": header, "places/weight": np.array([0xE0], np.uint8), "plain/weight": two}
    for data, claimed in (
        (b"junk" * 2000, 3000),
        (good[: len(good) // 2], size),
        (good, size - 1),
        (good, size + 1),
        (zlib.compress(b"no tensors" * 2000), 3000),
        (zlib.compress(empty), 8),
        (zlib.compress(safetensors.numpy.save(short)), len(header) + 16),
        (
            zlib.compress(safetensors.numpy.save({**short, "plain/weight": two[:7]})),
            len(header) + 16,
        ),
    ):
        source = broken(made, tmp_path / "n.pbc", data, claimed)
        with pytest.raises(PbcError, match=r"is damaged: cannot unpack .*\(.*\); compile it again"):
            source.read(FILE + "x")


def test_another_content_than_the_manifest_says(tmp_path: Path) -> None:
    made = written(tmp_path / "m.pbc")
    source = broken(made, tmp_path / "n.pbc", made.read_entry(FILE), len(clustered()))
    with pytest.raises(PbcError, match="is damaged: the sha256 of"):
        source.read(FILE + "x")


def test_a_claim_beyond_all_packing(tmp_path: Path) -> None:
    with pytest.raises(PbcError, match="at most 64 times as many are unpacked"):
        broken(written(tmp_path / "m.pbc"), tmp_path / "n.pbc", b"x", 1 << 30)
