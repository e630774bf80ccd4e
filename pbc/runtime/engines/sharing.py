"""One loaded executable that several trainers share, each with its own θ and optimizer.

What an executable holds beside those, graphs and frozen weights, is most of its memory and all of
its loading time. Who trains changes seldom, between rounds; then θ and state are copied out and in.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from pbc.runtime.engines import Arrays, Executable, NodeTimes, Shapes
from pbc.runtime.objective import Objective


class SharedExecutable:
    """An executable, and whose parameters it holds at the moment. Not for several threads."""

    def __init__(self, executable: Executable) -> None:
        self._executable = executable
        self._holder: TrainerExecutable | None = None

    def for_trainer(self) -> Executable:
        """Return what looks to a trainer like an executable of its own."""
        return TrainerExecutable(self)

    def held_by(self, trainer: TrainerExecutable) -> Executable:
        """Return the executable with the parameters and the optimizer's state of a trainer."""
        if self._holder is not trainer:
            if self._holder is not None:
                self._holder.set_aside(self._executable)
            self._holder = trainer
            trainer.put_back(self._executable)
        return self._executable

    @property
    def frozen(self) -> Executable:
        """Return the executable for what reads no trained parameter."""
        return self._executable


@dataclass(frozen=True)
class _SetAside:
    """State of a trainer whose turn it is not."""

    objective: Objective
    parameters: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]


class TrainerExecutable:
    """One trainer's share of an executable; between `forward` and `update` it stays its turn."""

    def __init__(self, shared: SharedExecutable) -> None:
        self._shared = shared
        self._objective = Objective()
        self._selected: Collection[str] | None = None
        self._aside = _SetAside(self._objective, {}, {})

    def set_aside(self, executable: Executable) -> None:
        """Copy the state out, for another trainer's turn."""
        self._aside = _SetAside(
            self._objective, executable.parameters(), executable.optimizer_state()
        )

    def put_back(self, executable: Executable) -> None:
        """Copy the state in; before the first `start` there are no parameters."""
        executable.select(self._selected)
        executable.start(self._aside.parameters, self._aside.objective)
        executable.load_optimizer_state(self._aside.optimizer)

    def foresee(self, inputs: Shapes) -> None:
        self._shared.frozen.foresee(inputs)

    def policy(self, views: np.ndarray) -> np.ndarray:
        return self._shared.frozen.policy(views)

    def prefix(self, level: int, images: np.ndarray) -> dict[str, np.ndarray]:
        return self._shared.frozen.prefix(level, images)

    def logits(self, level: int, features: Arrays) -> np.ndarray:
        return self._shared.held_by(self).logits(level, features)

    def start(self, parameters: Arrays, objective: Objective) -> None:
        self._shared.held_by(self).start(parameters, objective)
        self._objective = objective

    def forward(
        self, level: int, features: Arrays, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        return self._shared.held_by(self).forward(level, features, labels)

    def update(self) -> None:
        self._shared.held_by(self).update()

    def gradients(self) -> dict[str, np.ndarray]:
        return self._shared.held_by(self).gradients()

    def select(self, names: Collection[str] | None) -> None:
        self._shared.held_by(self).select(names)
        self._selected = names

    def node_times(self) -> NodeTimes:
        return self._shared.held_by(self).node_times()

    def parameters(self) -> dict[str, np.ndarray]:
        return self._shared.held_by(self).parameters()

    def optimizer_state(self) -> dict[str, np.ndarray]:
        return self._shared.held_by(self).optimizer_state()

    def load_optimizer_state(self, state: Arrays) -> None:
        self._shared.held_by(self).load_optimizer_state(state)
