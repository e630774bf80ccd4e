"""The vectors that a head reads, told by any engine, whatever the body does before the head.

A linear head at the identity puts out what it reads. Whether a head is linear is not asked of a
graph but tried: its logits at other weights have to be those weights' products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pbc.bundle import Bundle
from pbc.runtime.closed_form import MOST_WIDTH, Head
from pbc.runtime.engines import Arrays, Executable
from pbc.runtime.engines.bounds import SAMPLES
from pbc.runtime.objective import Objective

_TOLERANCE = 1e-3
# Of an identity, where a head may have any number of classes.
_ROWS = 1024


class HeadInputs:
    """A linear head's inputs and parameters in a bundle.

    width: of the vectors. direct: whether they are the features that the prefix sends, so that the
    body need not run.
    """

    def __init__(
        self,
        executable: Executable,
        theta: Mapping[str, np.ndarray],
        head: Arrays,
        *,
        any_count: bool,
    ) -> None:
        """Take a started executable's parameters, and those of the head among them.

        any_count: whether the bundle's graphs take a head of any number of classes.
        """
        self._executable = executable
        self._weight = next(name for name, value in head.items() if value.ndim > 1)
        self._bias = next((name for name, value in head.items() if value.ndim == 1), None)
        self._classes = len(head[self._weight])
        self.width = math.prod(head[self._weight].shape[1:])
        # Classes of an identity.
        self._rows = min(_ROWS, self.width) if any_count else self._classes
        self.direct = False
        self._theta = dict(theta)

    @classmethod
    def find(
        cls, bundle: Bundle, executable: Executable, theta: Mapping[str, np.ndarray]
    ) -> HeadInputs | None:
        """Return the inputs of a bundle's head; None where it is not linear, or has no bias.

        None, too, where there are so many that their covariance would be out of bounds.

        Leaves the executable started with `theta`.
        """
        head = {name: theta[name] for name in bundle.manifest["head"]}
        if sorted(value.ndim > 1 for value in head.values()) != [False, True]:
            return None
        open_head = bundle.manifest.get("class_count") is None
        inputs = cls(executable, theta, head, any_count=open_head)
        if inputs.width > MOST_WIDTH:
            return None
        random = np.random.Generator(np.random.PCG64(0))
        features = {
            name: random.standard_normal((SAMPLES, *shape), np.float32)
            for name, shape in bundle.manifest["features"].items()
        }
        executable.start(theta, Objective())
        wanted = executable.logits(0, features)
        sent = [value.reshape(SAMPLES, -1) for value in features.values()]
        if len(sent) == 1 and bundle.shares_body and inputs._explain(sent[0], wanted):
            inputs.direct = True
            return inputs
        return inputs if inputs._explain(inputs(0, features), wanted) else None

    def __call__(self, level: int, features: Arrays) -> np.ndarray:
        """Return f32[b, d]; the executable may be left started with other parameters."""
        if self.direct:
            (sent,) = features.values()
            return sent.reshape(len(sent), -1)
        parts = []
        bias = np.zeros(self._rows, np.float32)
        for first in range(0, self.width, self._rows):
            count = min(self._rows, self.width - first)
            identity = np.eye(self._rows, self.width, first, dtype=np.float32)
            self._executable.start(self._with(identity, bias), Objective())
            parts.append(self._executable.logits(level, features)[:, :count])
        return np.concatenate(parts, axis=1)

    def theta(self, head: Head) -> dict[str, np.ndarray]:
        """Return all trainable parameters, with this head."""
        return self._with(head.weight, head.bias)

    def _with(self, weight: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
        assert self._bias is not None, "a head without a bias is not found"
        shape = self._theta[self._weight].shape[1:]
        return {**self._theta, self._weight: weight.reshape(-1, *shape), self._bias: bias}

    def _explain(self, rows: np.ndarray, logits: np.ndarray) -> bool:
        if rows.shape[1] != self.width:
            return False
        assert self._bias is not None
        weight = self._theta[self._weight].reshape(self._classes, -1)
        expected = rows @ weight.T + self._theta[self._bias]
        return bool(np.abs(expected - logits).max() <= _TOLERANCE * np.abs(logits).max())
