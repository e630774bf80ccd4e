"""The house: what may import what, read from the source without importing anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "pbc"
PLUGINS = ("pbc.passes", "pbc.targets")


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    """Every module of pbc, passes and targets among them, by its dotted name."""
    linked = [ROOT / "passes", ROOT / "targets"]
    files = [file for folder in (ROOT, *linked) for file in folder.rglob("*.py")]
    return {name_of(file): file for file in files}


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not those for type checkers alone."""
    for statement in body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        yield statement
        for inner in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(statement, (ast.If, ast.Try, ast.With)):
                yield from statements(getattr(statement, inner, []))


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """The modules of pbc that these import; `from pbc.ir import dims` is pbc.ir.dims."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & modules().keys() or {node.module}
    return found & modules().keys()


def test_pbc_imports_no_pass_and_no_target() -> None:
    """Entry points name them: adding one, or leaving one out, changes nothing else."""
    assert len(modules()) > 100
    culprits = {
        name: wrong
        for name, file in modules().items()
        if not name.startswith(PLUGINS)
        for wrong in [sorted(
            other
            for other in imported(ast.walk(ast.parse(file.read_bytes())))
            if other.startswith(PLUGINS)
        )]
        if wrong
    }  # fmt: skip
    assert not culprits


def test_no_two_files_import_each_other() -> None:
    graph = {
        name: imported(iter(statements(ast.parse(file.read_bytes()).body)))
        for name, file in modules().items()
    }
    finished: set[str] = set()

    def follow(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            pytest.fail(" imports ".join((*path[path.index(name) :], name)))
        if name not in finished:
            for other in sorted(graph[name]):
                follow(other, (*path, name))
            finished.add(name)

    for name in sorted(graph):
        follow(name, ())


def test_every_folder_has_its_row_in_the_documents() -> None:
    text = (ROOT.parent / "docs" / "architecture.md").read_text()
    folders = {file.parent.relative_to(ROOT.parent).as_posix() for file in modules().values()}
    listed = {name.removeprefix("pbc/") if name.startswith(("pbc/passes", "pbc/targets")) else name
              for name in folders}  # fmt: skip
    assert not [name for name in sorted(listed) if f"| `{name}/` |" not in text]
