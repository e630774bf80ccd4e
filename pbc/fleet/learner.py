"""Local training of a round: by the device's runtime, or on a table that all clients share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pbc.fleet.proximal import Proximal
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

        mu: weight of FedProx's term μ/2 ‖θ − theta‖², in every step.
        fresh: whether the optimizer's state begins at zero.
        """


@dataclass
class TrainerLearner:
    """A device: routing, cache and checkpoint are the runtime's."""

    trainer: Trainer
    proximal: Proximal
    photos: int

    @property
    def examples(self) -> int:
        return self.photos

    def train(
        self, theta: Theta, epochs: int, *, mu: float = 0.0, fresh: bool = False
    ) -> tuple[dict[str, np.ndarray], float]:
        self.trainer.set_parameters(theta, keep_optimizer=not fresh)
        self.proximal.pull(theta, mu)
        reports = self.trainer.run_round(epochs)
        return self.trainer.parameters(), reports[-1].loss


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
        executable, loss = Proximal(self.executable), 0.0
        executable.start(theta, self.objective)
        if self._state and not fresh:
            executable.load_optimizer_state(self._state)
        executable.pull(theta, mu)
        for _ in range(epochs):
            order = self.random.permutation(self.rows)
            losses = []
            for start in range(0, len(order), self.batch):
                rows = order[start : start + self.batch]
                chosen = {name: value[rows] for name, value in self.features.items()}
                losses.append(executable.forward(0, chosen, self.labels[rows])[0])
                executable.update()
            loss = float(np.concatenate(losses).mean())
        self._state = executable.optimizer_state()
        return executable.parameters(), loss
