"""The input of a network: what size and scale a photo has to take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from pbc.data.decoding import Photo, decode
from pbc.errors import PbcError, suggest

RESIZES = ("crop", "squash")
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
INTERPOLATIONS = tuple(_RESAMPLING)


@dataclass(frozen=True)
class InputSpec:
    """How a photo becomes the network's input.

    `shape` is (channels, height, width). `resize` says how the photo gets there: "squash" brings it
    to height × width whatever its sides' ratio; "crop" covers height / crop_pct × width / crop_pct
    with it and takes the centre, as torchvision's and timm's evaluation do. Then it is scaled to
    [0, 1], and normalised per channel with `mean` and `std`. Three channels are RGB, one is luma
    (ITU-R BT.601, as Pillow's mode L).
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "squash"
    interpolation: str = "bilinear"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what `decode` and `normalise` cannot do."""
        channels = self.shape[0]
        if channels not in (1, 3) or min(self.shape) < 1:
            raise PbcError(
                f"input shape {list(self.shape)} is not [3, height, width], nor [1, height, width] "
                "for a network that looks at grayscale"
            )
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise PbcError(
                f"mean {list(self.mean)} and std {list(self.std)} need {channels} values each, "
                "std above 0"
            )
        if self.resize not in RESIZES:
            raise PbcError(suggest("resize", self.resize, RESIZES))
        if not 0 < self.crop_pct <= 1:
            raise PbcError(f"crop_pct is {self.crop_pct}; expected above 0 and at most 1")
        if self.interpolation not in _RESAMPLING:
            raise PbcError(
                f"interpolation {self.interpolation!r} is not supported; "
                f"one of {', '.join(INTERPOLATIONS)} is"
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
                float(data.get("crop_pct", 1.0)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PbcError(f"not an input description: {dict(data)} ({error!r})") from error

    def to_json(self) -> dict[str, Any]:
        cropped = {"crop_pct": self.crop_pct} if self.resize == "crop" else {}
        return {
            "shape": list(self.shape),
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": self.resize,
            "interpolation": self.interpolation,
            **cropped,
        }

    def words(self) -> str:
        """Return what happens to a photo, for people: such as `squashed to 128x128`."""
        _, height, width = self.shape
        if self.resize == "squash":
            return f"squashed to {height}x{width} ({self.interpolation})"
        sides = "x".join(str(side) for side in dict.fromkeys(self._covered()[::-1]))
        return f"resized to {sides} ({self.interpolation}), centre {height}x{width} kept"

    def hash(self) -> str:
        """sha256 (hex) of everything that decides what a given photo becomes."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def photo(self, data: bytes, name: str = "") -> Photo:
        """Decode the bytes of an image file, with what was done to fit it in 8 bits a channel.

        `name` is the file's: raw photos of most cameras are told by their suffix.
        Raises BrokenImageError, and UnsupportedImageError for a format that is not read here.
        """
        return decode(data, self.fit, max(self.shape[1:]), name)

    def fit(self, image: Image.Image) -> Image.Image:
        """Return a picture at the network's size, in mode L where that looks at one channel.

        Resizing to cover and cropping is one step: the same pixels, without the rest of a panorama.
        """
        channels, height, width = self.shape
        resampling = _RESAMPLING[self.interpolation]
        if channels == 1:
            image = image.convert("L")
        if self.resize == "squash":
            return image.resize((width, height), resampling)
        least_width, least_height = self._covered()
        if least_width * image.height >= least_height * image.width:
            full = least_width, int(least_width * image.height / image.width)
        else:
            full = int(least_height * image.width / image.height), least_height
        left, top = round((full[0] - width) / 2), round((full[1] - height) / 2)
        across, down = image.width / full[0], image.height / full[1]
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        inside = (*box[:2], min(box[2], image.width), min(box[3], image.height))  # of rounding
        return image.resize((width, height), resampling, inside)

    def fitted(self, image: Image.Image) -> np.ndarray:
        """Return uint8[H, W, channels] of the network's size for a picture in RGB."""
        channels, height, width = self.shape
        if image.size != (width, height) or channels == 1:
            image = self.fit(image)
        return np.asarray(image).reshape(*self.shape[1:], channels)

    def _covered(self) -> tuple[int, int]:
        """Return the least (width, height) that a photo is resized to before the crop."""
        _, height, width = self.shape
        # What came from 224 / 232 is 232 again.
        return int(width / self.crop_pct + 1e-6), int(height / self.crop_pct + 1e-6)

    def decode(self, data: bytes) -> np.ndarray:
        """Decode the bytes of an image file to uint8[H, W, channels]; raises BrokenImageError."""
        return self.photo(data).pixels

    @cached_property
    def _scale_and_shift(self) -> tuple[np.ndarray, np.ndarray]:
        """f32[W * channels] each: repeated over a row, as numpy is slow on a short last axis."""
        mean, std = np.array(self.mean), np.array(self.std)
        scale, shift = 1 / (255 * std), -mean / std
        width = self.shape[2]
        return np.tile(scale, width).astype(np.float32), np.tile(shift, width).astype(np.float32)

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """uint8[B, H, W, C] to f32[B, C, H, W], a view of NHWC memory (channels_last)."""
        scale, shift = self._scale_and_shift
        batch, height, width, channels = images.shape
        rows = images.reshape(batch, height, width * channels)
        values: np.ndarray = np.multiply(rows, scale, dtype=np.float32)
        values += shift
        nchw: np.ndarray = values.reshape(images.shape).transpose(0, 3, 1, 2)
        return nchw
