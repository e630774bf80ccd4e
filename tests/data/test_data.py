"""Photos become the same arrays everywhere, and what is wrong with them is said."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from pbc import data
from pbc.data import BrokenImageError, ImageFolder, InputSpec, pooled_view, read_image
from pbc.errors import PbcError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.photos(tmp_path / "photos", per_class=4)


def zipped(folder: Path, top: str = "", *, directories: bool = False) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file() or directories:
                archive.write(file, f"{top}{file.relative_to(folder)}")
        archive.writestr(f"{top}__MACOSX/x.png", b"")
        archive.writestr(f"{top}.DS_Store", b"")
    return path


def encoded(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **{"format": "png", **options})  # type: ignore[arg-type]
    return buffer.getvalue()


def test_a_folder_of_class_folders(folder: Path) -> None:
    samples = ImageFolder.open(folder, tiny.SPEC)
    assert samples.classes == ("blue", "green", "red")
    assert samples.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert samples.names[0] == "blue/000.png"
    assert samples.batch(np.array([0, 5])).shape == (2, 16, 16, 3)
    assert samples.batch(np.array([0, 5]))[1].tolist() == samples.decode(5).tolist()
    assert len(set(samples.hashes)) == 12
    assert data.class_names(folder) == ["blue", "green", "red"]


@pytest.mark.parametrize("top", ["", "photos/"])
def test_a_zip_is_read_like_its_folder(folder: Path, top: str) -> None:
    direct = ImageFolder.open(folder, tiny.SPEC)
    packed = ImageFolder.open(zipped(folder, top, directories=True), tiny.SPEC)
    assert packed.names == direct.names
    assert packed.digest() == direct.digest()
    everything = np.arange(len(direct))
    assert (packed.batch(everything) == direct.batch(everything)).all()


def test_what_does_not_fit_in_memory_is_decoded_again(folder: Path) -> None:
    everything = np.arange(12)
    full = ImageFolder.open(folder, tiny.SPEC).batch(everything)
    for ram_bytes in (0, 16 * 16 * 3 * 5):
        samples = ImageFolder.open(folder, tiny.SPEC, ram_bytes=ram_bytes)
        assert (samples.batch(everything) == full).all()
        assert (samples.batch(np.array([1, 0])) == full[[1, 0]]).all()


def test_a_photo_that_goes_away_is_named(folder: Path) -> None:
    samples = ImageFolder.open(folder, tiny.SPEC, ram_bytes=0)
    (folder / "red" / "001.png").unlink()
    with pytest.raises(PbcError, match=r"red/001\.png was readable and no longer is"):
        samples.batch(np.arange(12))


def test_broken_images_are_named_and_skipped(folder: Path) -> None:
    whole = (folder / "red" / "002.png").read_bytes()
    (folder / "red" / "002.png").write_bytes(whole[: len(whole) // 2])
    (folder / "blue" / "000.png").write_bytes(b"")
    samples = ImageFolder.open(folder, tiny.SPEC)
    assert [name for name, _ in samples.skipped] == ["blue/000.png", "red/002.png"]
    assert len(samples) == 10
    with pytest.raises(PbcError, match=r"blue/000\.png of .* is broken"):
        ImageFolder.open(folder, tiny.SPEC, strict=True)


def test_a_class_with_nothing_but_broken_images(folder: Path) -> None:
    for file in (folder / "green").iterdir():
        file.write_bytes(b"?")
    with pytest.raises(PbcError, match=r"class folder 'green' of .* has no readable image"):
        ImageFolder.open(folder, tiny.SPEC)


def test_an_empty_class_folder(folder: Path) -> None:
    (folder / "yellow").mkdir()
    with pytest.raises(PbcError, match=r"class folder 'yellow' of .* has no images"):
        ImageFolder.open(folder, tiny.SPEC)
    with pytest.raises(PbcError, match=r"class folder 'yellow' of .* has no images"):
        data.class_names(zipped(folder, directories=True))


def test_no_class_folders(tmp_path: Path) -> None:
    with pytest.raises(PbcError, match="has no class folders; expected one folder per class"):
        ImageFolder.open(tmp_path, tiny.SPEC)


def test_no_images_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("no photo")
    with pytest.raises(PbcError, match="has no images in its 1 class folders"):
        ImageFolder.open(tmp_path, tiny.SPEC)
    with pytest.raises(PbcError, match="has no images"):
        data.images(tmp_path, tiny.SPEC)


def test_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(PbcError, match=r"no data at .*nowhere; give a folder or a zip file"):
        ImageFolder.open(tmp_path / "nowhere", tiny.SPEC)


def test_a_file_that_is_no_zip(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(b"hello")
    with pytest.raises(PbcError, match="neither a folder nor a zip file of images"):
        ImageFolder.open(tmp_path / "photos.zip", tiny.SPEC)


def test_unlabelled_images_are_found_at_any_depth(folder: Path) -> None:
    samples = data.images(folder, tiny.SPEC)
    assert len(samples) == 12
    assert set(samples.labels.tolist()) == {data.UNLABELLED}
    few = data.images(zipped(folder, "top/"), tiny.SPEC, limit=3)
    assert few.names == ("blue/000.png", "green/001.png", "red/003.png")


def test_progress_ends_at_the_total(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    ImageFolder.open(folder, tiny.SPEC, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 12) for done in range(13)]


def test_labels_follow_the_classes_of_a_bundle(folder: Path) -> None:
    samples = ImageFolder.open(folder, tiny.SPEC).with_classes(["red", "blue", "x", "green"])
    assert samples.labels.tolist() == [1] * 4 + [3] * 4 + [0] * 4


def test_labels_follow_classes_in_another_normal_form(folder: Path) -> None:
    (folder / "red").rename(folder / "caf\u00e9")
    samples = ImageFolder.open(folder, tiny.SPEC).with_classes(["cafe\u0301", "blue", "green"])
    assert samples.labels.tolist() == [1] * 4 + [0] * 4 + [2] * 4


def test_normalised_images_are_channels_last_memory() -> None:
    spec = InputSpec((3, 4, 5), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3)).astype(np.uint8)
    images = spec.normalise(pixels)
    expected = (pixels / 255 - np.array(spec.mean)) / np.array(spec.std)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, expected.transpose(0, 3, 1, 2), atol=1e-6)
    assert images.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize("size", [(4, 4), (8, 2), (3, 5), (16, 16)])
def test_pooled_views_are_area_means(size: tuple[int, int]) -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    view = pooled_view(images, *size)
    assert view.shape == (2, 3, *size)
    assert view.dtype == np.float32
    np.testing.assert_allclose(view.mean((2, 3)), images.mean((2, 3)), atol=1e-5)
    if 16 % size[0] == 0 == 16 % size[1]:
        rows, columns = 16 // size[0], 16 // size[1]
        blocks = images.reshape(2, 3, size[0], rows, size[1], columns)
        np.testing.assert_allclose(view, blocks.mean((3, 5)), atol=1e-5)


def test_the_orientation_of_a_photo_is_applied() -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = tiny.SPEC.decode(encoded(pixels, exif=exif))
    assert turned[0].max() == 0
    assert turned[-1].min() == 255


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_any_kind_of_image_becomes_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (9, 7)).save(buffer, "tiff")
    assert tiny.SPEC.decode(buffer.getvalue()).shape == (16, 16, 3)


def test_a_large_photo_is_squashed() -> None:
    pixels = np.full((400, 300, 3), 77, np.uint8)
    small = tiny.SPEC.decode(encoded(pixels, format="jpeg"))
    assert small.shape == (16, 16, 3)
    assert abs(small.astype(int) - 77).max() <= 2


def test_a_crop_keeps_the_centre_and_the_ratio_of_the_sides() -> None:
    spec = InputSpec((3, 20, 20), (0.5,) * 3, (0.5,) * 3, resize="crop", crop_pct=0.5)
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 50:70] = 200  # the middle 20 of 120 columns, and all the crop takes
    assert (spec.decode(encoded(pixels))[:, 2:-2] == 200).all()
    wide = spec.decode(encoded(np.pad(pixels[:, 50:70], ((0, 0), (5, 5), (0, 0)))))
    assert wide.shape == (20, 20, 3)
    assert spec.words() == "resized to 40 (bilinear), centre 20x20 kept"
    assert InputSpec.from_json(spec.to_json()) == spec


def test_bytes_that_are_no_image() -> None:
    with pytest.raises(BrokenImageError):
        tiny.SPEC.decode(b"\x89PNG\r\n\x1a\n" + b"x" * 50)


def test_a_single_image_file(folder: Path, tmp_path: Path) -> None:
    assert read_image(folder / "red" / "000.png", tiny.SPEC).shape == (16, 16, 3)
    with pytest.raises(PbcError, match=r"cannot read .*gone\.png: No such file"):
        read_image(tmp_path / "gone.png", tiny.SPEC)
    (tmp_path / "bad.png").write_bytes(b"?")
    with pytest.raises(PbcError, match=r"bad\.png is not an image that can be decoded"):
        read_image(tmp_path / "bad.png", tiny.SPEC)


def test_the_spec_survives_json() -> None:
    assert InputSpec.from_json(tiny.SPEC.to_json()) == tiny.SPEC
    assert InputSpec.from_json(tiny.SPEC.to_json()).hash() == tiny.SPEC.hash()
    other = {**tiny.SPEC.to_json(), "mean": [0.5, 0.5, 0.4]}
    assert InputSpec.from_json(other).hash() != tiny.SPEC.hash()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shape", [2, 16, 16], r"input shape \[2, 16, 16\] is not \[3, height, width\]"),
        ("shape", [16, 16], "not an input description"),
        ("std", [1, 1, 0], "std above 0"),
        ("resize", "crp", "no resize named 'crp'; did you mean 'crop'?"),
        ("crop_pct", 1.5, "crop_pct is 1.5; expected above 0 and at most 1"),
        ("interpolation", "best", "interpolation 'best' is not supported; one of nearest"),
    ],
)
def test_a_spec_that_cannot_be_met(field: str, value: object, message: str) -> None:
    with pytest.raises(PbcError, match=message):
        InputSpec.from_json({**tiny.SPEC.to_json(), field: value})
