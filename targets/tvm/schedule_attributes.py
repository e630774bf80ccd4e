"""Attributes by which a schedule tells what it did to a function."""

from __future__ import annotations

import tvm
from tvm import tirx

IS_SCHEDULED = "tirx.is_scheduled"
"""TVM's own attribute of a function that has its schedule."""

RULE = "pbc.schedule"
"""The attribute that names the rule which gave the schedule."""

INSTEAD_OF = "pbc.schedule.instead_of"
"""The attribute that names the rules which raised on the function before another took it."""

REFUSAL = "pbc.schedule.refusal"
"""The attribute with their words, which may hold addresses of memory."""


def functions(module: tvm.IRModule) -> dict[str, tirx.PrimFunc]:
    """Return the loop nests of a module, by name."""
    return {
        variable.name_hint: function
        for variable, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc)
    }


def is_scheduled(function: tirx.PrimFunc) -> bool:
    return IS_SCHEDULED in (function.attrs or {})


def refusals(module: tvm.IRModule) -> dict[str, str]:
    """Return the functions that a rule raised on, each with the rule that took it, and why."""
    return {
        name: f"scheduled by {function.attrs[RULE]}, because of {function.attrs[REFUSAL]}"
        for name, function in functions(module).items()
        if REFUSAL in (function.attrs or {})
    }


def fallbacks(module: tvm.IRModule) -> dict[str, str]:
    """Return the same functions with the names of the rules, `Fallback instead of Matmul`."""
    return {
        name: f"{function.attrs[RULE]} instead of {function.attrs[INSTEAD_OF]}"
        for name, function in functions(module).items()
        if INSTEAD_OF in (function.attrs or {})
    }
