"""The class folders are found below wrapping folders and in the parts of a split data set."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny

from pbc.data import ImageFolder, class_names, has_held_out, images
from pbc.errors import PbcError

COLOURS = ["blue", "green", "red"]


def part(root: Path, name: str, per_class: int) -> Path:
    tiny.photos(root / name, per_class)
    return root


@pytest.mark.parametrize("wrap", ["a", "a/b", "a/b/train", "train"])
def test_wrapping_folders_are_looked_through(tmp_path: Path, wrap: str) -> None:
    tiny.photos(tmp_path / "data" / wrap, 2)
    (tmp_path / "data" / "README.md").write_text("about")
    (tmp_path / "data" / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "docs" / "deep" / "paper.pdf").write_bytes(b"%PDF-")
    samples = ImageFolder.open(tmp_path / "data", tiny.SPEC)
    assert samples.classes == ("blue", "green", "red")
    assert samples.names[0] == f"{wrap}/blue/000.png"
    assert not has_held_out(tmp_path / "data")


def test_a_photo_beside_the_folder_of_classes_is_counted(tmp_path: Path) -> None:
    tiny.photos(tmp_path / "data" / "flowers", 2)
    shutil.copy(tmp_path / "data" / "flowers" / "red" / "000.png", tmp_path / "data" / "cover.png")
    samples = ImageFolder.open(tmp_path / "data", tiny.SPEC)
    assert samples.classes == ("blue", "green", "red")
    assert samples.inventory.ignored == (("cover.png", "outside class folders"),)
    assert len(images(tmp_path / "data", tiny.SPEC)) == 7


def test_one_class_is_not_a_wrapping_folder(tmp_path: Path) -> None:
    tiny.photos(tmp_path / "data", 2, classes=["red"])
    assert class_names(tmp_path / "data") == ["red"]


def test_an_empty_folder_beside_one_class_is_a_class_without_photos(tmp_path: Path) -> None:
    tiny.photos(tmp_path / "red", 2)
    (tmp_path / "yellow").mkdir()
    with pytest.raises(PbcError, match=r"class folder 'yellow' of .* has no images"):
        class_names(tmp_path)


def test_folders_in_class_folders_belong_to_the_class(tmp_path: Path) -> None:
    tiny.photos(tmp_path, 2)
    tiny.photos(tmp_path / "red" / "2024", 2, classes=["blue"])
    samples = ImageFolder.open(tmp_path, tiny.SPEC)
    assert samples.classes == ("blue", "green", "red")
    assert samples.labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize("val", ["val", "valid", "Validation", "dev", "test"])
@pytest.mark.parametrize("wrap", ["", "wrap"])
def test_a_split_data_set(tmp_path: Path, train: str, val: str, wrap: str) -> None:
    data = tmp_path / "data"
    part(part(data / wrap, train, 3), val, 2)
    assert class_names(data) == COLOURS
    trained = ImageFolder.open(data, tiny.SPEC)
    held_out = ImageFolder.open(data, tiny.SPEC, held_out=True)
    assert (len(trained), len(held_out)) == (9, 6)
    assert has_held_out(data)
    first, second = sorted((train, val))
    assert trained.inventory.lines() == [
        f"{data} has the parts {first}/, {second}/: {train}/ is read"
    ]
    assert f"{val}/ is read" in held_out.inventory.note


def test_validation_photos_come_before_test_photos(tmp_path: Path) -> None:
    part(part(part(tmp_path, "train", 3), "test", 1), "val", 2)
    assert len(ImageFolder.open(tmp_path, tiny.SPEC, held_out=True)) == 6


def test_unlabelled_test_photos_are_not_held_out(tmp_path: Path) -> None:
    part(tmp_path, "train", 3)
    (tmp_path / "test").mkdir()
    shutil.copy(tmp_path / "train" / "red" / "000.png", tmp_path / "test")
    assert class_names(tmp_path) == COLOURS
    assert not has_held_out(tmp_path)
    with pytest.raises(PbcError, match="no class folders in another part; expected them in val/"):
        ImageFolder.open(tmp_path, tiny.SPEC, held_out=True)


def test_a_held_out_part_with_other_classes_keeps_them(tmp_path: Path) -> None:
    part(tmp_path, "train", 2)
    tiny.photos(tmp_path / "val", 2, classes=["red", "blue"])
    (tmp_path / "val" / "blue").rename(tmp_path / "val" / "white")
    held_out = ImageFolder.open(tmp_path, tiny.SPEC, held_out=True)
    assert held_out.classes == ("red", "white")


def test_classes_that_are_called_train_and_test(tmp_path: Path) -> None:
    tiny.photos(tmp_path, 2, classes=["red", "blue", "green"])
    (tmp_path / "red").rename(tmp_path / "train")
    (tmp_path / "blue").rename(tmp_path / "test")
    assert class_names(tmp_path) == ["green", "test", "train"]
    assert len(ImageFolder.open(tmp_path, tiny.SPEC, held_out=True)) == 6


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training_set", "test_set"),
        ("trainset", "testset"),
        ("train2017", "val2017"),
        ("Train-Images", "Eval-Images"),
        ("train", "holdout"),
    ],
)
def test_parts_go_by_other_names_too(tmp_path: Path, train: str, test: str) -> None:
    part(part(tmp_path, train, 3), test, 2)
    assert class_names(tmp_path) == COLOURS
    assert len(ImageFolder.open(tmp_path, tiny.SPEC)) == 9
    assert len(ImageFolder.open(tmp_path, tiny.SPEC, held_out=True)) == 6


def test_parts_that_are_wrapped_in_their_own_names(tmp_path: Path) -> None:
    part(tmp_path / "seg_train", "seg_train", 3)
    part(tmp_path / "seg_test", "seg_test", 1)
    (tmp_path / "seg_pred" / "seg_pred").mkdir(parents=True)
    photo = next((tmp_path / "seg_test").rglob("*.png"))
    shutil.copy(photo, tmp_path / "seg_pred" / "seg_pred")
    assert class_names(tmp_path) == COLOURS
    assert len(ImageFolder.open(tmp_path, tiny.SPEC)) == 9


def test_a_class_may_have_such_a_word_in_its_name(tmp_path: Path) -> None:
    tiny.photos(tmp_path / "bullet_train", 1, classes=["red", "blue"])
    tiny.photos(tmp_path / "test_tube", 1, classes=["red", "green"])
    tiny.photos(tmp_path / "car", 1, classes=["red"])
    assert class_names(tmp_path) == ["bullet_train", "car", "test_tube"]


def test_what_may_be_meant_otherwise_is_said(tmp_path: Path) -> None:
    for name in ("amazon", "webcam"):
        tiny.photos(tmp_path / "shops" / name, 1)
    assert ImageFolder.open(tmp_path / "shops", tiny.SPEC).inventory.lines() == [
        "every class folder holds the folders 'blue', 'green', 'red': if these are the classes, "
        "give one of 'amazon', 'webcam' as the data"
    ]
    alike = tiny.photos(tmp_path / "alike", 1, classes=["red", "blue"])
    (alike / "blue").rename(alike / "Red ")
    assert ImageFolder.open(alike, tiny.SPEC).inventory.lines() == [
        "'Red ', 'red' are classes of their own: case or spaces tell them apart"
    ]


@pytest.mark.parametrize(
    "folders", [["images"], ["train", "val"], ["Train-Images", "Test-Images"], ["train/images"]]
)
def test_labels_in_files_are_refused(tmp_path: Path, folders: list[str]) -> None:
    """As of detection: folders of photos beside folders of text."""
    for name in folders:
        folder = tmp_path / "data" / name
        tiny.photos(tmp_path / name, 2, classes=["red"])
        folder.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "red").rename(folder)
        (folder.parent / "labels").mkdir(exist_ok=True)
        (folder.parent / "labels" / "000.txt").write_text("0 0.5 0.5 1 1")
    with pytest.raises(PbcError, match=r"photos in '.*', and no class folders; expected one folde"):
        class_names(tmp_path / "data")


def test_parts_in_each_class_folder(tmp_path: Path) -> None:
    for name in COLOURS:
        tiny.photos(tmp_path / name, 3, classes=["red", "blue"])
        (tmp_path / name / "red").rename(tmp_path / name / "train")
        (tmp_path / name / "blue").rename(tmp_path / name / "test")
    assert class_names(tmp_path) == COLOURS
    assert has_held_out(tmp_path)
    trained = ImageFolder.open(tmp_path, tiny.SPEC)
    held_out = ImageFolder.open(tmp_path, tiny.SPEC, held_out=True)
    assert (len(trained), len(held_out)) == (9, 9)
    assert trained.inventory.lines()[0].endswith("has the parts test/, train/: train/ is read")


def test_a_file_where_a_folder_is_expected(tmp_path: Path) -> None:
    photo = tiny.photos(tmp_path / "data", 1, classes=["red"]) / "red" / "000.png"
    with pytest.raises(PbcError, match="neither a folder nor a zip file"):
        class_names(photo)
    with pytest.raises(PbcError, match="has no class folders; expected one folder per class"):
        class_names(photo.parent)
