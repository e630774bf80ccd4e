"""The head in closed form: linear discriminant analysis with a shrunk covariance.

Classes are taken for Gaussians of one covariance, as in Friedman, Regularized Discriminant Analysis
(JASA 1989), §2 and §3, with the covariance's own diagonal as what it is shrunk towards. Everything
that is needed are sums over the samples, so a head exists after the first of them, and what was
seen need not be kept. Of the sums a head is one Cholesky factorisation and one triangular solve:
of the covariance [d, d], or, of few samples n, of their products [n, n] (Woodbury, 1950).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pbc.errors import PbcError

SHRINKAGES = (0.03, 0.1, 0.3, 0.7)
MOST_WIDTH = 8192
"""Numbers that a head reads, of which the sums are matrices of 512 MiB."""

_SUMS = ("counts", "origin", "sums", "kept", "kept_labels")
# Rows that are added to the sums together: a product of fewer is bound by writing [d, d].
_BLOCK = 256
# Samples of a seeded choice whose features are kept to choose the shrinkage by.
_KEPT = 1024
# Columns per step of a triangular solve: numpy has none, only products and small general solves.
_PANEL = 64
# Of the width: with at most so many samples their products are cheaper than their scatter.
_FEW = 0.5
# Of the mean variance of all samples, added to each channel's: some never change in a class.
_LEAST_VARIANCE = 1e-4
# Shrinkage by (width / samples)², of MobileNetV3 on 400 to 5,784 photos of 101 classes.
_GUESSED = 0.3
# Kept rows that judge a head for the time being.
_GLANCED = 128
# Fewer photos judge nothing. Where nearly all of 12 or 16 were right, MobileNetV3's logits became
# so steep that the loss on other photos of their four classes was 22 and 2.7; guessing has 1.4.
LEAST_JUDGES = 20
# By the width, the factor of logits that nothing judges: channels depend on each other. The best
# for other photos were 2^-8 to 2^-6, of one to four photos a class and 1,280 channels.
_UNJUDGED_SHARPNESS = 4.0
# Factors of the logits, for probabilities that mean what they say.
_SHARPNESS = tuple(2.0 ** (step / 2) for step in range(-16, 5))


@dataclass(frozen=True)
class Head:
    """A linear head and how it was found: weight f32[C, d], bias f32[C].

    sharpness: factor of the logits. accuracy, loss: of `judged` samples, each by the head that
    would be without it; None where there are too few of them to judge it, and `judged` is 0.
    """

    weight: np.ndarray
    bias: np.ndarray
    shrinkage: float
    sharpness: float
    accuracy: float | None
    loss: float | None
    judged: int

    def facts(self) -> dict[str, float | int | None]:
        """Return the JSON-able facts, without the weights."""
        return {
            "shrinkage": self.shrinkage,
            "sharpness": self.sharpness,
            "left_out_accuracy": self.accuracy,
            "left_out_loss": self.loss,
            "judged": self.judged,
        }

    def better_than(self, other: Head) -> bool:
        """Say whether it is right more often, or as often and surer; both were judged."""
        assert self.accuracy is not None
        assert self.loss is not None
        assert other.accuracy is not None
        assert other.loss is not None
        return (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


class ClassStatistics:
    """Counts, sums and one scatter matrix of labelled feature vectors, grown by batches.

    Memory: f64[C, d], at most 1,280 rows of f32[d], and f64[d, d] where samples are not few. The
    sums depend on the order of the samples, not on how they were batched, so a run that was
    interrupted ends at the same bits.
    """

    def __init__(self, classes: int, width: int, seed: int) -> None:
        self._seed = seed
        self._counts = np.zeros(classes, np.int64)
        # About `origin`, so that nothing large cancels.
        self._origin = np.zeros(width)
        self._sums = np.zeros((classes, width))
        # None while all rows are kept and few.
        self._scatter: np.ndarray | None = None
        self._kept = np.zeros((0, width), np.float32)
        self._kept_labels = np.zeros(0, np.int64)
        self._pending = np.zeros((_BLOCK, width), np.float32)
        self._pending_labels = np.zeros(_BLOCK, np.int64)
        self._waiting = 0

    @property
    def count(self) -> int:
        """Return how many samples were added."""
        return int(self._counts.sum()) + self._waiting

    def add(self, rows: np.ndarray, labels: np.ndarray) -> None:
        """Take f32[b, d] feature vectors with int64[b] labels."""
        while len(rows):
            taken = rows[: _BLOCK - self._waiting]
            end = self._waiting + len(taken)
            self._pending[self._waiting : end] = taken
            self._pending_labels[self._waiting : end] = labels[: len(taken)]
            self._waiting = end
            if end == _BLOCK:
                self._fold()
            rows, labels = rows[len(taken) :], labels[len(taken) :]

    def state(self) -> dict[str, np.ndarray]:
        """Return all sums and kept rows, for a checkpoint."""
        return {
            **{name: getattr(self, f"_{name}") for name in _SUMS},
            **({} if self._scatter is None else {"scatter": self._scatter}),
            "pending": self._pending[: self._waiting],
            "pending_labels": self._pending_labels[: self._waiting],
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state` returned."""
        for name in _SUMS:
            setattr(self, f"_{name}", state[name].copy())
        self._scatter = state["scatter"].copy() if "scatter" in state else None
        self._waiting = len(state["pending"])
        self._pending[: self._waiting] = state["pending"]
        self._pending_labels[: self._waiting] = state["pending_labels"]

    def solve(self) -> Head:
        """Return the head of all that was added, its shrinkage chosen by cross-validation.

        Leave-one-out on the kept rows; those of classes that have no second sample do not judge.
        From the guess on, shrinkages are tried while they get better; where too few rows judge, it
        is the guess. Raises PbcError where a feature is not finite.
        """
        analysis = _Analysis.of(self._with_pending())
        first = SHRINKAGES.index(self._guess())
        if not len(analysis.judges):
            return analysis.judged(SHRINKAGES[first])
        best = start = analysis.judged(SHRINKAGES[first])
        for others in (SHRINKAGES[first + 1 :], SHRINKAGES[:first][::-1]):
            for shrinkage in others:
                head = analysis.judged(shrinkage)
                if not head.better_than(best):
                    break
                best = head
            if best is not start:
                break
        return best

    def glance(self) -> Head:
        """Return a head for the time being, of the guessed shrinkage, judged by fewer rows."""
        return _Analysis.of(self._with_pending()).judged(self._guess(), most=_GLANCED)

    def solve_like(self, facts: Mapping[str, Any]) -> Head:
        """Return the head of all that was added, found as `facts` of another one say."""
        return _Analysis.of(self._with_pending()).like(facts)

    def _guess(self) -> float:
        strength = _GUESSED * (len(self._origin) / self.count) ** 2
        return min(SHRINKAGES, key=lambda known: abs(math.log(known / strength)))

    def _with_pending(self) -> ClassStatistics:
        if not self._waiting:
            return self
        whole = ClassStatistics(len(self._counts), len(self._origin), self._seed)
        whole.load_state(self.state())
        whole._fold()
        return whole

    def _fold(self) -> None:
        """Add the rows that are waiting to the sums."""
        rows, labels = self._pending[: self._waiting], self._pending_labels[: self._waiting]
        seen = int(self._counts.sum())
        if seen == 0:
            self._origin = rows.mean(axis=0, dtype=np.float64)
        centred = rows - self._origin
        # By a product, not by np.add.at, which is slow; few classes are in a block.
        present, inverse = np.unique(labels, return_inverse=True)
        members = (inverse[None] == np.arange(len(present))[:, None]).astype(np.float64)
        self._sums[present] += members @ centred
        self._counts += np.bincount(labels, minlength=len(self._counts))
        if self._scatter is None and seen + len(rows) > min(_KEPT, _FEW * len(self._origin)):
            before = self._kept - self._origin
            self._scatter = before.T @ before
        if self._scatter is not None:
            self._scatter += centred.T @ centred
        self._keep(seen, rows, labels)
        self._waiting = 0

    def _keep(self, seen: int, rows: np.ndarray, labels: np.ndarray) -> None:
        """Keep a uniform choice of all rows so far (Vitter, reservoir sampling, 1985)."""
        room = min(_KEPT - len(self._kept), len(rows))
        self._kept = np.concatenate([self._kept, rows[:room]])
        self._kept_labels = np.concatenate([self._kept_labels, labels[:room]])
        random = np.random.Generator(np.random.PCG64([self._seed, seen]))
        slots = random.integers(0, np.arange(seen + room, seen + len(rows)) + 1)
        for at, slot in enumerate(slots.tolist(), start=room):
            if slot < _KEPT:
                self._kept[slot], self._kept_labels[slot] = rows[at], labels[at]


