"""A family of operators: what the conversions in one file have in common with those in another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pbc.targets.tvm.scope import Converter


class Family(dict[Any, Converter]):
    """Conversions of related operators, by the operator."""

    def converts(self, *operators: Any) -> Callable[[Converter], Converter]:
        """Enter a function of the scope and the operators' own arguments."""

        def enter(function: Converter) -> Converter:
            for operator in operators:
                self.enter(operator, function)
            return function

        return enter

    def enter(self, operator: Any, function: Converter) -> None:
        """Enter one conversion; a second one of an operator is an error of ours."""
        if operator in self:
            raise ValueError(f"{operator} has two conversions")
        self[operator] = function
