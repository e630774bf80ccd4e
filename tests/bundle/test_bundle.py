"""A bundle is what was written, or it is refused in one line."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from pbc import bundle
from pbc.bundle.reader import MANIFEST, Bundle
from pbc.errors import PbcError


@pytest.fixture(params=[False, True], ids=["file", "folder"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    return tiny.write(tmp_path / "m.pbc", as_folder=request.param)


def edit(path: Path, changes: dict[str, bytes | None]) -> None:
    """Replace, add or (None) remove entries, without any consistency."""
    if path.is_dir():
        for name, data in changes.items():
            (path / name).unlink(missing_ok=True)
            if data is not None:
                (path / name).write_bytes(data)
        return
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**entries, **changes}.items():
            if data is not None:
                archive.writestr(name, data)


def changed_manifest(source: Bundle, **fields: Any) -> bytes:
    """The manifest with some fields changed and a digest that fits."""
    manifest = {**source.manifest, **fields}
    return json.dumps({**manifest, "digest": bundle.manifest_digest(manifest)}).encode()


def test_what_is_written_is_read(written: Bundle) -> None:
    manifest, files = tiny.contents()
    assert {key: written.manifest[key] for key in manifest} == manifest
    assert {name: written.read(name) for name in files} == files
    assert written.tensors("weights/level-0.safetensors")["conv.bias"].shape == (8,)
    assert written.json("graphs/policy.json")["inputs"] == ["view"]
    written.verify()


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = tiny.write(tmp_path / "1.pbc"), tiny.write(tmp_path / "2.pbc")
    assert one.path.read_bytes() == two.path.read_bytes()


def test_a_file_and_a_folder_share_their_digest(tmp_path: Path) -> None:
    file, folder = tiny.write(tmp_path / "1.pbc"), tiny.write(tmp_path / "2", as_folder=True)
    assert file.digest == folder.digest


def test_the_header_is_golden(tmp_path: Path) -> None:
    manifest, files = tiny.contents()
    path = bundle.write(tmp_path / "m.pbc", manifest, {**files, "a": b"hello"}).path
    data = path.read_bytes()
    # Local header of the first entry: stored, 1980-01-01, manifest.json, zip64 sizes.
    assert data[:14] == b"PK\x03\x04\x2d\x00\x00\x00\x00\x00\x00\x00\x21\x00"
    assert data[30:43] == b"manifest.json"
    facts = json.loads(zipfile.ZipFile(path).read(MANIFEST))["files"]
    digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert facts["a"] == {"sha256": digest, "size_bytes": 5}


def test_files_can_come_from_disk(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * (3 << 20))
    manifest, files = tiny.contents()
    written = bundle.write(tmp_path / "m", manifest, {**files, "big": tmp_path / "source"})
    assert written.read("big") == b"x" * (3 << 20)


def test_a_missing_bundle(tmp_path: Path) -> None:
    with pytest.raises(PbcError, match=r"no bundle at .*m\.pbc; `pbc compile"):
        Bundle.open(tmp_path / "m.pbc")


def test_a_file_that_is_no_zip(tmp_path: Path) -> None:
    (tmp_path / "m.pbc").write_bytes(b"not a zip file at all")
    with pytest.raises(PbcError, match="is not a bundle"):
        Bundle.open(tmp_path / "m.pbc")


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(PbcError, match=r"is not a bundle: it has no manifest\.json"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 100, 5000, -1])
def test_a_truncated_file(tmp_path: Path, kept: int) -> None:
    path = tiny.write(tmp_path / "m.pbc").path
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(PbcError, match="truncated"):
        Bundle.open(path)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny.write(tmp_path_factory.mktemp("bundle") / "m.pbc").path.read_bytes()


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_flipped_bit_is_refused_or_harmless(
    pristine: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, 8 * len(pristine) - 1))
    damaged = bytearray(pristine)
    damaged[at // 8] ^= 1 << at % 8
    path = tmp_path_factory.mktemp("flipped") / "m.pbc"
    path.write_bytes(damaged)
    _, files = tiny.contents()
    try:
        opened = Bundle.open(path)
        # Zip headers have bits that mean nothing (a timestamp); contents never differ.
        assert {name: opened.read(name) for name in files} == files
    except PbcError as error:
        assert "\n" not in str(error)  # noqa: PT017
    shutil.rmtree(path.parent)


def test_a_flipped_bit_in_a_file(written: Bundle) -> None:
    name = "weights/level-1.safetensors"
    data = bytearray(written.read(name))
    data[-1] ^= 1
    edit(written.path, {name: bytes(data)})
    with pytest.raises(PbcError, match=r"damaged: the sha256 of weights/level-1\.safetensors"):
        Bundle.open(written.path).verify()


def test_a_file_of_another_size(written: Bundle) -> None:
    edit(written.path, {"graphs/policy.json": b"{}"})
    with pytest.raises(PbcError, match=r"graphs/policy\.json has 2 bytes instead of \d+"):
        Bundle.open(written.path).verify()


def test_a_changed_manifest(written: Bundle) -> None:
    manifest = {**written.manifest, "model": "other"}
    edit(written.path, {MANIFEST: json.dumps(manifest).encode()})
    with pytest.raises(PbcError, match="does not match its digest"):
        Bundle.open(written.path)


def test_a_manifest_that_is_no_json(written: Bundle) -> None:
    edit(written.path, {MANIFEST: b"{"})
    with pytest.raises(PbcError, match=r"its manifest\.json is not JSON"):
        Bundle.open(written.path)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (4, r"written by a newer pbc \(schema 4; this one reads 3\): upgrade pbc"),
        (1, r"written by an older pbc \(schema 1; this one reads 2 to 3\): compile it again"),
    ],
)
def test_another_schema(written: Bundle, schema: int, expected: str) -> None:
    edit(written.path, {MANIFEST: json.dumps({"schema": schema}).encode()})
    with pytest.raises(PbcError, match=expected):
        Bundle.open(written.path)


def test_a_manifest_that_lacks_a_field(written: Bundle) -> None:
    edit(written.path, {MANIFEST: changed_manifest(written, levels=None)})
    with pytest.raises(PbcError, match="is not valid: levels is None; expected a list"):
        Bundle.open(written.path)


def test_a_missing_entry(written: Bundle) -> None:
    edit(written.path, {"graphs/policy.json": None})
    with pytest.raises(PbcError, match=r"incomplete: graphs/policy\.json is missing"):
        Bundle.open(written.path)


def test_an_entry_that_the_manifest_does_not_name(written: Bundle) -> None:
    edit(written.path, {"more": b"?"})
    with pytest.raises(PbcError, match="holds more, which its manifest does not name"):
        Bundle.open(written.path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a\\b", "C:x", "a//b", ""])
def test_an_unsafe_name(tmp_path: Path, name: str) -> None:
    source = tiny.write(tmp_path / "m.pbc")
    facts = {**source.manifest["files"], name: {"sha256": "0" * 64, "size_bytes": 0}}
    edit(source.path, {MANIFEST: changed_manifest(source, files=facts)})
    with pytest.raises(PbcError, match="unsafe file name"):
        Bundle.open(source.path)
    with pytest.raises(PbcError, match="unsafe file name"):
        bundle.write(tmp_path / "n.pbc", source.manifest, {name: b""})


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a/X.json", "a/x.json"), "'a/X.json' and 'a/x.json' are one file on some systems"),
        (("Manifest.JSON",), "'manifest.json' and 'Manifest.JSON' are one file"),
        (("d", "d/e"), "'d' is a file, and a folder of 'd/e'"),
        (("D", "d/e/f"), "'D' is a file, and a folder of 'd/e/f'"),
    ],
)
def test_names_that_no_folder_holds_together(
    tmp_path: Path, names: tuple[str, ...], said: str
) -> None:
    source = tiny.write(tmp_path / "m.pbc")
    empty = {key: {"sha256": "0" * 64, "size_bytes": 0} for key in names}
    facts = {**source.manifest["files"], **empty}
    edit(source.path, {MANIFEST: changed_manifest(source, files=facts)})
    with pytest.raises(PbcError, match=said):
        Bundle.open(source.path)


def test_an_entry_twice(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.pbc").path
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(MANIFEST, b"{}")
    with pytest.raises(PbcError, match=r"holds manifest\.json twice"):
        Bundle.open(path)


def test_a_compressed_entry(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "m.pbc")
    data = {name: source.read(name) for name in source.manifest["files"]}
    data[MANIFEST] = zipfile.ZipFile(source.path).read(MANIFEST)
    with zipfile.ZipFile(source.path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in data.items():
            archive.writestr(name, content)
    with pytest.raises(PbcError, match="the entry is compressed"):
        Bundle.open(source.path)


def test_a_tensor_file_that_is_none(tmp_path: Path) -> None:
    manifest, files = tiny.contents()
    written = bundle.write(tmp_path / "m.pbc", manifest, {**files, "t": b"junk", "u": b"\xff"})
    with pytest.raises(PbcError, match="t is not a safetensors file"):
        written.tensors("t")
    with pytest.raises(PbcError, match="u is not JSON"):
        written.json("u")
    with pytest.raises(PbcError, match="has no file v"):
        written.read("v")


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """A disk that takes 4096 bytes per file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_full_disk_leaves_the_old_bundle(
    tmp_path: Path, as_folder: bool, request: pytest.FixtureRequest
) -> None:
    old = tiny.write(tmp_path / "m.pbc", as_folder=as_folder)
    manifest, files = tiny.contents()
    files["big"] = bytes(np.random.default_rng(0).bytes(100_000))
    request.getfixturevalue("small_files_only")
    with pytest.raises(PbcError, match=r"cannot write .*: File too large; .* unchanged"):
        bundle.write(old.path, manifest, files, as_folder=as_folder)
    assert Bundle.open(old.path).digest == old.digest
    Bundle.open(old.path).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["m.pbc"]


def test_no_space_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tiny.write(tmp_path / "m.pbc")

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(PbcError, match="No space left on device"):
        tiny.write(old.path, "maps")
    assert Bundle.open(old.path).digest == old.digest
    assert [path.name for path in tmp_path.iterdir()] == ["m.pbc"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(PbcError, match="something that is no bundle is there"):
        tiny.write(tmp_path, as_folder=True)
    with pytest.raises(PbcError, match="it is a folder; give a file name"):
        tiny.write(tmp_path)
    assert (tmp_path / "photo.jpg").exists()


def test_writing_over_a_bundle(written: Bundle) -> None:
    again = tiny.write(written.path, "maps", as_folder=written.path.is_dir())
    assert Bundle.open(written.path).digest == again.digest != written.digest
