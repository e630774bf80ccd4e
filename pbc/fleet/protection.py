"""An update before it leaves a device: compressed, clipped, noised (`pbc audit`: what that hides).

Compression is top-k with local accumulation (Lin et al., Deep Gradient Compression, 2018, section
3): what is not sent stays and is added to the next update. Updates have the optimizer's momentum in
them, so it is velocity that accumulates, not gradients: their momentum correction (3.1). Clipping
and noise: McMahan et al., Learning Differentially Private Recurrent Language Models, 2018.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pbc.errors import UsageError


@dataclass(frozen=True)
class Protection:
    """The steps between an update and what is sent, in this order; None and 0 leave one out.

    top_k: the share of values that are sent, the largest ones, in 0…1. clip: the largest norm of
    what is sent. noise: the standard deviation of normal noise on every value sent, by the clip
    (or by 1 without one). float16: values travel in half precision.
    """

    top_k: float | None = None
    clip: float | None = None
    noise: float = 0.0
    float16: bool = False

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if self.top_k is not None and not 0 < self.top_k <= 1:
            raise UsageError(
                f"top-k is {self.top_k}; it is a share of the values, above 0 and at most 1"
            )
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise UsageError(f"the clip is {self.clip}; it must be above 0")
        if not 0 <= self.noise < math.inf:
            raise UsageError(f"the noise is {self.noise}; it must be at least 0")

    @property
    def noise_sd(self) -> float:
        """Return the standard deviation of the noise on a value."""
        return self.noise * (1.0 if self.clip is None else self.clip)

    def __call__(
        self, update: np.ndarray, residual: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what is sent of f32[d] and what stays; 0 where nothing is sent.

        residual: f32[d], what stayed of the updates before.
        """
        pending = update + residual
        if self.top_k is None:
            sent, left = pending, np.zeros_like(pending)
        else:
            count = max(1, round(self.top_k * len(pending)))
            places = np.argpartition(np.abs(pending), -count)[-count:]
            sent = np.zeros_like(pending)
            sent[places] = pending[places]
            left = pending - sent
        if self.clip is not None:
            norm = float(np.linalg.norm(sent))
            sent = sent * np.float32(min(1.0, self.clip / max(norm, 1e-30)))
        if self.noise:
            # Where top-k sends nothing there is nothing to hide a value behind.
            where = sent != 0 if self.top_k is not None else slice(None)
            noise = random.normal(0, self.noise_sd, len(sent)).astype(np.float32)
            sent[where] += noise[where]
        if self.float16:
            sent = sent.astype(np.float16).astype(np.float32)
        return sent, left

    def __str__(self) -> str:
        """Return the words for a table."""
        parts = []
        if self.top_k is not None:
            parts.append(f"top-k {100 * self.top_k:g} %")
        if self.clip is not None:
            parts.append(f"clip {self.clip:g}")
        if self.noise:
            parts.append(f"noise {self.noise:.3g}")
        if self.float16:
            parts.append("float16")
        return ", ".join(parts) or "none"


def gaussian_noise(epsilon: float, delta: float) -> float:
    """Return the noise, by the clip, that makes one release (ε, δ)-differentially private.

    The analytic Gaussian mechanism (Balle and Wang, 2018, theorem 8), by bisection: exact, for
    whatever ε, where the classical bound holds below 1 alone.
    """
    if not (0 < epsilon < math.inf and 0 < delta < 1):
        raise UsageError(f"ε is {epsilon} and δ is {delta}; ε must be above 0, δ between 0 and 1")

    def spent(noise: float) -> float:
        near, far = 1 / (2 * noise) - epsilon * noise, -1 / (2 * noise) - epsilon * noise
        # exp(ε) Φ(far) is small whatever ε is; its factors need not be.
        tail = _normal(far)
        return _normal(near) - (math.exp(epsilon + math.log(tail)) if tail > 0 else 0.0)

    low, high = 1e-6, 1.0
    while spent(high) > delta:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


def _normal(x: float) -> float:
    """Φ, the standard normal distribution function."""
    return math.erfc(-x / math.sqrt(2)) / 2
