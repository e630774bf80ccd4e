"""Local training of a round: by the device's runtime, or on a table that all clients share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pbc.runtime.engines import Executable
from pbc.runtime.objective import Objective
from pbc.runtime.trainer import Trainer

Theta = Mapping[str, np.ndarray]


class Learner(Protocol):
    """One client's photos, and the optimizer's state, which it keeps between rounds."""

    @property
    def examples(self) -> int:
        """Return the number of photos."""

    def train(
        self, theta: Theta, epochs: int, *, mu: float = 0.0, fresh: bool = False
    ) -> tuple[dict[str, np.ndarray], float]:
        """Return θ after epochs from `theta`, and the last epoch's mean loss.

        mu: weight of FedProx's term μ/2 ‖θ − theta‖² (Li et al., 2020). Its gradient steps are
        taken after each epoch, as many as the epoch had: derived graphs know no other loss.
        fresh: whether the optimizer's state begins at zero.
        """


@dataclass
class TrainerLearner:
    """A device: routing, cache and checkpoint are the runtime's."""

    trainer: Trainer
    photos: int

    @property
    def examples(self) -> int:
        return self.photos

    def train(
        self, theta: Theta, epochs: int, *, mu: float = 0.0, fresh: bool = False
    ) -> tuple[dict[str, np.ndarray], float]:
        self.trainer.set_parameters(theta, keep_optimizer=not fresh)
        loss = 0.0
        for _ in range(epochs):
            (report,) = self.trainer.run_round(1)
            loss = report.loss
            if mu:
                rate = self.trainer.objective.learning_rate
                near = towards(self.trainer.parameters(), theta, rate * mu, report.steps)
                self.trainer.set_parameters(near, keep_optimizer=True)
        return self.trainer.parameters(), loss


@dataclass
class TableLearner:
    """A simulated client: rows of a table of level-0 features, trained on the one executable.

    features: f32[n, …] each, labels: int64[n], of all photos; rows: int64[m], the client's.
    """

    executable: Executable
    features: Mapping[str, np.ndarray]
    labels: np.ndarray
    rows: np.ndarray
    objective: Objective
    batch: int
    random: np.random.Generator
    _state: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def examples(self) -> int:
        return len(self.rows)

    def train(
        self, theta: Theta, epochs: int, *, mu: float = 0.0, fresh: bool = False
    ) -> tuple[dict[str, np.ndarray], float]:
        executable, loss = self.executable, 0.0
        if fresh:
            self._state = {}
        self._begin(theta)
        for _ in range(epochs):
            order = self.random.permutation(self.rows)
            starts, losses = range(0, len(order), self.batch), []
            for start in starts:
                rows = order[start : start + self.batch]
                chosen = {name: value[rows] for name, value in self.features.items()}
                losses.append(executable.forward(0, chosen, self.labels[rows])[0])
                executable.update()
            loss = float(np.concatenate(losses).mean())
            self._state = executable.optimizer_state()
            if mu:
                rate = self.objective.learning_rate
                self._begin(towards(executable.parameters(), theta, rate * mu, len(starts)))
        return executable.parameters(), loss

    def _begin(self, theta: Theta) -> None:
        self.executable.start(theta, self.objective)
        if self._state:
            self.executable.load_optimizer_state(self._state)


def towards(theta: Theta, centre: Theta, rate: float, steps: int) -> dict[str, np.ndarray]:
    """Return θ after gradient steps of ½ ‖θ − centre‖² at a rate."""
    left = np.float32(max(1 - rate, 0.0) ** steps)
    return {name: centre[name] + left * (value - centre[name]) for name, value in theta.items()}
