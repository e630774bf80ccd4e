"""The two protocols between the runtime and the engine that executes a bundle.

Everything that crosses this border is a numpy array by name, so that the runtime knows no engine.
Images and 4-D features are [B, C, H, W]; an engine may return, and accepts, views of NHWC memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pbc.bundle import Bundle
from pbc.runtime.objective import Objective

Arrays = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class NodeTimes:
    """What the operators of an update take.

    node_ms: milliseconds by node. needed: the nodes that a parameter's new values need, by
    parameter, in the order in which they are made.
    """

    node_ms: Mapping[str, float]
    needed: Mapping[str, frozenset[str]]

    def ms(self, nodes: Iterable[str]) -> float:
        """Return what these nodes take together."""
        return sum(self.node_ms.get(node, 0.0) for node in nodes)


class Executable(Protocol):
    """A loaded bundle that runs and trains; levels are loaded when they are first used."""

    def foresee(self, inputs: Shapes) -> None:
        """Refuse shapes of features and parameters that level 0's body cannot take within bounds.

        It is asked before there are any: no file of a bundle need be as large as a manifest says
        that they are. Raises PbcError, or what the engine raises.
        """

    def policy(self, views: np.ndarray) -> np.ndarray:
        """Return the predicted fidelity of levels 1…N, f32[B, N], of f32[B, C, h, w] views."""

    def prefix(self, level: int, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return the features of f32[B, C, H, W] that the body reads; without a prefix, as `x`."""

    def logits(self, level: int, features: Arrays) -> np.ndarray:
        """Return f32[B, classes] at the current parameters; keep nothing for a backward."""

    def start(self, parameters: Arrays, objective: Objective) -> None:
        """Set the trainable parameters; begin with a fresh state of the objective's optimizer."""

    def forward(
        self, level: int, features: Arrays, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return losses f32[B] and logits f32[B, classes]; keep what `update` needs.

        The losses are those of the smoothed labels.
        """

    def update(self) -> None:
        """Run the backward of the last forward's mean loss, and one step of the optimizer."""

    def gradients(self) -> dict[str, np.ndarray]:
        """Return the gradients of the last forward's mean loss, f32, by parameter; change nothing.

        A parameter that the loss does not depend on is missing. `update` may follow.
        """

    def select(self, names: Collection[str] | None) -> None:
        """Train these parameters alone from the next forward on; None: all of them.

        The others, and their state, stay as they are. What only they need is neither computed nor
        kept. Raises PbcError where the engine cannot.
        """

    def node_times(self) -> NodeTimes:
        """Measure the operators of the update after the last forward; change nothing.

        Raises PbcError where the engine cannot.
        """

    def parameters(self) -> dict[str, np.ndarray]:
        """Copy the trainable parameters out."""

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """Copy the optimizer's state out, by names like `momentum/fc.weight` or `step`."""

    def load_optimizer_state(self, state: Arrays) -> None:
        """Set what `optimizer_state` returned."""


class Engine(Protocol):
    """Loads bundles; the object of an entry point in the group `pbc.engines` makes one."""

    name: str

    def version(self) -> str:
        """Name everything whose change could change a result's last bit, for cache keys."""

    def load(self, bundle: Bundle, *, threads: int | None = None) -> Executable:
        """Make the bundle executable; threads: None for as many as the engine likes."""
