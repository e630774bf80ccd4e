"""Images in, arrays out: folders or zip files of photos, decoded alike on compiler and device."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pbc.errors import PbcError

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
)
UNLABELLED = -1
# What a damaged or encrypted zip entry, or a file that went away, can raise.
_READ_ERRORS = (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True)
class InputSpec:
    """How a photo becomes the network's input.

    `shape` is (channels, height, width); the photo is squashed to height × width, scaled to
    [0, 1], and normalised per channel with `mean` and `std`.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "squash"
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        """Refuse what `decode` and `normalise` cannot do."""
        channels = self.shape[0]
        if channels != 3 or min(self.shape) < 1:
            raise PbcError(f"input shape {list(self.shape)} is not [3, height, width]")
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise PbcError(
                f"mean {list(self.mean)} and std {list(self.std)} need {channels} values each, "
                "std above 0"
            )
        if self.resize != "squash":
            raise PbcError(f"resize {self.resize!r} is not supported; 'squash' is")
        if self.interpolation not in _RESAMPLING:
            raise PbcError(
                f"interpolation {self.interpolation!r} is not supported; "
                f"one of {', '.join(_RESAMPLING)} is"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> InputSpec:
        try:
            channels, height, width = (int(size) for size in data["shape"])
            return cls(
                (channels, height, width),
                tuple(float(value) for value in data["mean"]),
                tuple(float(value) for value in data["std"]),
                str(data["resize"]),
                str(data["interpolation"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PbcError(f"not an input description: {dict(data)} ({error!r})") from error

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": self.resize,
            "interpolation": self.interpolation,
        }

    def hash(self) -> str:
        """sha256 (hex) of everything that decides what a given photo becomes."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def decode(self, data: bytes) -> np.ndarray:
        """Decode the bytes of an image file to uint8[H, W, 3]; raises BrokenImageError."""
        _, height, width = self.shape
        try:
            with Image.open(io.BytesIO(data)) as image:
                # A JPEG decodes at a fraction of its size: twice the target keeps the quality.
                image.draft("RGB", (2 * max(height, width),) * 2)
                upright = ImageOps.exif_transpose(image).convert("RGB")
                small = upright.resize((width, height), _RESAMPLING[self.interpolation])
            return np.asarray(small)
        except Exception as error:  # PIL's decoders raise nearly anything on malformed bytes
            raise BrokenImageError(str(error) or type(error).__name__) from error

    @cached_property
    def _scale_and_shift(self) -> tuple[np.ndarray, np.ndarray]:
        """f32[W * 3] each: repeated over a row, as numpy is slow on a last axis of 3."""
        mean, std = np.array(self.mean), np.array(self.std)
        scale, shift = 1 / (255 * std), -mean / std
        width = self.shape[2]
        return np.tile(scale, width).astype(np.float32), np.tile(shift, width).astype(np.float32)

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """uint8[B, H, W, 3] to f32[B, 3, H, W], a view of NHWC memory (channels_last)."""
        scale, shift = self._scale_and_shift
        batch, height, width, channels = images.shape
        rows = images.reshape(batch, height, width * channels)
        values: np.ndarray = np.multiply(rows, scale, dtype=np.float32)
        values += shift
        nchw: np.ndarray = values.reshape(images.shape).transpose(0, 3, 1, 2)
        return nchw


class BrokenImageError(Exception):
    """The bytes of a file are no image that can be decoded."""


def pooled_view(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area-pool f32[B, C, H, W] to f32[B, C, height, width]: what the policy looks at."""
    batch, channels, *size = images.shape
    if size[0] % height == 0 and size[1] % width == 0:
        # Plain sums: a matrix product would wake BLAS's threads beside the engine's, and each
        # would wait for the other's to stop spinning.
        rows = images.transpose(0, 2, 3, 1).reshape(batch, height, -1, size[1] * channels).mean(2)
        means: np.ndarray = rows.reshape(batch, height, width, -1, channels).mean(3)
        view: np.ndarray = means.transpose(0, 3, 1, 2)
        return view
    down = _area_weights(size[0], height)
    across = _area_weights(size[1], width)
    # Matrix products over the last axis of contiguous memory; B and C are carried along.
    narrow = np.matmul(np.ascontiguousarray(images), across.T)
    pooled: np.ndarray = np.matmul(down, narrow)
    return pooled


def _area_weights(size: int, pooled: int) -> np.ndarray:
    """f32[pooled, size]: the share of every pixel in every equal interval of the axis."""
    edges = np.linspace(0, size, pooled + 1)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights: np.ndarray = np.clip(overlap, 0, None) * (pooled / size)
    return weights.astype(np.float32)


# ---- where images come from ----------------------------------------------------------------


@dataclass(frozen=True)
class _Listing:
    """Files below a root, by posix name relative to it, and the folders, empty ones too."""

    root: str
    files: tuple[str, ...]
    folders: frozenset[str]
    read: Callable[[str], bytes]


def _list(path: Path) -> _Listing:
    if path.is_dir():
        return _list_folder(path)
    if path.is_file():
        return _list_zip(path)
    raise PbcError(f"no data at {path}; give a folder or a zip file of images")


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _list_folder(path: Path) -> _Listing:
    files: list[str] = []
    folders: set[str] = set()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        relative = Path(folder).relative_to(path)
        subfolders[:] = [name for name in subfolders if not _hidden(name)]
        folders.update((relative / name).as_posix() for name in subfolders)
        files += [(relative / name).as_posix() for name in names if not _hidden(name)]
    return _Listing(
        str(path), tuple(sorted(files)), frozenset(folders), lambda name: (path / name).read_bytes()
    )


def _list_zip(path: Path) -> _Listing:
    try:
        archive = zipfile.ZipFile(path)
        entries = [entry.filename for entry in archive.infolist()]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise PbcError(f"{path} is neither a folder nor a zip file of images: {error}") from error
    entries = [name for name in entries if not _hidden(name)]
    tops = {name.split("/")[0] for name in entries}
    nested = any(name.count("/") > 1 for name in entries if not name.endswith("/"))
    # One folder around all the class folders is how most archives are packed: look through it.
    prefix = f"{tops.pop()}/" if len(tops) == 1 and nested else ""
    names = [name[len(prefix) :] for name in entries]
    files = sorted(name for name in names if name and not name.endswith("/"))
    folders = {name.rstrip("/") for name in names if name.endswith("/")}
    for name in files:
        parts = name.split("/")[:-1]
        folders.update("/".join(parts[: depth + 1]) for depth in range(len(parts)))
    return _Listing(
        str(path), tuple(files), frozenset(folders), lambda name: archive.read(prefix + name)
    )


def _image_names(listing: _Listing) -> list[str]:
    return [name for name in listing.files if Path(name).suffix.lower() in SUFFIXES]


def _class_images(listing: _Listing) -> dict[str, list[str]]:
    """Image names by class folder, sorted; raises if that is not what the data looks like."""
    classes: dict[str, list[str]] = {
        name: [] for name in sorted(listing.folders) if "/" not in name
    }
    if not classes:
        raise PbcError(f"{listing.root} has no class folders; expected one folder per class")
    for name in _image_names(listing):
        top, slash, _ = name.partition("/")
        if slash:
            classes[top].append(name)
    if not any(classes.values()):
        raise PbcError(f"{listing.root} has no images in its {len(classes)} class folders")
    empty = [name for name, members in classes.items() if not members]
    if empty:
        raise PbcError(
            f"class folder {empty[0]!r} of {listing.root} has no images"
            + (f" ({len(empty)} such folders)" if len(empty) > 1 else "")
            + "; add some or remove it"
        )
    return classes


def class_names(path: Path | str) -> list[str]:
    """The sorted class names of a folder of class folders, or a zip of them."""
    return list(_class_images(_list(Path(path))))


# ---- decoded samples -----------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Decoded images with their labels; as many as `ram_bytes` allows stay decoded in memory.

    names: file names relative to the data's root, for messages.
    labels: int64[N], indices into `classes`; UNLABELLED where there are none.
    hashes: bytes[32] each, sha256 of the file's bytes: the sample's identity in a cache.
    skipped: (name, reason) of every broken image that was left out.
    """

    spec: InputSpec
    names: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    hashes: tuple[bytes, ...]
    skipped: tuple[tuple[str, str], ...]
    _decoded: np.ndarray
    _read: Callable[[str], bytes]

    def __len__(self) -> int:
        return len(self.names)

    def decode(self, index: int) -> np.ndarray:
        """uint8[H, W, 3] of one sample."""
        if index < len(self._decoded):
            image: np.ndarray = self._decoded[index]
            return image
        try:
            return self.spec.decode(self._read(self.names[index]))
        except (*_READ_ERRORS, BrokenImageError) as error:
            raise PbcError(f"{self.names[index]} was readable and no longer is: {error}") from error

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """uint8[B, H, W, 3] of several samples."""
        if len(self._decoded) == len(self.names) or indices.max() < len(self._decoded):
            gathered: np.ndarray = self._decoded[indices]
            return gathered
        return np.stack([self.decode(int(index)) for index in indices])

    def images(self, indices: np.ndarray) -> np.ndarray:
        """f32[B, 3, H, W] of several samples, normalised (NHWC memory)."""
        return self.spec.normalise(self.batch(indices))

    def with_classes(self, classes: Sequence[str]) -> Samples:
        """The same samples, labelled by position in `classes`, which must hold every name."""
        position = {name: index for index, name in enumerate(classes)}
        mapping = np.array([position[name] for name in self.classes], dtype=np.int64)
        return Samples(
            self.spec,
            self.names,
            mapping[self.labels],
            tuple(classes),
            self.hashes,
            self.skipped,
            self._decoded,
            self._read,
        )

    def digest(self) -> str:
        """sha256 (hex) over contents and labels in order: the identity of the whole set."""
        total = hashlib.sha256(json.dumps(self.classes).encode())
        for content in self.hashes:
            total.update(content)
        total.update(self.labels.astype("<i8").tobytes())
        return total.hexdigest()


class ImageFolder:
    """A folder of class folders of images, or a zip file of them."""

    @staticmethod
    def open(
        path: Path | str,
        spec: InputSpec,
        *,
        strict: bool = False,
        ram_bytes: int = 1 << 30,
        progress: Callable[[int, int], None] | None = None,
    ) -> Samples:
        """Read and decode every image once; broken ones are skipped, or stop if `strict`.

        `progress` is called with (done, total) images now and then.
        """
        listing = _list(Path(path))
        members = _class_images(listing)
        classes = tuple(members)
        labels = [label for label, name in enumerate(classes) for _ in members[name]]
        names = [name for name in classes for name in members[name]]
        samples = _load(listing, names, labels, classes, spec, strict, ram_bytes, progress)
        alive = np.bincount(samples.labels, minlength=len(classes))
        if not alive.all():
            raise PbcError(
                f"class folder {classes[int(alive.argmin())]!r} of {path} has no readable image"
            )
        return samples


def images(
    path: Path | str,
    spec: InputSpec,
    *,
    strict: bool = False,
    limit: int | None = None,
    ram_bytes: int = 1 << 30,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """All images below a folder or in a zip, without labels; at most `limit`, evenly spread."""
    listing = _list(Path(path))
    names = _image_names(listing)
    if not names:
        raise PbcError(f"{path} has no images (files ending in {', '.join(sorted(SUFFIXES))})")
    if limit is not None and limit < len(names):
        names = [names[index] for index in np.linspace(0, len(names) - 1, limit).astype(int)]
    labels = [UNLABELLED] * len(names)
    return _load(listing, names, labels, (), spec, strict, ram_bytes, progress)


def read_image(path: Path | str, spec: InputSpec) -> np.ndarray:
    """uint8[H, W, 3] of one image file."""
    try:
        return spec.decode(Path(path).read_bytes())
    except OSError as error:
        raise PbcError(f"cannot read {path}: {error.strerror}") from error
    except BrokenImageError as error:
        raise PbcError(f"{path} is not an image that can be decoded: {error}") from error


def _load(
    listing: _Listing,
    names: Sequence[str],
    labels: Sequence[int],
    classes: tuple[str, ...],
    spec: InputSpec,
    strict: bool,
    ram_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> Samples:
    """Decode `names` on all cores, drop the broken ones, keep what fits in `ram_bytes`."""
    channels, height, width = spec.shape
    capacity = min(len(names), ram_bytes // (height * width * channels))
    # Untouched pages of an empty array cost nothing, so broken images only shorten it.
    decoded = np.empty((capacity, height, width, channels), np.uint8)
    hashes: list[bytes] = []
    alive: list[int] = []
    skipped: list[tuple[str, str]] = []

    def load(name: str) -> tuple[bytes, np.ndarray] | str:
        try:
            data = listing.read(name)
            return hashlib.sha256(data).digest(), spec.decode(data)
        except (*_READ_ERRORS, BrokenImageError) as error:
            return str(error)

    for index, result in enumerate(_ordered_map(load, names)):
        if isinstance(result, str):
            if strict:
                raise PbcError(f"{names[index]} of {listing.root} is broken: {result}")
            skipped.append((names[index], result))
            continue
        content, image = result
        if len(alive) < capacity:
            decoded[len(alive)] = image
        hashes.append(content)
        alive.append(index)
        if progress is not None and (index % 64 == 63 or index + 1 == len(names)):
            progress(index + 1, len(names))
    if not alive:
        raise PbcError(f"none of the {len(names)} images of {listing.root} can be decoded")
    return Samples(
        spec,
        tuple(names[index] for index in alive),
        np.array([labels[index] for index in alive], dtype=np.int64),
        classes,
        tuple(hashes),
        tuple(skipped),
        decoded[: len(alive)],
        listing.read,
    )


def _ordered_map(
    load: Callable[[str], tuple[bytes, np.ndarray] | str], names: Sequence[str]
) -> Iterable[tuple[bytes, np.ndarray] | str]:
    """Map on all cores (PIL and hashlib release the GIL), holding only a window of results."""
    window = 256
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for start in range(0, len(names), window):
            yield from pool.map(load, names[start : start + window])
