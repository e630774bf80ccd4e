"""One photo: the bytes of its file to upright 8-bit pixels, within a bound of memory."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, ImageOps

from pbc.data import depth, formats
from pbc.data.budget import Budget

PIXELS = Budget(512 << 20)
"""What all pictures that are being decoded may take together, by the estimate of `_size_bytes`."""

ON_WHITE = "transparent, laid on white"
DEEP = "of more than 8 bits, mapped to 8"

_ORIENTATION = 0x0112
_UPRIGHT = 1
_PHOTOMETRIC, _BITS_PER_SAMPLE = 262, 258
_WHITE_IS_ZERO = 0
_TILE_WIDTH, _TILE_LENGTH = 322, 323
# Pillow's modes of one byte per pixel, and of two; any other takes four.
_ONE_BYTE, _TWO_BYTES = ("1", "L", "P"), ("I;16", "I;16L", "I;16B", "I;16N")
_BAND_PIXELS = 1 << 20
# In a PNG these may stand behind the pixels; the orientation is then known too late.
_PNG_ORIENTATION_MARKS = (b"eXIf", b"exif", b"XML:com.adobe.xmp")


class BrokenImageError(Exception):
    """The bytes of a file are no image that can be decoded."""


class UnsupportedImageError(BrokenImageError):
    """The file is an image of a format that is not read here; the text is what to do."""


@dataclass(frozen=True)
class Photo:
    """uint8[H, W, channels], with what was done beyond scaling to get there: ON_WHITE, DEEP."""

    pixels: np.ndarray
    remarks: tuple[str, ...]


def decode(
    data: bytes, fit: Callable[[Image.Image], Image.Image], longest: int, name: str = ""
) -> Photo:
    """Decode an image file and `fit` it to the network's size, whose longest side is `longest`.

    The first picture of an animation is taken, EXIF's orientation applied, transparency laid on
    white, and more than 8 bits mapped as `depth.eight_bits` says. `name` helps to tell raw photos.
    Raises BrokenImageError, also for a picture that takes more memory than is granted.
    """
    format = formats.of_file(name, data[: formats.HEAD_BYTES])
    if format is None or not format.photo:
        raise BrokenImageError(_no_image(data, format))
    opened = formats.opener(format)
    if opened is None:
        told = formats.by_suffix(name) is format  # by the file's name already
        raise UnsupportedImageError(format.hint if told else f"{format.name}: {format.hint}")
    try:
        with opened(io.BytesIO(data), "") as image:
            full_size = image.size
            # A JPEG decodes at a fraction of its size: twice the target keeps the quality.
            image.draft("RGB", (2 * longest,) * 2)
            needed = _size_bytes(image, full_size, format, data)
            if needed > PIXELS.most_bytes:
                raise BrokenImageError(_too_large(full_size, needed))
            with PIXELS.held(needed):
                ImageOps.exif_transpose(image, in_place=True)
                upright, remarks = _rgb(image, format, data)
                pixels = np.asarray(fit(upright))
                # Pillow has no last axis for one channel.
                return Photo(pixels if pixels.ndim == 3 else pixels[..., None], remarks)
    except BrokenImageError:
        raise
    except Exception as error:  # PIL's decoders raise nearly anything on malformed bytes
        raise BrokenImageError(str(error) or type(error).__name__) from error


def _no_image(data: bytes, format: formats.Format | None) -> str:
    if not data:
        return "the file is empty"
    if format is None:
        return "cannot identify an image in it"
    return f"a {format.name} file, no photo"


def _too_large(size: tuple[int, int], needed: int) -> str:
    return (
        f"{size[0]} × {size[1]} pixels take {needed / 1e6:.0f} MB to decode; "
        f"at most {PIXELS.most_bytes / 1e6:.0f} MB are granted, store it smaller"
    )


# ---- memory --------------------------------------------------------------------------------


def _size_bytes(
    image: ImageFile.ImageFile, full_size: tuple[int, int], format: formats.Format, data: bytes
) -> int:
    """Estimate from above what decoding takes: the picture, its copies, the decoder's memory."""
    own = _bytes_per_pixel(image.mode)
    per_pixel = own + format.decoder_bytes
    if _may_turn(image, format, data):
        per_pixel += own
    if image.mode in depth.MODES:
        per_pixel += own + 2  # as bytes, as an array of 8 bits, and as a picture of it
    if image.mode != "RGB" or image.has_transparency_data:
        per_pixel += 4  # as RGB
    decoded = image.width * image.height * per_pixel
    return decoded + _coefficient_bytes(image, full_size) + _tile_bytes(image)


