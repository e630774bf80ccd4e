"""Attacks on one update, in numpy: whose photos are in it, with which labels and features.

The attacker has the bundle, θ before the update, and candidate photos, the true ones among them. A
gradient is a weighted sum of the candidates' gradients, an update nearly one: a regression on them
has the weights. Nothing is tuned with knowledge of the truth.
"""

from __future__ import annotations

import numpy as np

_RIDGES = 10.0 ** np.arange(-9, 4)
_ITERATIONS = 500


class Candidates:
    """Photos that the attacker has, and each one's own gradient, whatever update is attacked.

    gradients: f32[n, d], of those d values that the attacker looks at.
    """

    def __init__(self, gradients: np.ndarray) -> None:
        self._gradients = gradients.astype(np.float64)
        self._spectra: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def weights(
        self, photos: np.ndarray, update: np.ndarray, seen: np.ndarray | None = None
    ) -> np.ndarray:
        """Return f64[m]: how much of each of int64[m] photos is in an update, by regression.

        update: f32[d], in the direction of the gradients. seen: bool[d], which of its values were
        sent, if not all. A ridge regression, its ridge chosen by generalised cross-validation
        (Golub, Heath and Wahba, 1979); where compression leaves fewer values than there are
        photos, non-negative least squares, which find a mixture of few all the same.
        """
        target = update.astype(np.float64)
        target = target / (float(np.linalg.norm(target)) or 1.0)
        if seen is None:
            if photos.tobytes() not in self._spectra:
                self._spectra[photos.tobytes()] = _spectrum(self._gradients[photos])
            products = (self._gradients @ target)[photos]
            return _ridge(*self._spectra[photos.tobytes()], products, target)
        columns = self._gradients[np.ix_(photos, np.flatnonzero(seen))]
        target = target[seen]
        if len(target) < len(columns):
            return _non_negative(columns, target)
        return _ridge(*_spectrum(columns), columns @ target, target)


def _spectrum(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues f64[k] and vectors f64[n, k] of the products of f64[n, d], not the zeros.

    It is what takes long of a regression, and the same for all updates.
    """
    values, vectors = np.linalg.eigh(columns @ columns.T)
    kept = values > max(values[-1] * 1e-12, 0.0)
    return values[kept], vectors[:, kept]


def _ridge(
    values: np.ndarray, vectors: np.ndarray, products: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """Minimise ‖wᵀ columns − target‖² + ridge ‖w‖²; products: f64[n], columns @ target."""
    if not len(values):
        return np.zeros_like(products)
    projected = vectors.T @ products
    # The share of the target along each singular direction; the rest no candidate explains.
    shares = projected**2 / values
    rest = max(float(target @ target) - float(shares.sum()), 0.0)
    scores = []
    for ridge in _RIDGES * values.mean():
        left = ridge / (values + ridge)
        freedom = len(target) - float((1 - left).sum())
        residual = rest + float((left**2 * shares).sum())
        scores.append(residual / max(freedom, 1e-9) ** 2)
    ridge = _RIDGES[int(np.argmin(scores))] * values.mean()
    found: np.ndarray = vectors @ (projected / (values + ridge))
    return found


def _non_negative(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Minimise ‖wᵀ columns − target‖ over w ≥ 0 (accelerated projected gradient, FISTA)."""
    columns = columns / (float(np.linalg.norm(columns, axis=1).mean()) or 1.0)
    correlation = columns @ target
    step = 1 / max(float(np.linalg.norm(columns, 2)) ** 2, 1e-30)
    found = ahead = np.zeros(len(columns))
    for iteration in range(_ITERATIONS):
        last = found
        found = np.maximum(ahead - step * (columns @ (ahead @ columns - target)), 0)
        ahead = found + iteration / (iteration + 3) * (found - last)
    # Among those that are in no solution, the most alike come first.
    sizes = np.maximum(np.linalg.norm(columns, axis=1), 1e-30)
    scores: np.ndarray = found + 1e-6 * correlation / sizes
    return scores


def auc(scores: np.ndarray, member: np.ndarray) -> float | None:
    """Return the probability that a member scores above another; ties count half.

    member: bool[n]. None where there are not both.
    """
    inside, outside = scores[member], np.sort(scores[~member])
    if not len(inside) or not len(outside):
        return None
    below = np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")
    return float(below.mean() / (2 * len(outside)))


def auc_within(scores: np.ndarray, member: np.ndarray, labels: np.ndarray) -> float | None:
    """Return `auc` over pairs of one class; over all, classes alone may tell members apart."""
    total, pairs = 0.0, 0
    for label in np.unique(labels).tolist():
        here = labels == label
        value = auc(scores[here], member[here])
        if value is not None:
            count = int(member[here].sum()) * int((~member[here]).sum())
            total, pairs = total + value * count, pairs + count
    return total / pairs if pairs else None


def identified(scores: np.ndarray, member: np.ndarray) -> float:
    """Return which share of the members are among as many highest scores as there are members."""
    count = int(member.sum())
    first = np.argsort(-scores, kind="stable")[:count]
    return float(member[first].mean())


def labels_named(bias: np.ndarray, probabilities: np.ndarray, count: int) -> np.ndarray:
    """Return int64[classes], how often an attacker without any photo names each label.

    bias: f64[classes], minus the mean gradient of the head's bias, which is the share of each label
    less its mean probability (Zhao et al., iDLG, 2020, for one photo). probabilities: f64[classes],
    what the network gives each class on average. count: of the photos behind the gradient.
    """
    if count == 1:  # the one positive entry
        return np.bincount([int(bias.argmax())], minlength=len(bias))
    expected = np.maximum(bias + probabilities, 0) * count
    guessed: np.ndarray = np.floor(expected).astype(np.int64)
    for label in np.argsort(guessed - expected, kind="stable")[
        : max(count - int(guessed.sum()), 0)
    ]:
        guessed[label] += 1
    return guessed


def labels_recovered(bias: np.ndarray, probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return which share of a batch's labels `labels_named` finds; labels: int64[n], the truth."""
    guessed = labels_named(bias, probabilities, len(labels))
    true = np.bincount(labels, minlength=len(bias))
    return float(np.minimum(guessed, true).sum() / len(labels))


def cosine(found: np.ndarray, true: np.ndarray, mean: np.ndarray) -> float:
    """Return the cosine of two vectors f[d] about the mean of all, 0 for none."""
    a, b = (np.asarray(value, np.float64) - mean for value in (found, true))
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 0 else 0.0
