"""The audit of the chosen proxies: their fidelity on the user's own photos.

A ladder's fidelity was measured on calibration images, which may look like nothing that the user
has. A few of the samples that a level is to serve run at level 0 too, and where the fidelity found
there is below the floor by more than its error, the level is not used. Two kinds of levels serve
unaudited: those with few samples, and those of a run without costs, whose scheduler moves samples
by rules of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pbc.runtime.routing.audited_head import points_lost, vectors
from pbc.util.shapes import check, flag, integer, maybe, number, record

_SHARE = 0.01
_LEAST = 16
# Fewer samples at a level are not worth the doubt: their audit would cost more than they save.
_FEW = 50
_CONFIDENCE = 1.96  # standard errors: 95 %
# Ratios to less than these would be of noise.
_LEAST_LOST = 0.01
_LEAST_POINTS = 0.5

Arrays = Mapping[str, np.ndarray]


_FINDING = record(
    {
        "level": integer(0, 63),
        "samples": integer(),
        "fidelity": number(),
        "error": number(),
        "floor": number(),
        "points_lost": maybe(number()),
        "points_error": number(),
    },
    {"kept": flag},
)


@dataclass(frozen=True)
class Finding:
    """A level's fidelity on N samples routed to it, with its standard error.

    points_lost, points_error: what a head loses that learns from these samples at the level and is
    tested at level 0, likewise; None where they are too few of a class to tell.
    """

    level: int
    samples: int
    fidelity: float
    error: float
    floor: float
    points_lost: float | None = None
    points_error: float = 0.0

    @property
    def kept(self) -> bool:
        """Return whether the level may go on serving."""
        return self.fidelity + _CONFIDENCE * self.error >= self.floor

    def worse_than(self, fidelity: float, lost: float) -> float:
        """Return by what factor more is surely lost here than `lost` points at a `fidelity`."""
        factor = (1 - self.fidelity - _CONFIDENCE * self.error) / max(1 - fidelity, _LEAST_LOST)
        if self.points_lost is not None:
            surely = self.points_lost - _CONFIDENCE * self.points_error
            factor = max(factor, surely / max(lost, _LEAST_POINTS))
        return max(1.0, factor)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "kept": self.kept}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Finding:
        """Read what `to_json` returned; raises ShapeError for anything else."""
        check(data, _FINDING, "audit")
        return cls(**{name: value for name, value in data.items() if name != "kept"})


def chosen(levels: np.ndarray, level: int, chunk: int, seed: int) -> np.ndarray:
    """Return the samples of int64[n] levels that the audit of a level looks at; none of too few.

    Whole chunks, as the last one costs as much in part as in full.
    """
    members = np.flatnonzero(levels == level)
    if len(members) < _FEW:
        return members[:0]
    count = math.ceil(max(_LEAST, _SHARE * len(members)) / chunk) * chunk
    count = min(count, len(members))
    random = np.random.Generator(np.random.PCG64([seed, level]))
    return np.sort(random.choice(members, count, replace=False))


def audit(
    level: int,
    samples: np.ndarray,
    labels: np.ndarray,
    floor: float,
    compute: Callable[[int, np.ndarray], Arrays],
    chunk: int,
) -> Finding:
    """Compare what a level and level 0 make of int64[b] samples with int64[b] labels.

    compute: (level, samples) to features, for at most `chunk` samples a call.
    """
    original, proxy = (_all(samples, chunk, compute, number) for number in (0, level))
    worst = Finding(level, len(samples), 1.0, 0.0, floor)
    for name, value in original.items():
        similar = cosines(proxy[name], value)
        fidelity = float(similar.mean())
        if fidelity < worst.fidelity:
            error = float(similar.std(ddof=1) / math.sqrt(len(similar)))
            worst = Finding(level, len(samples), fidelity, error, floor)
    lost = points_lost(vectors(proxy), vectors(original), labels)
    return worst if lost is None else replace(worst, points_lost=lost[0], points_error=lost[1])


def cosines(proxy: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Return a cosine per sample, f64[b], centred and scaled as level 0's channels are spread."""
    axis = 1 if original.ndim in (2, 4) else original.ndim - 1  # tokens have their channels last
    others = tuple(at for at in range(original.ndim) if at != axis)
    mean = original.mean(axis=others, keepdims=True, dtype=np.float64)
    variance = original.var(axis=others, keepdims=True, dtype=np.float64)
    # A channel that hardly moves carries nothing; do not let its noise dominate.
    std = np.maximum(np.sqrt(variance), 1e-2 * math.sqrt(variance.mean()) + 1e-8)
    a, b = (((value - mean) / std).reshape(len(value), -1) for value in (proxy, original))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: np.ndarray = (a * b).sum(axis=1) / np.maximum(lengths, 1e-12)
    return result


def _all(
    samples: np.ndarray, chunk: int, compute: Callable[[int, np.ndarray], Arrays], level: int
) -> dict[str, np.ndarray]:
    parts = [
        compute(level, samples[start : start + chunk]) for start in range(0, len(samples), chunk)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
