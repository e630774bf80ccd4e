"""How alike a photo and its reconstruction are, beside what one flat colour reaches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(photo: Tensor, found: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of f32[c, h, w], both in 0…1."""
    error = float(((photo - found) ** 2).mean())
    return -10 * float(np.log10(max(error, 1e-12)))


def ssim(photo: Tensor, found: Tensor) -> float:
    """Return the mean structural similarity of f32[c, h, w], both in 0…1 (Wang et al., 2004)."""
    places = torch.arange(_WINDOW, dtype=torch.float32) - _WINDOW // 2
    line = torch.exp(-(places**2) / (2 * _SIGMA**2))
    window = torch.outer(line, line)[None, None] / float(line.sum()) ** 2

    def blurred(image: Tensor) -> Tensor:
        return conv2d(image[:, None], window)

    a, b = blurred(photo), blurred(found)
    aa, bb, ab = (
        blurred(product) - mean
        for product, mean in (
            (photo * photo, a * a),
            (found * found, b * b),
            (photo * found, a * b),
        )
    )
    alike = (2 * a * b + _C1) * (2 * ab + _C2) / ((a * a + b * b + _C1) * (aa + bb + _C2))
    return float(alike.mean())


def flat(photo: Tensor) -> Tensor:
    """Return the photo's own mean colour everywhere: nobody who is told it has seen the photo."""
    return photo.mean(dim=(1, 2), keepdim=True).expand_as(photo)


def matched(photos: Tensor, found: Tensor) -> Tensor:
    """Return f32[n, c, h, w] reconstructions in the photos' order: the likest pair first, and on.

    A gradient says nothing of the order of its batch.
    """
    pairs = [
        (-psnr(photo, image), i, j)
        for i, photo in enumerate(photos)
        for j, image in enumerate(found)
    ]
    order: dict[int, int] = {}
    for _, i, j in sorted(pairs):
        if i not in order and j not in order.values():
            order[i] = j
    return found[[order[i] for i in range(len(photos))]]
