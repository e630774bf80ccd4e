"""The bundle as client and attacker run it: per-photo gradients, local training, averaging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pbc.audit.options import AuditOptions
from pbc.errors import PbcError
from pbc.fleet.protection import Protection
from pbc.fleet.vector import flatten, unflatten
from pbc.runtime.engines import Executable
from pbc.runtime.evaluation import log_softmax

_CHUNK = 32


@dataclass
class Network:
    """θ on the level-0 features of all photos, which are computed once.

    features: f32[n, …] each. labels: int64[n]. start: θ before anything is shared.
    """

    executable: Executable
    features: dict[str, np.ndarray]
    labels: np.ndarray
    classes: int
    start: dict[str, np.ndarray]
    batch: int
    options: AuditOptions

    @property
    def rate(self) -> float:
        """Return by how much a step moves θ along a gradient in the long run."""
        objective = self.options.objective
        momentum = objective.momentum if objective.optimizer == "sgd" else 0.0
        return objective.learning_rate / (1 - momentum)

    def gradient(self, photos: np.ndarray) -> np.ndarray:
        """Return f32[d], the gradient of the mean loss of int64[b] photos at the start."""
        self.executable.forward(0, self._of(photos), self.labels[photos])
        return _finite(flatten(self.executable.gradients(), self.start), "a gradient")

    def gradients(self, photos: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return f32[b, columns], some values of each photo's own gradient at the start."""
        self.begin()
        found = np.empty((len(photos), len(columns)), np.float32)
        for row, photo in enumerate(photos):
            found[row] = self.gradient(np.array([photo]))[columns]
        return found

    def begin(self) -> None:
        """Set θ to the start, with a fresh optimizer."""
        self.executable.start(self.start, self.options.objective)

    def trained(
        self, theta: dict[str, np.ndarray], photos: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        """Return f32[d], by how much epochs on int64[n] photos move θ."""
        self.executable.start(theta, self.options.objective)
        for _ in range(self.options.epochs):
            order = random.permutation(photos)
            for begin in range(0, len(order), self.batch):
                chosen = order[begin : begin + self.batch]
                self.executable.forward(0, self._of(chosen), self.labels[chosen])
                self.executable.update()
        moved = flatten(self.executable.parameters(), theta) - flatten(theta, theta)
        return _finite(moved, "an update")

    def averaged(
        self, shards: Sequence[np.ndarray], protection: Protection, random: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Return θ after rounds of federated averaging (McMahan et al., 2017), by photos."""
        theta = self.start
        residuals = [np.zeros_like(flatten(theta, theta)) for _ in shards]
        shares = np.array([len(shard) for shard in shards]) / sum(map(len, shards))
        for _ in range(self.options.rounds):
            total = flatten(theta, theta)
            for client, shard in enumerate(shards):
                update = self.trained(theta, shard, random)
                sent, residuals[client] = protection(update, residuals[client], random)
                total = total + np.float32(shares[client]) * sent
            theta = unflatten(total, theta)
        return theta

    def accuracy(self, theta: dict[str, np.ndarray], photos: np.ndarray) -> float:
        """Return the share of int64[n] photos that θ classifies rightly."""
        return float((self.probabilities(theta, photos).argmax(1) == self.labels[photos]).mean())

    def probabilities(self, theta: dict[str, np.ndarray], photos: np.ndarray) -> np.ndarray:
        """Return f64[n, classes] of int64[n] photos."""
        self.executable.start(theta, self.options.objective)
        parts = [
            log_softmax(self.executable.logits(0, self._of(photos[begin : begin + _CHUNK])))
            for begin in range(0, len(photos), _CHUNK)
        ]
        found: np.ndarray = np.exp(np.concatenate(parts))
        return found

    def _of(self, photos: np.ndarray) -> dict[str, np.ndarray]:
        return {name: value[photos] for name, value in self.features.items()}


def _finite(shared: np.ndarray, what: str) -> np.ndarray:
    """Return what a client would share; raises PbcError where no server would take it."""
    if not np.isfinite(shared).all():
        raise PbcError(f"{what} is not finite: lower the learning rate, or look into the bundle")
    return shared
