"""Selectors: they decide which of the trainable tensors move for the next epochs.

A selector is an entry point of the group `pbc.selectors`: a class whose objects choose by numbers
alone, so that a choice can be repeated. Which samples are learnt from is a scheduler's matter, and
independent of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Candidates:
    """Trainable tensors in the order in which a backward comes to them.

    importance: f64[n], by how much the loss is expected to fall if it is trained. own_ms: f64[n],
    what its own gradient and update take. passing_ms: f64[n], what it takes to bring gradients
    there from the loss, never less than for those before it.
    """

    names: tuple[str, ...]
    importance: np.ndarray
    own_ms: np.ndarray
    passing_ms: np.ndarray


class Selector(Protocol):
    """Chooses tensors within a time."""

    def choose(self, candidates: Candidates, budget_ms: float) -> tuple[str, ...]:
        """Return the names to train, for which a backward takes at most this; none may fit."""
