"""Declared shapes: what fits passes, what does not is named with its place."""

from __future__ import annotations

from typing import Any

import pytest

from pbc.util.shapes import (
    Shape,
    ShapeError,
    check,
    dict_of,
    either,
    flag,
    integer,
    list_of,
    maybe,
    number,
    one_of,
    record,
    text,
)

POINT = record({"x": number(0, 1), "n": integer(1, 9)}, {"name": maybe(text(3))})


@pytest.mark.parametrize(
    ("shape", "value", "said"),
    [
        (POINT, [], "p is []; expected an object"),
        (POINT, {"x": 0.5}, "p has no 'n'"),
        (POINT, {"x": True, "n": 1}, "p.x is True; expected a number"),
        (POINT, {"x": 2, "n": 1}, "p.x is 2; expected a number from 0 to 1"),
        (POINT, {"x": 0, "n": 1.0}, "p.n is 1.0; expected a whole number from 1 to 9"),
        (POINT, {"x": 0, "n": 1, "name": "long"}, "p.name is 'long'; expected a text"),
        (POINT, {"x": 0, "n": 1, "z": 1}, "p has 'z', which is not known"),
        (list_of(POINT), [{"x": 0, "n": 10}], "p[0].n is 10"),
        (list_of(flag, 1, 2), [True] * 3, "p has 3 items; expected 1 to 2"),
        (list_of(flag), ["x" * 100], "p[0] is '" + "x" * 59 + "…; expected true or false"),
        (dict_of(flag, most=1), {"a": True, "b": True}, "p has 2 entries; expected at most 1"),
        (one_of(1, "a"), True, "p is True; expected one of 1, a"),
        (either(flag, text()), 5, "p is 5; expected a text"),
    ],
)
def test_what_does_not_fit_is_named(shape: Shape, value: Any, said: str) -> None:
    with pytest.raises(ShapeError) as found:
        check(value, shape, "p")
    assert said in str(found.value)


def test_what_fits_passes() -> None:
    check({"x": 0.5, "n": 3, "name": None}, POINT)
    check([True, "a"], list_of(either(flag, text())))
