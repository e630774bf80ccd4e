"""A zip file is read like its folder, whoever packed it, and no entry takes the memory."""

from __future__ import annotations

import functools
import io
import os
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from pbc.data import ImageFolder, InputSpec, class_names, images, read_image
from pbc.data.archive import is_zip, list_zip
from pbc.errors import PbcError

Rename = Callable[[str], str]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return tiny.photos(tmp_path / "photos", per_class=2)


def zipped(photos: Path, rename: Rename = str, **others: bytes) -> Path:
    """Pack the photos under other names, with files beside them."""
    path = photos.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in others.items():
            archive.writestr(name, data)
        for file in sorted(photos.rglob("*.png")):
            entry = zipfile.ZipInfo("x")
            entry.filename = rename(file.relative_to(photos).as_posix())
            archive.writestr(entry, file.read_bytes())
    return path


WRAPPED: list[Rename] = [
    lambda name: f"top/{name}",
    lambda name: f"one/two/{name}",
    lambda name: f"top\\{name}".replace("/", "\\"),
    lambda name: f"/abs//./{name}",
]
PLAIN: list[Rename] = [str, lambda name: name.replace("/", "\\"), lambda name: f"./{name}"]


@pytest.mark.parametrize("rename", [*PLAIN, *WRAPPED])
def test_a_zip_is_read_like_its_folder(photos: Path, rename: Rename) -> None:
    direct = ImageFolder.open(photos, tiny.SPEC)
    packed = ImageFolder.open(
        zipped(photos, rename, **{"README.txt": b"about"}), tiny.SPEC, ram_bytes=0
    )
    assert packed.digest() == direct.digest()
    assert (packed.decode(3) == direct.decode(3)).all()


@pytest.mark.parametrize("rename", WRAPPED)
def test_folders_without_photos_may_lie_beside_the_top_folder(photos: Path, rename: Rename) -> None:
    others = {"docs/licence.txt": b"free", "docs\\logo.svg": b"<svg/>"}
    assert class_names(zipped(photos, rename, **others)) == ["blue", "green", "red"]


@pytest.mark.parametrize("rename", PLAIN)
def test_a_folder_without_photos_beside_classes_is_named(photos: Path, rename: Rename) -> None:
    with pytest.raises(PbcError, match=r"class folder 'docs' of .* has no images"):
        class_names(zipped(photos, rename, **{"docs/licence.txt": b"free"}))


def test_folders_of_windows_are_folders(photos: Path) -> None:
    assert class_names(zipped(photos, str, **{"red\\": b""})) == ["blue", "green", "red"]


def _with_blue_as(stand_in: str, name: str) -> str:
    return name.replace("blue", stand_in)


def test_names_of_macos_and_of_the_standard(photos: Path) -> None:
    for raw in (b"cafe\xcc\x81", b"caf\x82"):  # UTF-8 that is not declared, code page 437
        stand_in = "#" * len(raw)
        path = zipped(photos, functools.partial(_with_blue_as, stand_in))
        path.write_bytes(path.read_bytes().replace(stand_in.encode(), raw))
        assert class_names(path) == ["caf\u00e9", "green", "red"]


def test_what_systems_leave_and_zips_inside_are_ignored(photos: Path) -> None:
    photo = (photos / "red" / "000.png").read_bytes()
    names = ("__MACOSX/red/._a.png", "red/@eaDir/a.png", "red/.b.png", "red/Thumbs.db", "red/c.zip")
    path = zipped(photos, str, **dict.fromkeys(names[:-1], photo), **{"red/c.zip": b"PK\5\6x"})
    samples = ImageFolder.open(path, tiny.SPEC, strict=True)
    assert len(samples) == 6
    assert {name.rstrip("/") for name, _ in samples.inventory.ignored} == {
        "__MACOSX", "red/@eaDir", "red/.b.png", "red/Thumbs.db", "red/c.zip",
    }  # fmt: skip


def test_malformed_entries_are_ignored(photos: Path) -> None:
    photo = (photos / "red" / "000.png").read_bytes()
    path = zipped(photos, str, **{"../red/a.png": photo})
    with zipfile.ZipFile(path, "a") as archive:
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("red/001.png", photo)
        archive.writestr("red/" + "/".join(["d"] * 3000), b"")
    samples = ImageFolder.open(path, tiny.SPEC)
    assert len(samples) == 6
    assert len(samples.inventory.ignored) == 3


def test_overlapping_entries_are_read_once(photos: Path) -> None:
    path = zipped(photos)
    with zipfile.ZipFile(path, "a") as archive:
        entry = archive.infolist()[0]
        for number in range(100):
            copy = zipfile.ZipInfo(f"red/copy {number}.png")
            for field in ("header_offset", "compress_size", "file_size", "CRC"):
                setattr(copy, field, getattr(entry, field))
            archive.filelist.append(copy)
        archive._didModify = True  # type: ignore[attr-defined]
    assert len(list_zip(path).photos) == 6
    assert len(ImageFolder.open(path, tiny.SPEC)) == 6


# ---- bounds --------------------------------------------------------------------------------


def test_an_entry_that_inflates_to_gigabytes_takes_no_memory(photos: Path) -> None:
    path = zipped(photos)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("red/bomb.png", "w", force_zip64=True) as entry,
    ):
        for _ in range(300):
            entry.write(bytes(1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    samples = ImageFolder.open(path, tiny.SPEC)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert len(samples) == 6
    ((name, reason),) = samples.skipped
    assert name == "red/bomb.png"
    assert "the file takes 315 MB; at most 268 MB are read" in reason


def test_an_entry_that_lies_about_its_size_is_broken(photos: Path) -> None:
    path = zipped(photos)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("red/liar.png", bytes(1 << 20))
        archive.infolist()[-1].file_size = 1000
    samples = ImageFolder.open(path, tiny.SPEC)
    assert [name for name, _ in samples.skipped] == ["red/liar.png"]


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_cannot_be_bounded_are_refused(photos: Path, method: int) -> None:
    path = zipped(photos)
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.write(photos / "red" / "000.png", "red/a.png")
    ((name, reason),) = ImageFolder.open(path, tiny.SPEC).skipped
    assert name == "red/a.png"
    assert "compressed by another method than deflate" in reason


def test_an_encrypted_entry_is_skipped(photos: Path) -> None:
    path = zipped(photos)
    data = bytearray(path.read_bytes())
    for start in (data.find(b"PK\3\4") + 6, data.find(b"PK\1\2") + 8):
        data[start] |= 1
    path.write_bytes(data)
    ((_, reason),) = ImageFolder.open(path, tiny.SPEC).skipped
    assert "encrypted" in reason


def test_many_entries_are_listed_once_each(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(20_000):
            archive.writestr(f"top/{'ab'[number % 2]}/{number}.png", b"")
    path = tmp_path / "many.zip"
    path.write_bytes(buffer.getvalue())
    assert class_names(path) == ["a", "b"]
    assert len(list_zip(path).photos) == 20_000


def test_a_zip_without_photos(tmp_path: Path) -> None:
    path = tmp_path / "empty.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("red.zip", b"PK\3\4")
    with pytest.raises(PbcError, match=r"has no class folders.*; it has 1 zip files, unpack them"):
        class_names(path)
    with pytest.raises(PbcError, match="has no images"):
        images(path, tiny.SPEC)


def test_a_pipe_or_a_device_is_neither_waited_for_nor_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        assert not is_zip(tmp_path / name)
        with pytest.raises(PbcError, match="it is no regular file"):
            read_image(tmp_path / name, InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3))
