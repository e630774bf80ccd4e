"""Training by derived steps, whatever runs their graphs: an engine brings `_run` and its tensors.

A step is two graphs: `forward/k` returns the losses and what its backward needs,
`update/k/<optimizer>` takes that and returns new parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from pbc.bundle import Bundle
from pbc.bundle.graph_name import BODY, FORWARD, POLICY, PREFIX, update
from pbc.bundle.optimizers import EPSILON, NEW, OPTIMIZERS, bias_corrections, state_names
from pbc.errors import PbcError
from pbc.runtime.engines import Arrays, NodeTimes
from pbc.runtime.objective import Objective


class DerivedExecutable(ABC):
    """A bundle's graphs, run by names; parameters and state by theirs, in the engine's tensors.

    A tensor of the engine is whatever has `numpy()`.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._objective = Objective()
        self._theta: dict[str, Any] = {}
        self._moments: dict[str, Any] = {}
        self._steps = 0
        # The level of the last forward, and all that its update may read.
        self._pending: tuple[int, dict[str, Any]] | None = None

    @abstractmethod
    def _run(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Feed a graph what it reads of these values, arrays or the engine's tensors."""

    @abstractmethod
    def _require(self, name: str) -> None:
        """Refuse a graph that the bundle does not have."""

    @abstractmethod
    def _feature(self, value: np.ndarray) -> Any:
        """Return features as `_run` takes them twice, for the forward and for the update."""

    @abstractmethod
    def _kept(self, value: np.ndarray) -> Any:
        """Copy a tensor of reals in."""

    def policy(self, views: np.ndarray) -> np.ndarray:
        return _copied(self._run(str(POLICY), {"view": views})["fidelity"])

    def prefix(self, level: int, images: np.ndarray) -> dict[str, np.ndarray]:
        graph = PREFIX.at(level)
        if not self._bundle.has_graph(graph):
            return {"x": images}
        outputs = self._run(str(graph), {"x": images})
        return {name: _copied(value) for name, value in outputs.items()}

    def logits(self, level: int, features: Arrays) -> np.ndarray:
        return _copied(self._run(str(BODY.at(level)), {**features, **self._theta})["logits"])

    def start(self, parameters: Arrays, objective: Objective) -> None:
        self._objective = objective
        self._theta = {name: self._kept(value) for name, value in parameters.items()}
        self._moments = {
            state: self._kept(np.zeros_like(parameters[parameter], np.float32))
            for state, parameter in state_names(objective.optimizer, parameters)
        }
        self._steps = 0
        self._pending = None

    def forward(
        self, level: int, features: Arrays, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        # What the last forward kept goes first: it is as large as what this one makes.
        self._pending = None
        self._require(self._update_name(level))
        inputs: dict[str, Any] = {
            **{name: self._feature(value) for name, value in features.items()},
            "labels": labels.astype(np.int64, copy=False),
            "label_smoothing": _scalar(self._objective.label_smoothing),
        }
        outputs = self._run(str(FORWARD.at(level)), {**inputs, **self._theta})
        losses, logits = _copied(outputs["losses"]), _copied(outputs["logits"])
        self._pending = level, {**inputs, **outputs}
        return losses, logits

    def update(self) -> None:
        assert self._pending is not None, "update() follows forward()"
        (level, values), self._pending = self._pending, None
        self._steps += 1
        outputs = self._run(
            self._update_name(level),
            {**values, **self._scalars(), **self._theta, **self._moments},
        )
        # New tensors replace the old: one buffer as input and output gives wrong results.
        for name, value in outputs.items():
            own = name.removeprefix(NEW)
            (self._moments if own in self._moments else self._theta)[own] = value

    def gradients(self) -> dict[str, np.ndarray]:
        # What SGD's momentum becomes when it was zero, and nothing decays, is the gradient.
        assert self._pending is not None, "gradients() follows forward()"
        level, values = self._pending
        names = state_names("sgd", self._theta)
        zeros = {state: np.zeros_like(self._theta[parameter].numpy()) for state, parameter in names}
        still = {name: _scalar(0) for name in OPTIMIZERS["sgd"].scalars}
        outputs = self._run(
            str(update("sgd").at(level)), {**values, **still, **self._theta, **zeros}
        )
        return {
            parameter: _copied(outputs[NEW + state])
            for state, parameter in names
            if NEW + state in outputs
        }

    def select(self, names: Collection[str] | None) -> None:
        raise PbcError(self._all_or_none())

    def node_times(self) -> NodeTimes:
        raise PbcError(self._all_or_none())

    def _all_or_none(self) -> str:
        return (
            f"the {self._bundle.manifest['engine']} engine trains all parameters or none; "
            "compile the model with --engine onnxruntime to train some of them"
        )

    def _update_name(self, level: int) -> str:
        return str(update(self._objective.optimizer).at(level))

    def parameters(self) -> dict[str, np.ndarray]:
        return {name: _copied(value) for name, value in self._theta.items()}

    def optimizer_state(self) -> dict[str, np.ndarray]:
        state = {name: _copied(value) for name, value in self._moments.items()}
        counts = OPTIMIZERS[self._objective.optimizer].counts_steps
        return {"step": self._step(), **state} if counts else state

    def load_optimizer_state(self, state: Arrays) -> None:
        own = self.optimizer_state()
        if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in state.items()}:
            raise PbcError("the optimizer state is not of this optimizer and these parameters")
        self._steps = int(state.get("step", self._step()))
        self._moments = {name: self._kept(state[name]) for name in self._moments}

    def _step(self) -> np.ndarray:
        return np.array(self._steps, np.int64)

    def _scalars(self) -> dict[str, np.ndarray]:
        """Return what an update graph may ask for beside tensors."""
        mean, square = bias_corrections(self._steps)
        return {
            "learning_rate": _scalar(self._objective.learning_rate),
            "weight_decay": _scalar(self._objective.weight_decay),
            "momentum": _scalar(self._objective.momentum),
            "epsilon": _scalar(EPSILON),
            "mean_correction": _scalar(mean),
            "square_correction": _scalar(square),
        }


def _copied(value: Any) -> np.ndarray:
    """Copy a tensor out."""
    return np.array(value.numpy())


def _scalar(value: float) -> np.ndarray:
    return np.array(value, np.float32)
