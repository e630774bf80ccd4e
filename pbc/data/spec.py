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
from pbc.errors import PbcError

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

    def photo(self, data: bytes, name: str = "") -> Photo:
        """Decode the bytes of an image file, with what was done to fit it in 8 bits of RGB.

        `name` is the file's: raw photos of most cameras are told by their suffix.
        Raises BrokenImageError, and UnsupportedImageError for a format that is not read here.
        """
        _, height, width = self.shape
        return decode(data, (width, height), _RESAMPLING[self.interpolation], name)

    def decode(self, data: bytes) -> np.ndarray:
        """Decode the bytes of an image file to uint8[H, W, 3]; raises BrokenImageError."""
        return self.photo(data).pixels

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
