"""FedProx's term inside the steps, whatever the engine: derived graphs know one loss."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from pbc.runtime.engines import Arrays, Executable
from pbc.runtime.engines.forwarding import ForwardingExecutable
from pbc.runtime.objective import Objective


class Proximal(ForwardingExecutable):
    """An executable whose every update is followed by a gradient step of μ/2 ‖θ − centre‖².

    That step leaves the optimizer's state alone, so momentum is the loss' own (Li et al., 2020,
    with plain SGD have the two as one). Without a centre it is the executable itself.
    """

    def __init__(self, executable: Executable) -> None:
        super().__init__(executable)
        self._objective = Objective()
        self._centre: Arrays = {}
        self._mu = 0.0
        self._selected: Collection[str] | None = None

    def pull(self, centre: Arrays, mu: float) -> None:
        """Pull towards a centre from now on; 0 pulls no more."""
        self._centre, self._mu = centre, mu

    def start(self, parameters: Arrays, objective: Objective) -> None:
        self._objective = objective
        super().start(parameters, objective)

    def select(self, names: Collection[str] | None) -> None:
        self._selected = names
        super().select(names)

    def update(self) -> None:
        super().update()
        if self._mu:
            share = self._objective.learning_rate * self._mu
            state, theta = self.optimizer_state(), self.parameters()
            moved = theta if self._selected is None else {n: theta[n] for n in self._selected}
            super().start({**theta, **towards(moved, self._centre, share)}, self._objective)
            self.load_optimizer_state(state)


def towards(theta: Arrays, centre: Arrays, share: float) -> dict[str, np.ndarray]:
    """Return θ after a share of its way to a centre, which it does not go beyond."""
    left = np.float32(max(1 - share, 0.0))
    return {name: centre[name] + left * (value - centre[name]) for name, value in theta.items()}
