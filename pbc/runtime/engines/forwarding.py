"""An executable that passes every call on to another: what changes one of them overrides it."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from pbc.runtime.engines import Arrays, Executable, NodeTimes, Shapes
from pbc.runtime.objective import Objective


class ForwardingExecutable:
    """The executable that it is made of."""

    def __init__(self, executable: Executable) -> None:
        self._executable = executable

    def foresee(self, inputs: Shapes) -> None:
        self._executable.foresee(inputs)

    def policy(self, views: np.ndarray) -> np.ndarray:
        return self._executable.policy(views)

    def prefix(self, level: int, images: np.ndarray) -> dict[str, np.ndarray]:
        return self._executable.prefix(level, images)

    def logits(self, level: int, features: Arrays) -> np.ndarray:
        return self._executable.logits(level, features)

    def start(self, parameters: Arrays, objective: Objective) -> None:
        self._executable.start(parameters, objective)

    def forward(
        self, level: int, features: Arrays, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        return self._executable.forward(level, features, labels)

    def update(self) -> None:
        self._executable.update()

    def gradients(self) -> dict[str, np.ndarray]:
        return self._executable.gradients()

    def select(self, names: Collection[str] | None) -> None:
        self._executable.select(names)

    def node_times(self) -> NodeTimes:
        return self._executable.node_times()

    def parameters(self) -> dict[str, np.ndarray]:
        return self._executable.parameters()

    def optimizer_state(self) -> dict[str, np.ndarray]:
        return self._executable.optimizer_state()

    def load_optimizer_state(self, state: Arrays) -> None:
        self._executable.load_optimizer_state(state)
