"""Find plugins by their entry points, and import none of them until asked."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pbc.errors import PbcError, UsageError, suggest

GROUPS = {
    "pbc.passes": "pass",
    "pbc.targets": "target",
    "pbc.strategies": "strategy",
    "pbc.engines": "engine",
    "pbc.lowerings": "lowering",
    "pbc.schedulers": "scheduler",
    "pbc.rivals": "rival",
    "pbc.tvm_passes": "TVM pass",
    "pbc.device_libraries": "library for devices",
}
"""Each entry point group, with the word that messages use for one of its members."""


@dataclass(frozen=True)
class Entry:
    """One installed plugin: where it is, and which distribution brought it."""

    name: str
    group: str
    value: str
    distribution: str
    version: str

    @property
    def module(self) -> str:
        """The dotted name of the module that holds the plugin."""
        return self.value.partition(":")[0].strip()

    @property
    def attribute(self) -> str:
        """The name of the plugin within its module."""
        return self.value.partition(":")[2].strip()

    def load(self) -> Any:
        """Import the module and return the object it holds."""
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{self.module}.".startswith(f"{error.name}."):
                raise  # what the plugin needs is missing, not the plugin itself
            raise PbcError(self._broken(str(error))) from error
        if not hasattr(module, self.attribute):
            raise PbcError(self._broken(f"the module holds no {self.attribute!r}"))
        return getattr(module, self.attribute)

    def summary(self) -> str:
        """Return the first line of the plugin's docstring, read without running its module."""
        return summary(self.module, self.attribute)

    def _broken(self, reason: str) -> str:
        origin = f"{self.distribution} {self.version}"
        return f"{kind(self.group)} {self.name!r} of {origin} points at {self.value}: {reason}"


def kind(group: str) -> str:
    """Return the word for a member of the group: 'pass' for 'pbc.passes'."""
    return GROUPS.get(group, group)


def entries(group: str) -> dict[str, Entry]:
    """Return the installed plugins of a group by name, in order of their names.

    Two distributions that claim one name are an error, not a matter of luck.
    """
    found: dict[str, Entry] = {}
    for point in metadata.entry_points(group=group):
        origin, version = (point.dist.name, point.dist.version) if point.dist else ("?", "?")
        entry = Entry(point.name, group, point.value, origin, version)
        other = found.setdefault(entry.name, entry)
        if other != entry:
            raise PbcError(
                f"two distributions bring a {kind(group)} named {entry.name!r}: "
                f"{other.distribution} {other.version} and {origin} {version}; uninstall one"
            )
    return dict(sorted(found.items()))


def find(group: str, name: str) -> Entry:
    """Return the group's plugin of this name."""
    available = entries(group)
    if name not in available:
        raise UsageError(suggest(kind(group), name, available))
    return available[name]


def load(group: str, name: str) -> Any:
    """Return the object that the group's plugin of this name stands for."""
    return find(group, name).load()


def summary(module: str, attribute: str) -> str:
    """Return the first docstring line of a class or function, or of its module.

    The source is parsed, not run: a list of plugins needs none of what they import.
    """
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return ""
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return ""
    tree = ast.parse(Path(spec.origin).read_bytes())
    text = ast.get_docstring(_definition(tree.body, attribute) or tree) or ""
    return text.partition("\n")[0]


def _definition(
    body: Iterable[ast.stmt], name: str
) -> ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | None:
    for statement in body:
        if (
            isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and statement.name == name
        ):
            return statement
    return None