def _bytes_per_pixel(mode: str) -> int:
    return 1 if mode in _ONE_BYTE else 2 if mode in _TWO_BYTES else 4


def _coefficient_bytes(image: ImageFile.ImageFile, full_size: tuple[int, int]) -> int:
    """Return what a progressive JPEG keeps until its last scan: 16 bits of every coefficient."""
    layers = getattr(image, "layer", None)
    if not layers or "progressive" not in image.info:
        return 0
    most = max(h * v for _, h, v, _ in layers)
    share = sum(h * v for _, h, v, _ in layers) / max(1, most)
    return int(2 * share * full_size[0] * full_size[1])


def _tile_bytes(image: ImageFile.ImageFile) -> int:
    """Return what one tile of a TIFF takes, which may be larger than the picture."""
    width, length = _tag(image, _TILE_WIDTH), _tag(image, _TILE_LENGTH)
    return 8 * width * length if isinstance(width, int) and isinstance(length, int) else 0


def _may_turn(image: ImageFile.ImageFile, format: formats.Format, data: bytes) -> bool:
    if format is formats.PNG:
        return any(mark in data for mark in _PNG_ORIENTATION_MARKS)
    return bool(image.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT)


# ---- modes ---------------------------------------------------------------------------------


def _rgb(
    image: ImageFile.ImageFile, format: formats.Format, data: bytes
) -> tuple[Image.Image, tuple[str, ...]]:
    """Return the loaded picture in mode RGB, and what was done to it."""
    if image.mode in depth.MODES:
        clear = image.info.get("transparency")
        gray = depth.eight_bits(
            image,
            _declared_bits(image, format),
            inverted=_tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO,
            clear=clear if isinstance(clear, int) else None,
        )
        return gray.convert("RGB"), (DEEP,) if clear is None else (DEEP, ON_WHITE)
    if image.has_transparency_data:
        return _on_white(image, format, data)
    return (image if image.mode == "RGB" else image.convert("RGB")), ()


def _on_white(
    image: ImageFile.ImageFile, format: formats.Format, data: bytes
) -> tuple[Image.Image, tuple[str, ...]]:
    clear = image.info.get("transparency")
    if format is formats.PNG and isinstance(clear, tuple) and data[24] == 16:
        # Pillow keeps the upper byte of each sample, but the whole transparent color.
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    white = Image.new("RGB", image.size, "white")
    transparent = False
    rows = max(1, _BAND_PIXELS // image.width)  # the copies below are of a band, not of the whole
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        band = image.crop(box).convert("RGBA")
        alpha = band.getchannel("A")
        transparent = transparent or alpha.getextrema() != (255, 255)
        white.paste(band.convert("RGB"), box, alpha)
    return white, (ON_WHITE,) if transparent else ()


def _declared_bits(image: ImageFile.ImageFile, format: formats.Format) -> int | None:
    """Return how many bits hold the picture's range; None where the file does not say."""
    if image.mode == "F":
        return None
    if format is not formats.TIFF:
        return 16  # PNG, PNM and JPEG 2000: Pillow scales what they hold to all of 16 bits
    bits = _tag(image, _BITS_PER_SAMPLE)
    depth_bits = bits[0] if isinstance(bits, tuple) else bits
    return int(depth_bits) if image.mode != "I" and isinstance(depth_bits, int) else None


def _tag(image: ImageFile.ImageFile, number: int) -> object:
    tags = getattr(image, "tag_v2", None)
    return None if tags is None else tags.get(number)
