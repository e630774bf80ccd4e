"""The best choice within a budget, exactly, where memory adds up: a multiple-choice knapsack."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pbc.scheme.problem import NONE, Choice, Problem


@dataclass(frozen=True)
class _Front:
    """The choices that no other beats, by rising bytes and value.

    parents: of each, its place in the front before; options: what it takes of the last layer.
    """

    size_bytes: np.ndarray
    values: np.ndarray
    parents: np.ndarray
    options: np.ndarray


def best(problem: Problem, budget_bytes: int) -> Choice | None:
    """Return the choice of largest value that takes at most so many bytes; None if none does.

    Dynamic programming over lists of undominated choices (Nemhauser and Ullmann, Management
    Science 1969; multiple choice: Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004,
    section 11.5). One pass serves every k, since the layers of the last k are among those of the
    last k + 1.
    """
    none = np.array([NONE])
    fronts = [_Front(np.array([0]), np.array([0.0]), none, none)]
    most, at = -np.inf, (0, 0)
    for biases, base in enumerate(problem.bases):
        if biases:
            fronts.append(_with_layer(fronts[-1], problem, biases - 1, budget_bytes))
        front = fronts[-1]
        fitting = int(np.searchsorted(front.size_bytes, budget_bytes - base.size_bytes, "right"))
        if fitting and front.values[fitting - 1] + base.value > most:
            most, at = front.values[fitting - 1] + base.value, (biases, fitting - 1)
    if most == -np.inf:
        return None
    biases, place = at
    options = []
    for front in reversed(fronts[1 : biases + 1]):
        options.append(int(front.options[place]))
        place = int(front.parents[place])
    return Choice(biases, tuple(reversed(options)))


def _with_layer(front: _Front, problem: Problem, layer: int, budget_bytes: int) -> _Front:
    """The front with one more layer to choose from."""
    items = problem.layers[layer]
    size_bytes = np.concatenate([front.size_bytes, *(front.size_bytes + i[0] for i in items)])
    values = np.concatenate([front.values, *(front.values + item.value for item in items)])
    parents = np.tile(np.arange(len(front.values)), len(items) + 1)
    options = np.repeat(np.arange(NONE, len(items)), len(front.values))
    # Of equal bytes the most valuable first: each that is worth no more than one before it goes.
    order = np.lexsort((-values, size_bytes))
    order = order[size_bytes[order] <= budget_bytes]
    ahead = np.concatenate([[-np.inf], np.maximum.accumulate(values[order])[:-1]])
    order = order[values[order] > ahead]
    return _Front(size_bytes[order], values[order], parents[order], options[order])
