"""The formats of image files: told by their first bytes, whatever the file is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from PIL import Image, ImageFile, features

from pbc.util.extras import install

HEAD_BYTES = 64
"""So many bytes from the start of a file are enough for `identify`."""

_BMP_HEADER_BYTES = frozenset((12, 16, 40, 52, 56, 64, 108, 124))
_HEIF_BRANDS = frozenset(
    (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")
)
_EXPORT = "no format that pbc reads, export it as JPEG or PNG"

Opener = Callable[[object, str], ImageFile.ImageFile]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    pillow: the name of the format in Pillow; None where pbc does not read it.
    feature: the part of Pillow, absent from some builds, that decodes it.
    decoder_bytes: memory per pixel that the decoder takes beside the picture itself.
    hint: advice for the user where it cannot be read. photo: False for no photo at all.
    """

    name: str
    suffixes: tuple[str, ...]
    pillow: str | None = None
    feature: str | None = None
    decoder_bytes: int = 0
    hint: str = _EXPORT
    photo: bool = True


JPEG = Format("JPEG", (".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".mpo"), "JPEG")
PNG = Format("PNG", (".png", ".apng"), "PNG")
TIFF = Format("TIFF", (".tif", ".tiff"), "TIFF")
HEIC = Format("HEIC", (".heic", ".heif", ".hif"), "HEIF", decoder_bytes=8, hint=install("heic"))
RAW = Format(
    "raw",
    (".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw"),
)
_BMP = Format("BMP", (".bmp", ".dib"), "BMP")
_GIF = Format("GIF", (".gif",), "GIF", decoder_bytes=4)
_PNM = Format("PNM", (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"), "PPM")
# The decoder of animations, which opens every WebP, keeps two canvases and an encoded frame.
_WEBP = Format("WebP", (".webp",), "WEBP", "webp", 12)
AVIF = Format("AVIF", (".avif", ".avifs"), "AVIF", "avif", 8, "pip install -U pillow")
# OpenJPEG holds 32 bits per component.
_JPEG_2000 = Format("JPEG 2000", (".jp2", ".j2k", ".jpx", ".jpf"), "JPEG2000", "jpg_2000", 16)
_JPEG_XL = Format("JPEG XL", (".jxl",))
_PHOTOSHOP = Format("Photoshop", (".psd", ".psb"))
_VIDEO = Format("video", (".mov", ".mp4", ".m4v", ".3gp", ".avi", ".mkv"), photo=False)
_PDF = Format("PDF", (".pdf",), photo=False)
_ZIP = Format("zip", (".zip",), photo=False)

_FORMATS = (
    JPEG, PNG, TIFF, HEIC, RAW, _BMP, _GIF, _PNM, _WEBP, AVIF, _JPEG_2000, _JPEG_XL, _PHOTOSHOP,
)  # fmt: skip
_BY_SUFFIX = {suffix: format for format in _FORMATS for suffix in format.suffixes}
_BY_START = (
    (b"\xff\xd8\xff", JPEG),
    (b"\x89PNG\r\n\x1a\n", PNG),
    (b"GIF87a", _GIF),
    (b"GIF89a", _GIF),
    (b"II*\0", TIFF),
    (b"MM\0*", TIFF),
    (b"II+\0", TIFF),
    (b"MM\0+", TIFF),
    (b"\0\0\0\x0cjP  \r\n\x87\n", _JPEG_2000),
    (b"\xff\x4f\xff\x51", _JPEG_2000),
    (b"\0\0\0\x0cJXL \r\n\x87\n", _JPEG_XL),
    (b"\xff\x0a", _JPEG_XL),
    (b"8BPS\0", _PHOTOSHOP),
    (b"FUJIFILMCCD-RAW", RAW),
    (b"IIRO", RAW),
    (b"IIRS", RAW),
    (b"IIU\0", RAW),
    (b"%PDF-", _PDF),
    (b"PK\x03\x04", _ZIP),
    (b"PK\x05\x06", _ZIP),
)


def by_suffix(name: str) -> Format | None:
    """Return the format of photos that a name ends like, in any case of letters."""
    return _BY_SUFFIX.get(PurePosixPath(name).suffix.lower())


def identify(head: bytes) -> Format | None:
    """Return the format of a file that begins with these bytes; None for none that is known."""
    for start, format in _BY_START:
        if head.startswith(start):
            # A Canon raw photo is a TIFF file with a mark of its own.
            return RAW if format is TIFF and head[8:10] == b"CR" else format
    if head[:4] == b"RIFF":
        return {b"WEBP": _WEBP, b"AVI ": _VIDEO}.get(head[8:12])
    if head[4:8] == b"ftyp":
        return _iso_media(head)
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_BYTES:
        return _BMP
    if head[:1] == b"P" and head[1:2] in b"123456f" and head[2:3].isspace():
        return _PNM
    return None


def of_file(name: str, head: bytes) -> Format | None:
    """Return the format of a file by its bytes, and by its name where bytes do not tell.

    Raw photos of most cameras are TIFF files with a suffix of the maker's own; as TIFF they would
    be read as the thumbnail they begin with.
    """
    format = identify(head)
    return RAW if format is TIFF and by_suffix(name) is RAW else format


def opener(format: Format) -> Opener | None:
    """Return the function of Pillow that opens files of the format; None if there is none here.

    Called directly, and not through `Image.open`: that tries other formats too, some of which run
    programs, and warns of photos by a limit of its own, which is global.
    """
    if format.pillow is None:
        return None
    if format is HEIC:
        return _heif_opener()
    if format.feature is not None and not (
        format.feature in {*features.modules, *features.codecs} and features.check(format.feature)
    ):
        return None
    Image.preinit()
    if format.pillow not in Image.OPEN:
        Image.init()
    known = Image.OPEN.get(format.pillow)
    return None if known is None else known[0]  # type: ignore[return-value]


def _heif_opener() -> Opener | None:
    try:
        from pillow_heif.as_plugin import HeifImageFile
    except ImportError:
        return None
    opener: Opener = HeifImageFile
    return opener


def _iso_media(head: bytes) -> Format:
    """Tell the formats of the ISO base media family apart by their brands."""
    size = int.from_bytes(head[:4], "big")
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, min(size, len(head)), 4))]
    if brands[0] == b"crx ":
        return RAW
    if b"avif" in brands or b"avis" in brands:
        return AVIF
    return HEIC if brands[0] in _HEIF_BRANDS else _VIDEO
