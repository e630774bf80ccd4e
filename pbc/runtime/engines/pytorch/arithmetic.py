"""Arithmetic of sizes in a graph: Python's operators on numbers, kept to 64 bits."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

_MOST_BITS = 63


def function(name: str) -> Callable[..., Any]:
    """Return an operator by its name; `getitem` picks from a list, all others take numbers.

    What they return raises ValueError for other values (a list times a number is a list of any
    length), and for a result that no tensor's size can be.
    """
    return operator.getitem if name == "getitem" else _of_numbers(getattr(operator, name))


def _of_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*values: Any) -> Any:
        if not all(isinstance(value, int | float) for value in values):
            raise ValueError("it takes numbers alone")
        if function is operator.pow and _bits(*values) > _MOST_BITS:
            raise ValueError("the number has more than 64 bits")
        result = function(*values)
        if isinstance(result, int) and result.bit_length() > _MOST_BITS:
            raise ValueError("the number has more than 64 bits")
        return result

    return checked


def _bits(base: float, exponent: float) -> float:
    """Return about how many bits a power has."""
    return exponent * math.log2(max(1.0, abs(base)))
