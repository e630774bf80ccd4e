"""Facts about a module's classes and functions, read from its source without running it."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def summary(module: str, name: str) -> str:
    """Return the first docstring line of a class or function, or of its module."""
    tree = _parsed(module)
    if tree is None:
        return ""
    text = ast.get_docstring(_definition(tree, name) or tree) or ""
    return text.partition("\n")[0]


def literals(module: str, name: str, attributes: Iterable[str]) -> dict[str, Any] | None:
    """Return those of the attributes that a class declares, where its source spells them all out.

    None where it does not: an attribute that is computed, a class that may inherit them.
    """
    tree = _parsed(module)
    declared = None if tree is None else _definition(tree, name)
    if not isinstance(declared, ast.ClassDef) or declared.bases:
        return None
    found: dict[str, Any] = {}
    for attribute, value in _assigned(declared):
        if attribute in attributes:
            try:
                found[attribute] = ast.literal_eval(value)
            except ValueError:
                return None
    return found


def protocol_members(module: str, name: str) -> tuple[list[str], list[str]]:
    """Return the class attributes and the methods that a protocol declares.

    Nothing for a class that is no protocol. What instances set for themselves is not among them.
    """
    tree = _parsed(module)
    declared = None if tree is None else _definition(tree, name)
    if not isinstance(declared, ast.ClassDef):
        return [], []
    if not any(ast.unparse(base) == "Protocol" for base in declared.bases):
        return [], []
    attributes = [
        statement.target.id
        for statement in declared.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and ast.unparse(statement.annotation).startswith("ClassVar")
        and statement.value is None
    ]
    methods = [
        statement.name
        for statement in declared.body
        if isinstance(statement, ast.FunctionDef) and statement.name != "__init__"
    ]
    return attributes, methods


def _assigned(declared: ast.ClassDef) -> Iterable[tuple[str, ast.expr]]:
    for statement in declared.body:
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets = [statement.target]
        else:
            continue
        assert statement.value is not None
        for target in targets:
            if isinstance(target, ast.Name):
                yield target.id, statement.value


def _parsed(module: str) -> ast.Module | None:
    """Parse a module; None where it has no source."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return ast.parse(Path(spec.origin).read_bytes())


def _definition(
    tree: ast.Module, name: str
) -> ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | None:
    for statement in tree.body:
        if (
            isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and statement.name == name
        ):
            return statement
    return None
