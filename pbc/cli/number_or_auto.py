"""An option that is a number, or `auto`."""

from __future__ import annotations

from typing import Any

import click

from pbc.runtime.options import AUTO


class NumberOrAuto(click.ParamType[Any]):
    """A whole number from 0 on, or `auto`; kind: what is counted."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.name = f"{kind.upper()}|{AUTO}"

    def convert(self, value: Any, param: Any, context: Any) -> int | str:
        """Return an int, or `auto`."""
        if value == AUTO:
            return AUTO
        if not str(value).lstrip("-").isdecimal():
            self.fail(f"{value!r} is no {self.kind}: expected a number from 0 on, or {AUTO}")
        return int(value)
