"""Every file below a folder counts once, where it lies; the rest is ignored with a reason."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import tiny

from pbc.data import ImageFolder, images
from pbc.data.folder import list_folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return tiny.photos(tmp_path / "photos", per_class=2)


def counts(path: Path) -> dict[str, int]:
    samples = ImageFolder.open(path, tiny.SPEC)
    return {name: int((samples.labels == at).sum()) for at, name in enumerate(samples.classes)}


def ignored(path: Path) -> dict[str, str]:
    return dict(list_folder(path).ignored)


ALL = {"blue": 2, "green": 2, "red": 2}


# ---- links ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "/", "../red", "../blue"])
def test_links_that_lead_round_add_nothing(photos: Path, target: str) -> None:
    (photos / "blue" / "again").symlink_to(target)
    (photos / "red" / "and again").symlink_to(target)
    assert counts(photos) == ALL
    assert ignored(photos) == {
        "blue/again": "a link to what is read elsewhere",
        "red/and again": "a link to what is read elsewhere",
    }


def test_links_to_each_other_end(photos: Path) -> None:
    (photos / "blue" / "a").symlink_to("b")
    (photos / "blue" / "b").symlink_to("a")
    (photos / "blue" / "c.png").symlink_to("c.png")
    samples = ImageFolder.open(photos, tiny.SPEC)
    assert len(samples) == 6
    assert [name for name, _ in samples.skipped] == ["blue/c.png"]


def test_two_links_that_multiply_paths_end(photos: Path) -> None:
    for name in ("l1", "l2", "l3"):
        (photos / "red" / name).symlink_to("..")
    assert counts(photos) == ALL


def test_photos_linked_from_elsewhere_are_read(photos: Path, tmp_path: Path) -> None:
    elsewhere = tiny.photos(tmp_path / "elsewhere", per_class=3)
    shutil.rmtree(photos / "red")
    (photos / "red").symlink_to(elsewhere / "red")
    (photos / "blue" / "more.png").symlink_to(elsewhere / "blue" / "000.png")
    (photos / "green" / "more").symlink_to(elsewhere / "green")
    assert counts(photos) == {"blue": 3, "green": 5, "red": 3}


def test_a_class_folder_that_links_to_another_is_not_a_class(photos: Path) -> None:
    (photos / "azure").symlink_to("blue")  # comes first by name, and counts last
    assert counts(photos) == ALL
    assert ignored(photos) == {"azure": "a link to what is read elsewhere"}


def test_a_photo_linked_into_another_class_counts_where_it_lies(photos: Path) -> None:
    (photos / "blue" / "0.png").symlink_to("../red/000.png")
    os.link(photos / "red" / "001.png", photos / "red" / "hard link.png")
    assert counts(photos) == ALL
    assert set(ignored(photos)) == {"blue/0.png", "red/hard link.png"}


def test_a_root_that_is_a_link_is_read(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(photos)
    assert counts(tmp_path / "link") == ALL


# ---- what is no photo ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "@eaDir", "#recycle", "#snapshot", ".@__thumb", "@Recycle", ".thumbnails", "__MACOSX",
        "$RECYCLE.BIN", "System Volume Information", "lost+found", "LOST.DIR", ".git",
        "Previews.lrdata", "FOUND.000",
    ],
)  # fmt: skip
def test_folders_of_systems_are_neither_classes_nor_photos(photos: Path, name: str) -> None:
    shutil.copytree(photos / "red", photos / name)
    shutil.copytree(photos / "red", photos / "red" / name)
    assert counts(photos) == ALL
    assert set(ignored(photos)) == {f"{name}/", f"red/{name}/"}
    assert len(images(photos, tiny.SPEC)) == 6


@pytest.mark.parametrize("name", ["Thumbs.db", ".DS_Store", "._000.png", "desktop.ini", "a.txt"])
def test_files_of_systems_are_no_photos(photos: Path, name: str) -> None:
    (photos / "red" / name).write_bytes(b"anything")
    (photos / name).write_bytes(b"anything")
    samples = ImageFolder.open(photos, tiny.SPEC, strict=True)
    assert len(samples) == 6
    assert {file for file, _ in samples.inventory.ignored} == {name, f"red/{name}"}


def test_a_pipe_is_no_photo(photos: Path) -> None:
    os.mkfifo(photos / "red" / "camera.png")
    assert counts(photos) == ALL
    assert ignored(photos) == {"red/camera.png": "no regular file"}


def test_content_decides_and_not_the_suffix(photos: Path) -> None:
    photo = photos / "red" / "000.png"
    for name in ("a.jfif", "b.JPE", "c.xyz", "d", "e.PNG", "f.txt", "g.jpg"):
        shutil.copy(photo, photos / "red" / name)
    (photos / "red" / "h").write_bytes(b"no photo")
    (photos / "red" / "i.mov").write_bytes(b"\0\0\0\x14ftypqt  " + bytes(40))
    (photos / "red" / "j.zip").write_bytes(b"PK\x03\x04" + bytes(40))
    assert counts(photos) == {**ALL, "red": 9}
    assert ignored(photos) == {
        "red/h": "no photo",
        "red/i.mov": "video, no photo",
        "red/j.zip": "zip, no photo",
    }


# ---- names ---------------------------------------------------------------------------------


def test_composed_and_decomposed_names_are_one_class(photos: Path) -> None:
    (photos / "red").rename(photos / "caf\u00e9")
    (photos / "blue").rename(photos / "cafe\u0301")
    samples = ImageFolder.open(photos, tiny.SPEC)
    assert samples.classes == ("caf\u00e9", "green")
    assert len(samples) == 6
    # Files of one name in both stay apart, and are read from where each lies.
    assert len(set(samples.names)) == 6
    assert len(set(samples.hashes)) == 6
    again = ImageFolder.open(photos, tiny.SPEC, ram_bytes=0)
    assert (again.decode(0) != again.decode(2)).any()
    assert (again.decode(2) == samples.decode(2)).all()


def test_names_that_are_no_utf_8_are_spelled_out(photos: Path) -> None:
    (photos / "red").rename(photos / os.fsdecode(b"caf\xe9"))
    (photos / "blue" / "000.png").rename(photos / "blue" / os.fsdecode(b"\xff.png"))
    samples = ImageFolder.open(photos, tiny.SPEC)
    assert samples.classes == ("blue", r"caf\xe9", "green")
    assert r"blue/\xff.png" in samples.names
    assert len(samples) == 6


def test_names_with_spaces_newlines_and_brackets(photos: Path) -> None:
    (photos / "red").rename(photos / "a\nb [red] ")
    (photos / "blue" / "000.png").rename(photos / "blue" / "\x1b[31m.png")
    samples = ImageFolder.open(photos, tiny.SPEC, ram_bytes=0)
    assert samples.classes == ("a\nb [red] ", "blue", "green")
    assert len(samples) == len({samples.decode(at).tobytes() for at in range(6)}) == 6
    (photos / "blue" / "\x1b[31m.png").write_bytes(b"?")
    (line,) = ImageFolder.open(photos, tiny.SPEC).inventory.lines()
    assert r"blue/\x1b[31m.png" in line
    assert line.isprintable()


# ---- ends ----------------------------------------------------------------------------------


def test_folders_nest_to_a_bound(photos: Path) -> None:
    deep = photos / "red"
    for _ in range(70):
        deep /= "d"
    deep.mkdir(parents=True)
    shutil.copy(photos / "red" / "000.png", deep)
    shutil.copy(photos / "red" / "000.png", deep.parents[60])
    assert counts(photos) == {**ALL, "red": 3}
    assert list(ignored(photos).values()) == ["below more than 64 folders"]


def test_a_folder_that_cannot_be_opened_is_skipped(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterdir = Path.iterdir

    def refusing(path: Path) -> object:
        if path.name == "private":
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    (photos / "red" / "private").mkdir()
    monkeypatch.setattr(Path, "iterdir", refusing)  # root may read any folder
    samples = ImageFolder.open(photos, tiny.SPEC)
    assert samples.skipped == (("red/private", "Permission denied"),)
