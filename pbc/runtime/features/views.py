"""The views of a sample: the whole image, and a fixed set of crops that can be cached like it.

A row is one view of one sample: row `view * n + sample` of n samples. Fresh random crops would
never be seen twice, so that nothing could be cached; K crops per sample, drawn once from the
sample's content, are most of what augmentation gives (every epoch shows another one) at the cost of
K computations of the prefix instead of one per epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pbc.data import Samples

_LEAST_SCALE = 0.7
_ASPECTS = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Crop:
    """A box (left, top, right, bottom), as shares of width and height, and whether to mirror it."""

    box: tuple[float, float, float, float]
    mirrored: bool

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the crop of uint8[H, W, channels], in the same shape."""
        height, width = image.shape[:2]
        left, top, right, bottom = self.box
        pixels = (left * width, top * height, right * width, bottom * height)
        # reducing_gap is left alone: the box is at most a third smaller than the image.
        # Pillow has no last axis for one channel.
        whole = Image.fromarray(image if image.shape[2] > 1 else image[..., 0])
        crop = whole.resize((width, height), Image.Resampling.BILINEAR, pixels)
        result = np.asarray(crop).reshape(image.shape)
        return result[:, ::-1] if self.mirrored else result


def crop_of(content: bytes, view: int, seed: int) -> Crop:
    """Draw the crop that a view of a sample is: area 0.7…1 of the image, sides by at most 4:3."""
    words = hashlib.sha256(content + view.to_bytes(4, "little")).digest()[:16]
    random = np.random.Generator(np.random.PCG64([seed, int.from_bytes(words, "little")]))
    scale = random.uniform(_LEAST_SCALE, 1)
    aspect = math.exp(random.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1])))
    width = min(math.sqrt(scale * aspect), 1.0)
    height = min(math.sqrt(scale / aspect), 1.0)
    left, top = random.uniform(0, 1 - width), random.uniform(0, 1 - height)
    return Crop((left, top, left + width, top + height), bool(random.integers(2)))


@dataclass(frozen=True)
class Views:
    """Samples, each in `count` views; view 0 is the whole image."""

    samples: Samples
    count: int = 1
    seed: int = 0

    def __len__(self) -> int:
        return len(self.samples) * self.count

    def rows(self, epoch: int, samples: np.ndarray) -> np.ndarray:
        """Return the rows that int64[b] samples show in an epoch: every view in turn."""
        rows: np.ndarray = (epoch + samples) % self.count * len(self.samples) + samples
        return rows

    def shown(self, epochs: int) -> np.ndarray:
        """Return int64[m], ascending: the rows that the first epochs show, all from `count` on."""
        everybody = np.arange(len(self.samples))
        views = range(min(epochs, self.count))
        return np.unique(np.concatenate([self.rows(epoch, everybody) for epoch in views]))

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Return f32[b, channels, H, W] of int64[b] rows, normalised."""
        if self.count == 1:
            return self.samples.images(rows)
        views, samples = np.divmod(rows, len(self.samples))
        images = self.samples.batch(samples).copy()
        for at in np.flatnonzero(views).tolist():
            crop = crop_of(self.samples.hashes[samples[at]], int(views[at]), self.seed)
            images[at] = crop(images[at])
        return self.samples.spec.normalise(images)

    def contents(self) -> Sequence[bytes]:
        """Return what identifies each row's pixels before normalising: file and crop."""
        hashes = self.samples.hashes
        crops = (
            hashlib.sha256(content + repr(crop_of(content, view, self.seed)).encode()).digest()
            for view in range(1, self.count)
            for content in hashes
        )
        return [*hashes, *crops]
