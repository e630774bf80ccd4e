"""Photos from wherever they are: paths, arrays, PIL, torch and Hugging Face data sets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from pbc.data import ImageFolder, Samples
from pbc.data.arrays import pixels
from pbc.data.sources import open_samples
from pbc.errors import PbcError

CLASSES = sorted(tiny.COLOURS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.photos(tmp_path_factory.mktemp("photos"), 4)


@pytest.fixture(scope="module")
def wanted(folder: Path) -> Samples:
    return ImageFolder.open(folder, tiny.SPEC)


@pytest.fixture(scope="module")
def pictures(folder: Path) -> list[Image.Image]:
    return [Image.open(path) for name in CLASSES for path in sorted((folder / name).iterdir())]


class Pictures(Dataset[Any]):
    """As torchvision's ImageFolder: PIL images, numbers, and names in `classes`."""

    classes = CLASSES

    def __init__(self, pictures: list[Image.Image]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, at: int) -> tuple[Image.Image, int]:
        if at >= len(self):
            raise IndexError(at)
        return self.pictures[at], at // 4


def same(found: Samples, wanted: Samples) -> None:
    assert found.classes == wanted.classes
    assert (found.labels == wanted.labels).all()
    everybody = np.arange(len(wanted))
    assert (found.batch(everybody) == wanted.batch(everybody)).all()


def test_a_path_and_its_text(folder: Path, wanted: Samples) -> None:
    same(open_samples(folder, tiny.SPEC), wanted)
    same(open_samples(str(folder), tiny.SPEC), wanted)
    assert open_samples(wanted, tiny.SPEC) is wanted


def test_pil_images_with_names(pictures: list[Image.Image], wanted: Samples) -> None:
    names = [CLASSES[at // 4] for at in range(12)]
    same(open_samples((pictures, names), tiny.SPEC), wanted)


@pytest.mark.parametrize("first", ["rows", "channels"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_of_any_form(
    pictures: list[Image.Image], wanted: Samples, first: str, dtype: type
) -> None:
    images = np.stack([np.asarray(picture) for picture in pictures])
    if dtype is np.float32:
        images = images.astype(np.float32) / 255
    if first == "channels":
        images = images.transpose(0, 3, 1, 2)
    labels = np.repeat(np.arange(3), 4)
    same(open_samples((images, labels), tiny.SPEC, classes=CLASSES), wanted)
    assert open_samples((images, labels), tiny.SPEC).classes == ("0", "1", "2")


def test_torch_datasets_and_loaders(pictures: list[Image.Image], wanted: Samples) -> None:
    data = Pictures(pictures)
    same(open_samples(data, tiny.SPEC), wanted)
    same(open_samples(Subset(data, list(range(12))), tiny.SPEC), wanted)
    images = torch.tensor(np.stack([np.asarray(picture) for picture in pictures]))
    images = images.permute(0, 3, 1, 2).float() / 255
    tensors = TensorDataset(images, torch.arange(12) // 4)
    same(open_samples(tensors, tiny.SPEC, classes=CLASSES), wanted)
    loader = DataLoader(tensors, batch_size=5)
    same(open_samples(loader, tiny.SPEC, classes=CLASSES), wanted)


def test_hugging_face_datasets(pictures: list[Image.Image], wanted: Samples) -> None:
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=CLASSES)}
    )
    columns = {"picture": pictures, "kind": [at // 4 for at in range(12)]}
    data = datasets.Dataset.from_dict(columns, features=features)
    same(open_samples(data, tiny.SPEC), wanted)
    parts = datasets.DatasetDict({"train": data.select(range(8)), "test": data})
    assert len(open_samples(parts, tiny.SPEC)) == 8
    assert len(open_samples(parts, tiny.SPEC, held_out=True)) == 12


def test_a_data_set_of_the_hub_by_name(
    pictures: list[Image.Image], wanted: Samples, tmp_path: Path
) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    )
    columns = {"image": pictures, "label": [at // 4 for at in range(12)]}
    data = datasets.Dataset.from_dict(columns, features=features)
    data.to_parquet(str(tmp_path / "colours" / "train-00000.parquet"))
    same(open_samples(f"hf://{tmp_path / 'colours'}", tiny.SPEC), wanted)
    with pytest.raises(PbcError, match=r"hf://nobody/nothing cannot be loaded: "):
        open_samples("hf://nobody/nothing", tiny.SPEC)


def test_photos_lie_upright_and_on_white_as_in_files() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (30, 20), (0, 0, 0, 0)).save(buffer, "png", exif=exif)
    opened = Image.open(io.BytesIO(buffer.getvalue()))
    assert (pixels(opened, tiny.SPEC, "it") == tiny.SPEC.decode(buffer.getvalue())).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (42, "cannot read photos from int; expected a path"),
        ([1, 2], "cannot read photos from list; expected a path"),
        ((np.zeros((2, 4, 4, 3), np.uint8), [1]), "there are 2 images and 1 labels"),
        ((np.zeros((0, 4, 4, 3), np.uint8), []), "the data is empty"),
        ((np.full((1, 4, 4, 3), 7.0), [1]), r"sample 0 has floats in 7…7; expected 0…1, not norm"),
        ((np.zeros((1, 4, 4, 5), np.uint8), [1]), r"sample 0 has shape \[4, 4, 5\]; expected"),
        ((np.zeros((1, 4, 4, 3), np.int64), [1]), "sample 0 is of int64; expected uint8"),
        ((np.zeros((1, 4, 4, 3), np.uint8), [[1, 0]]), r"sample 0 has label \[1, 0\]; expected a"),
    ],
)
def test_what_is_no_photo_is_refused_in_a_line(data: Any, message: str) -> None:
    with pytest.raises(PbcError, match=message):
        open_samples(data, tiny.SPEC)


def test_a_number_beyond_the_classes(pictures: list[Image.Image]) -> None:
    with pytest.raises(PbcError, match="sample 1 has label 3; expected one of 3 classes"):
        open_samples((pictures[:2], [0, 3]), tiny.SPEC, classes=CLASSES)
