"""FedProx's term inside the steps, whatever the engine: derived graphs know one loss."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from pbc.runtime.engines import Executable, NodeTimes, Shapes
from pbc.runtime.objective import Objective

Arrays = Mapping[str, np.ndarray]


class Proximal:
    """An executable whose every update is followed by a gradient step of μ/2 ‖θ − centre‖².

    That step leaves the optimizer's state alone, so momentum is the loss' own (Li et al., 2020,
    with plain SGD have the two as one). Without a centre it is the executable itself.
    """

    def __init__(self, executable: Executable) -> None:
        self._executable = executable
        self._objective = Objective()
        self._centre: Arrays = {}
        self._mu = 0.0
        self._selected: Collection[str] | None = None

    def pull(self, centre: Arrays, mu: float) -> None:
        """Pull towards a centre from now on; 0 pulls no more."""
        self._centre, self._mu = centre, mu

    def foresee(self, inputs: Shapes) -> None:
        self._executable.foresee(inputs)

    def policy(self, views: np.ndarray) -> np.ndarray:
        return self._executable.policy(views)

    def prefix(self, level: int, images: np.ndarray) -> dict[str, np.ndarray]:
        return self._executable.prefix(level, images)

    def logits(self, level: int, features: Arrays) -> np.ndarray:
        return self._executable.logits(level, features)

    def start(self, parameters: Arrays, objective: Objective) -> None:
        self._objective = objective
        self._executable.start(parameters, objective)

    def forward(
        self, level: int, features: Arrays, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        return self._executable.forward(level, features, labels)

    def update(self) -> None:
        self._executable.update()
        if self._mu:
            share = self._objective.learning_rate * self._mu
            state = self._executable.optimizer_state()
            theta = self._executable.parameters()
            moved = theta if self._selected is None else {n: theta[n] for n in self._selected}
            near = {**theta, **towards(moved, self._centre, share)}
            self._executable.start(near, self._objective)
            self._executable.load_optimizer_state(state)

    def gradients(self) -> dict[str, np.ndarray]:
        return self._executable.gradients()

    def select(self, names: Collection[str] | None) -> None:
        self._selected = names
        self._executable.select(names)

    def node_times(self) -> NodeTimes:
        return self._executable.node_times()

    def parameters(self) -> dict[str, np.ndarray]:
        return self._executable.parameters()

    def optimizer_state(self) -> dict[str, np.ndarray]:
        return self._executable.optimizer_state()

    def load_optimizer_state(self, state: Arrays) -> None:
        self._executable.load_optimizer_state(state)


def towards(theta: Arrays, centre: Arrays, share: float) -> dict[str, np.ndarray]:
    """Return θ after a share of its way to a centre, which it does not go beyond."""
    left = np.float32(max(1 - share, 0.0))
    return {name: centre[name] + left * (value - centre[name]) for name, value in theta.items()}
