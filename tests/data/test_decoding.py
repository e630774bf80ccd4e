"""One photo of any kind becomes upright 8-bit RGB, in bounded memory, or says why not."""

from __future__ import annotations

import importlib.util
import io
import struct
import threading
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from pbc.data import BrokenImageError, InputSpec, UnsupportedImageError, decoding, formats
from pbc.data.budget import Budget

SPEC = InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gray(data: bytes) -> np.ndarray:
    pixels = SPEC.decode(data)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def png(width: int, height: int, color: int, bits: int, rows: bytes, *chunks: bytes) -> bytes:
    """Write a PNG by hand: Pillow writes no 16-bit color."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            *(chunk(each[:4], each[4:]) for each in chunks),
            chunk(b"IDAT", rows),
            chunk(b"IEND", b""),
        )
    )


# ---- channels ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_a_network_of_one_channel_sees_luma(mode: str) -> None:
    spec = InputSpec((1, 8, 6), (0.5,), (0.25,))
    color = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8))
    picture = color.convert(mode)
    pixels = spec.decode(saved(picture, "TIFF"))
    assert pixels.shape == (8, 6, 1)
    assert np.array_equal(pixels[..., 0], np.asarray(picture.convert("RGB").convert("L")))
    normalised = spec.normalise(pixels[None])
    assert normalised.shape == (1, 1, 8, 6)
    np.testing.assert_allclose(normalised[0, 0], (pixels[..., 0] / 255 - 0.5) / 0.25, atol=1e-5)


def test_one_channel_keeps_sixteen_bits_as_they_are_scaled() -> None:
    spec = InputSpec((1, 8, 8), (0.5,), (0.5,))
    sixteen = np.rint(RAMP * 65535).astype(np.uint16)
    pixels = spec.decode(saved(Image.fromarray(sixteen), "PNG"))
    np.testing.assert_allclose(pixels[..., 0], RAMP * 255, atol=0.51)


# ---- bit depths ----------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_scale_to_eight(format: str) -> None:
    sixteen = np.rint(RAMP * 65535).astype(np.uint16)
    photo = SPEC.photo(saved(Image.fromarray(sixteen), format))
    np.testing.assert_allclose(photo.pixels[..., 0], RAMP * 255, atol=0.51)
    assert photo.remarks == (decoding.DEEP,)


@pytest.mark.parametrize(
    ("dtype", "top"),
    [
        *((np.float32, top) for top in (1.0, 255.0, 65535.0, 4e6)),
        *((np.int32, top) for top in (255.0, 65535.0, 4e6)),
    ],
)
def test_floats_and_long_integers_scale_by_the_range_that_holds_them(
    top: float, dtype: type
) -> None:
    values: np.ndarray = (RAMP * top).astype(dtype)
    np.testing.assert_allclose(gray(saved(Image.fromarray(values), "TIFF")), RAMP * 255, atol=1.01)


def test_values_below_zero_stretch_from_the_lowest_to_the_highest() -> None:
    values = (RAMP * 2 - 1).astype(np.float32)
    np.testing.assert_allclose(gray(saved(Image.fromarray(values), "TIFF")), RAMP * 255, atol=0.51)


def test_values_that_are_no_numbers_become_the_lowest() -> None:
    values = RAMP.astype(np.float32)
    values[0, 0], values[0, 1], values[0, 2] = np.nan, -np.inf, np.inf
    pixels = gray(saved(Image.fromarray(values), "TIFF"))
    assert pixels[0, :3].tolist() == [0, 0, 255]
    np.testing.assert_allclose(pixels[1:], RAMP[1:] * 255, atol=0.51)


def test_a_constant_picture_is_no_division_by_zero() -> None:
    for value in (0.0, 1.0, -3.0, 1e9, np.nan):
        values = np.full((8, 8), value, np.float32)
        assert np.unique(gray(saved(Image.fromarray(values), "TIFF"))).size == 1


def test_white_is_zero_in_sixteen_bits() -> None:
    sixteen = np.rint(RAMP * 65535).astype(np.uint16)
    data = saved(Image.fromarray(sixteen), "TIFF", tiffinfo={262: 0})
    np.testing.assert_allclose(gray(data), 255 - RAMP * 255, atol=0.51)


def test_sixteen_bits_of_color_keep_the_upper_byte() -> None:
    color = np.rint(RAMP * 65535).astype(">u2")
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in color)
    pixels = SPEC.decode(png(8, 8, 2, 16, zlib.compress(rows)))
    np.testing.assert_allclose(pixels[..., 1], RAMP * 255, atol=1)


def test_one_bit_is_black_and_white() -> None:
    bits = Image.fromarray((RAMP > 0.5).astype(np.uint8) * 255).convert("1")
    for format in ("PNG", "TIFF", "BMP"):
        assert (gray(saved(bits, format)) == np.where(RAMP > 0.5, 255, 0)).all()


# ---- transparency --------------------------------------------------------------------------


def test_a_drawing_on_a_transparent_ground_lies_on_white() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[2:6, 2:6, 3] = 255
    for format in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        photo = SPEC.photo(saved(Image.fromarray(pixels), format, **options))
        assert (photo.pixels[..., 0] == 255 - pixels[..., 3]).all(), format
        assert photo.remarks == (decoding.ON_WHITE,)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_a_transparent_color_of_a_png_becomes_white(mode: str) -> None:
    image = Image.new(mode, (8, 8))  # black all over, in the palette's first color too
    photo = SPEC.photo(saved(image, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0))
    assert (photo.pixels == 255).all()
    assert decoding.ON_WHITE in photo.remarks


def test_a_transparent_color_of_sixteen_bits() -> None:
    rows = b"".join(b"\0" + b"\x12\x34\x56\x78\x9a\xbc" * 8 for _ in range(8))
    clear = b"tRNS\x12\x34\x56\x78\x9a\xbc"
    assert (SPEC.decode(png(8, 8, 2, 16, zlib.compress(rows), clear)) == 255).all()


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    for mode, color in (("RGBA", (0, 0, 0, 128)), ("LA", (0, 128))):
        pixels = SPEC.decode(saved(Image.new(mode, (8, 8), color), "PNG"))
        assert (pixels == 127).all()


def test_transparency_is_laid_on_white_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    colors = np.random.default_rng(0).integers(0, 256, (30, 20, 4)).astype(np.uint8)
    data = saved(Image.fromarray(colors), "PNG")
    whole = SPEC.decode(data)
    for pixels in (1, 20, 70):
        monkeypatch.setattr(decoding, "_BAND_PIXELS", pixels)
        assert (SPEC.decode(data) == whole).all()


def test_an_opaque_picture_keeps_its_colors() -> None:
    colors = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    opaque = Image.fromarray(colors)
    opaque.putalpha(255)
    photo = SPEC.photo(saved(opaque, "PNG"))
    assert (photo.pixels == colors).all()
    assert photo.remarks == ()


# ---- frames, orientation, colors -----------------------------------------------------------


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_picture_of_several_is_taken(format: str) -> None:
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    data = saved(red, format, save_all=True, append_images=[blue])
    assert np.abs(SPEC.decode(data).astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_set_upright(format: str, orientation: int) -> None:
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4, :4], upright[:4, 4:], upright[4:, :4] = 240, 160, 80
    undo: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        2: np.fliplr,
        3: lambda pixels: np.rot90(pixels, 2),
        4: np.flipud,
        5: lambda pixels: pixels.transpose(1, 0, 2),
        6: lambda pixels: np.rot90(pixels, 1),
        7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: lambda pixels: np.rot90(pixels, -1),
    }
    stored = undo.get(orientation, np.array)(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if format in ("JPEG", "WEBP") else {}
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options)
    assert np.abs(SPEC.decode(data).astype(int) - upright).max() <= 12


def test_cmyk_becomes_rgb() -> None:
    for format in ("JPEG", "TIFF"):
        data = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format)
        assert np.abs(SPEC.decode(data).astype(int) - (255, 0, 0)).max() <= 8


# ---- what cannot be read -------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "PPM", "WEBP"])
def test_a_file_cut_short_is_broken(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    data = saved(Image.fromarray(noise), format)
    with pytest.raises(BrokenImageError):
        SPEC.decode(data[: len(data) // 2])


def test_files_that_are_no_photos() -> None:
    with pytest.raises(BrokenImageError, match="the file is empty"):
        SPEC.decode(b"")
    with pytest.raises(BrokenImageError, match="cannot identify an image in it"):
        SPEC.decode(b"no image")
    with pytest.raises(BrokenImageError, match="a video file, no photo"):
        SPEC.decode(b"\0\0\0\x18ftypisom" + bytes(40))
    with pytest.raises(BrokenImageError, match="cannot identify"):
        SPEC.decode(b"%!PS-Adobe-3.0 EPSF-3.0\n")  # Pillow would run a program on it


def test_formats_that_are_not_read_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif.as_plugin", None)
    with pytest.raises(UnsupportedImageError, match=r"^HEIC: pip install '.*\[heic\]'$"):
        SPEC.decode(b"\0\0\0\x18ftypheic" + bytes(200))
    with pytest.raises(UnsupportedImageError, match=r"^pip install '.*\[heic\]'$"):
        SPEC.photo(b"\0\0\0\x18ftypheic" + bytes(200), "IMG_1.HEIC")
    with pytest.raises(UnsupportedImageError, match="JPEG XL: no format that pbc reads, export it"):
        SPEC.decode(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40))
    tiff = saved(Image.new("RGB", (8, 8)), "TIFF")
    assert SPEC.photo(tiff, "a.tif").pixels.shape == (8, 8, 3)
    with pytest.raises(UnsupportedImageError, match="export it"):
        SPEC.photo(tiff, "DSC_1.NEF")


def test_avif_is_read_where_pillow_can() -> None:
    opener = formats.opener(formats.AVIF)
    assert (opener is not None) == bool("avif" in features.modules and features.check("avif"))
    if opener is not None:
        data = saved(Image.new("RGB", (16, 16), "red"), "AVIF")
        assert np.abs(SPEC.decode(data).astype(int) - (255, 0, 0)).max() <= 6


def test_heic_is_read_where_pillow_heif_is_installed() -> None:
    if importlib.util.find_spec("pillow_heif") is None:
        assert formats.opener(formats.HEIC) is None
        return
    pillow_heif = importlib.import_module("pillow_heif")
    buffer = io.BytesIO()
    turned = np.zeros((64, 64, 3), np.uint8)
    turned[:, :32] = 240  # bright at the left as stored, above when upright
    pillow_heif.from_pillow(Image.fromarray(turned)).save(buffer, exif=_turned().tobytes())
    pixels = SPEC.decode(buffer.getvalue()).astype(int)
    assert np.abs(pixels[:3] - 240).max() <= 8
    assert pixels[5:].max() <= 8
    assert "HEIF" not in Image.OPEN  # nothing of the host program's Pillow is changed


# ---- memory --------------------------------------------------------------------------------


def test_a_photo_of_200_megapixels_decodes_at_a_fraction_of_its_size() -> None:
    data = saved(Image.new("L", (16320, 12240), 77), "JPEG", quality=10)
    assert np.abs(SPEC.decode(data).astype(int) - 77).max() <= 3


def test_a_picture_beyond_the_bound_is_refused_before_it_is_decoded() -> None:
    data = png(13300, 13300, 6, 8, zlib.compress(bytes(1000)))
    with pytest.raises(BrokenImageError, match=r"13300 × 13300 pixels take \d+ MB to decode"):
        SPEC.decode(data)


def test_copies_count_too() -> None:
    plain = saved(Image.new("L", (600, 500)), "PNG")
    turned = saved(Image.new("L", (600, 500)), "PNG", exif=_turned())
    estimates = []
    for data in (plain, turned, saved(Image.new("LA", (600, 500)), "PNG")):
        with _opened(formats.PNG, data) as image:
            estimates.append(decoding._size_bytes(image, image.size, formats.PNG, data))
    assert estimates == [300_000 * 5, 300_000 * 6, 300_000 * 8]


def _opened(format: formats.Format, data: bytes) -> ImageFile.ImageFile:
    opener = formats.opener(format)
    assert opener is not None
    return opener(io.BytesIO(data), "")


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_a_progressive_jpeg_counts_all_of_its_coefficients() -> None:
    image = Image.new("RGB", (640, 480))
    for subsampling, share in ((0, 3.0), (2, 1.5)):
        data = saved(image, "JPEG", progressive=True, subsampling=subsampling)
        with _opened(formats.JPEG, data) as opened:
            taken = decoding._coefficient_bytes(opened, opened.size)
        assert taken == 2 * share * 640 * 480


def test_a_tile_that_is_larger_than_its_picture_counts() -> None:
    packed = zlib.compress(bytes(256 * 256))
    for side in (256, 30_000):
        data = _tiled_tiff(side, packed)
        if side == 256:
            assert (SPEC.decode(data) == 0).all()
        else:
            with pytest.raises(BrokenImageError, match="take 7200 MB to decode"):
                SPEC.decode(data)


def _tiled_tiff(side: int, packed: bytes) -> bytes:
    """A gray TIFF of 64 × 64 in one tile of side × side, by hand: Pillow writes no tiles."""
    tags = {
        256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side,
        324: 8 + 2 + 10 * 12 + 4, 325: len(packed),
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed


def test_decoders_share_one_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(Image.new("RGB", (64, 64)), "PNG")
    monkeypatch.setattr(decoding, "PIXELS", Budget(64 * 64 * 4 * 2))
    most, now, lock = 0, 0, threading.Lock()
    rgb = decoding._rgb

    def counted(*args: object) -> object:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        threading.Event().wait(0.02)
        result = rgb(*args)  # type: ignore[arg-type]
        with lock:
            now -= 1
        return result

    monkeypatch.setattr(decoding, "_rgb", counted)
    threads = [threading.Thread(target=SPEC.decode, args=(data,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= most <= 2
