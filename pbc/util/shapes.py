"""Declared shapes of JSON: what is read from elsewhere is compared with them before it is used.

A shape is a function that raises ShapeError with the place and the value where it is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Shape = Callable[[Any, str], None]
"""Called with a value and its place, like `levels[0].cost`."""

_SHOWN = 60


class ShapeError(ValueError):
    """A value is not what was declared; the text says where and what was expected."""


def check(value: Any, shape: Shape, name: str = "") -> None:
    """Raise ShapeError unless a value has this shape; `name` is what the whole is called."""
    shape(value, name)


def anything(value: Any, at: str) -> None:
    """Any JSON."""


def integer(least: int = 0, most: int = 2**53) -> Shape:
    """A whole number within bounds."""

    def shape(value: Any, at: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            _fail(value, at, f"a whole number from {least} to {most}")

    return shape


def number(least: float = -1e300, most: float = 1e300) -> Shape:
    """A finite number within bounds."""

    def shape(value: Any, at: str) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool):
            _fail(value, at, "a number")
        if not least <= value <= most:
            _fail(value, at, f"a number from {least:g} to {most:g}")

    return shape


def text(longest: int = 4096) -> Shape:
    """A text."""

    def shape(value: Any, at: str) -> None:
        if not isinstance(value, str) or len(value) > longest:
            _fail(value, at, f"a text of at most {longest} characters")

    return shape


def flag(value: Any, at: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        _fail(value, at, "true or false")


def one_of(*values: Any) -> Shape:
    """One of a few values."""

    def shape(value: Any, at: str) -> None:
        if not any(value == known and type(value) is type(known) for known in values):
            _fail(value, at, "one of " + ", ".join(map(str, values)))

    return shape


def maybe(inner: Shape) -> Shape:
    """A value, or null."""

    def shape(value: Any, at: str) -> None:
        if value is not None:
            inner(value, at)

    return shape


def either(*inner: Shape) -> Shape:
    """A value of the first shape that fits, else of the last."""

    def shape(value: Any, at: str) -> None:
        for other in inner[:-1]:
            try:
                return other(value, at)
            except ShapeError:  # noqa: PERF203
                continue
        return inner[-1](value, at)

    return shape


def list_of(inner: Shape, least: int = 0, most: int = 2**20) -> Shape:
    """A list whose items have one shape."""

    def shape(value: Any, at: str) -> None:
        if not isinstance(value, list):
            _fail(value, at, "a list")
        if not least <= len(value) <= most:
            size = f"{least} to {most}" if least != most else str(most)
            raise ShapeError(f"{at} has {len(value)} items; expected {size}")
        for index, item in enumerate(value):
            inner(item, f"{at}[{index}]")

    return shape


def dict_of(inner: Shape, most: int = 2**20, key: Shape | None = None) -> Shape:
    """An object of any names, whose values have one shape."""
    name = key or text()

    def shape(value: Any, at: str) -> None:
        if not isinstance(value, dict):
            _fail(value, at, "an object")
        if len(value) > most:
            raise ShapeError(f"{at} has {len(value)} entries; expected at most {most}")
        for entry, item in value.items():
            name(entry, f"a name in {at}")
            inner(item, _below(at, entry))

    return shape


def record(
    required: Mapping[str, Shape],
    optional: Mapping[str, Shape] | None = None,
    *,
    more: bool = False,
) -> Shape:
    """An object with these names; more: whether there may be others."""
    known = {**required, **(optional or {})}

    def shape(value: Any, at: str) -> None:
        if not isinstance(value, dict):
            _fail(value, at, "an object")
        for name in required:
            if name not in value:
                raise ShapeError(f"{at or 'it'} has no {name!r}")
        for name, item in value.items():
            if name in known:
                known[name](item, _below(at, name))
            elif not more:
                raise ShapeError(f"{at or 'it'} has {name[:_SHOWN]!r}, which is not known")

    return shape


def _below(at: str, name: str) -> str:
    return f"{at}.{name[:_SHOWN]}" if at else name[:_SHOWN]


def _fail(value: Any, at: str, expected: str) -> None:
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    raise ShapeError(f"{at or 'it'} is {shown}; expected {expected}")