@dataclass(frozen=True)
class _Solved:
    """Σ⁻¹ of a shrunk covariance between class means m and samples r.

    weight: f64[C, d], the means by Σ⁻¹. means, between, samples: m·m f64[C, C], r·m f64[n, C] and
    each sample by itself, r·r f64[n].
    """

    weight: np.ndarray
    means: np.ndarray
    between: np.ndarray
    samples: np.ndarray


@dataclass(frozen=True)
class _Analysis:
    """What all shrinkages share. means: f64[C, d] about `origin`; `judges`, kept rows, likewise.

    diagonal: of the covariance f64[d, d], whose rest is in `covariance`, or, of few samples, in
    their `deviations` f64[n, d] from their classes' means.
    """

    origin: np.ndarray
    counts: np.ndarray
    degrees: int
    means: np.ndarray
    diagonal: np.ndarray
    covariance: np.ndarray | None
    deviations: np.ndarray | None
    log_priors: np.ndarray
    judges: np.ndarray
    judges_labels: np.ndarray

    @classmethod
    def of(cls, sums: ClassStatistics) -> _Analysis:
        counts, total = sums._counts, int(sums._counts.sum())
        present = counts > 0
        # A class without a sample is thought to be like all others together, and rare.
        means = np.broadcast_to(sums._sums.sum(axis=0) / total, sums._sums.shape).copy()
        means[present] = sums._sums[present] / counts[present, None]
        degrees = max(total - int(present.sum()), 1)
        kept = sums._kept - sums._origin
        covariance = deviations = None
        if sums._scatter is None:
            spread = (kept**2).mean(axis=0)
            deviations = kept - means[sums._kept_labels]
            within = (deviations**2).sum(axis=0) / degrees
        else:
            spread = np.einsum("ii->i", sums._scatter) / total
            covariance = (sums._scatter - sums._sums[present].T @ means[present]) / degrees
            within = np.einsum("ii->i", covariance)
        if not np.isfinite(spread).all():
            raise PbcError("a feature is not finite; no head can be made of that")
        if counts.max() == 1:  # nothing is known within any class: all together stand for each
            within = spread
        usable = counts[sums._kept_labels] > 1  # without its only sample a class is not known
        if usable.sum() < LEAST_JUDGES:
            usable[:] = False
        return cls(
            sums._origin,
            counts,
            degrees,
            means,
            np.maximum(within, 0) + max(_LEAST_VARIANCE * spread.mean(), 1e-12),
            covariance,
            deviations,
            np.log(np.maximum(counts, 0.5) / total),
            kept[usable],
            sums._kept_labels[usable],
        )

    def judged(self, shrinkage: float, most: int = _KEPT) -> Head:
        """Return the head of a shrinkage, judged by at most so many of the rows that can."""
        rows, labels = self.judges[:most], self.judges_labels[:most]
        solved = self._solved(rows, shrinkage)
        if not len(rows):
            sharpness = min(1.0, _UNJUDGED_SHARPNESS / len(self.origin))
            return self._head(solved, shrinkage, sharpness, None, None, 0)
        scores = self._left_out(solved, labels, shrinkage)
        loss, sharpness = _sharpest(scores, labels)
        accuracy = float((scores.argmax(axis=1) == labels).mean())
        return self._head(solved, shrinkage, sharpness, accuracy, loss, len(labels))

    def like(self, facts: Mapping[str, Any]) -> Head:
        """Return the head of another one's shrinkage and sharpness; it is not judged anew."""
        shrinkage = facts["shrinkage"]
        return self._head(
            self._solved(self.judges[:0], shrinkage),
            shrinkage,
            facts["sharpness"],
            facts["left_out_accuracy"],
            facts["left_out_loss"],
            facts["judged"],
        )

    def _head(
        self,
        solved: _Solved,
        shrinkage: float,
        sharpness: float,
        accuracy: float | None,
        loss: float | None,
        judged: int,
    ) -> Head:
        offsets = 0.5 * np.einsum("ii->i", solved.means) + solved.weight @ self.origin
        return Head(
            (sharpness * solved.weight).astype(np.float32),
            (sharpness * (self.log_priors - offsets)).astype(np.float32),
            shrinkage,
            sharpness,
            accuracy,
            loss,
            judged,
        )

    def _solved(self, rows: np.ndarray, shrinkage: float) -> _Solved:
        """Solve the shrunk covariance for the means and these rows."""
        classes = len(self.means)
        both = np.concatenate([self.means, rows])
        if self.covariance is not None:
            shrunk = (1 - shrinkage) * self.covariance
            np.einsum("ii->i", shrunk)[:] = self.diagonal
            factor = np.linalg.cholesky(shrunk)
            white = solve_lower(factor, both.T).T
            means, samples = white[:classes], white[classes:]
            return _Solved(
                solve_upper(factor, means.T).T,
                means @ means.T,
                samples @ means.T,
                (samples**2).sum(axis=1),
            )
        # Σ = D + Zᵀ Z: with white ones for D = 1, Σ⁻¹ = 1 − Zᵀ (1 + Z Zᵀ)⁻¹ Z.
        assert self.deviations is not None
        scaled = np.sqrt((1 - shrinkage) / self.degrees) * self.deviations
        scale = (self.diagonal - (scaled**2).sum(axis=0)) ** -0.5
        scaled, white = scale * scaled, scale * both
        factor = np.linalg.cholesky(np.eye(len(scaled)) + scaled @ scaled.T)
        lost = solve_lower(factor, scaled @ white.T).T
        means, samples = white[:classes], white[classes:]
        means_lost, samples_lost = lost[:classes], lost[classes:]
        return _Solved(
            scale * (means - solve_upper(factor, means_lost.T).T @ scaled),
            means @ means.T - means_lost @ means_lost.T,
            samples @ means.T - samples_lost @ means_lost.T,
            (samples**2).sum(axis=1) - (samples_lost**2).sum(axis=1),
        )

    def _left_out(self, solved: _Solved, labels: np.ndarray, shrinkage: float) -> np.ndarray:
        """Return f64[n, C]: scores of samples by the heads that would be without each.

        Without a sample its class's mean moves, and the scatter loses a product of rank one, whose
        inverse is known (Sherman and Morrison; Friedman 1989, §6). The diagonal stays.
        """
        own = (np.arange(len(labels)), labels)
        samples, between = solved.samples[:, None], solved.between
        # The deviation from the own mean, by what separates the sample from each mean.
        towards = samples - between[own][:, None] - between + solved.means[labels]
        distances = samples - 2 * between + np.einsum("ii->i", solved.means)
        count = self.counts[labels].astype(np.float64)
        weight = (1 - shrinkage) / self.degrees * count / (count - 1)
        gain = weight / np.maximum(1 - weight * towards[own], 1e-3)
        distances += gain[:, None] * towards**2
        distances[own] *= (count / (count - 1)) ** 2
        scores: np.ndarray = self.log_priors - 0.5 * distances
        return scores


def solve_lower(factor: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return X of factor @ X = right, for a lower triangular f64[d, d] and f64[d, k]."""
    solution = np.empty_like(right)
    for start in range(0, len(factor), _PANEL):
        panel = slice(start, start + _PANEL)
        rest = right[panel] - factor[panel, :start] @ solution[:start]
        solution[panel] = np.linalg.solve(factor[panel, panel], rest)
    return solution


def solve_upper(factor: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return X of factor.T @ X = right, likewise."""
    solved = solve_lower(factor.T[::-1, ::-1], right[::-1])
    return solved[::-1]


def _sharpest(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the least mean cross-entropy of f64[m, C] scores times a factor, and the factor."""
    own = np.arange(len(labels))
    losses = []
    for factor in _SHARPNESS:
        scaled = factor * (scores - scores.max(axis=1, keepdims=True))
        losses.append(float((np.log(np.exp(scaled).sum(axis=1)) - scaled[own, labels]).mean()))
    best = int(np.argmin(losses))
    return losses[best], _SHARPNESS[best]
