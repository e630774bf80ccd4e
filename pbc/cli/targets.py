"""`pbc targets`: list the devices that bundles can be compiled for, or show one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from pbc import plugins
from pbc.cli.completion import plugins_of
from pbc.cli.tables import as_json, named_table, origin, origin_text, paragraph, show
from pbc.target import Target, load_target


@click.command()
@click.argument("name", required=False, shell_complete=plugins_of("pbc.targets"))
@as_json
def targets(name: str | None, as_json: bool) -> None:
    """List the devices that a bundle can be compiled for, or all that is known of one."""
    if name is not None:
        target = load_target(name)
        row = {**target.to_json(), **origin(plugins.entries("pbc.targets")[name])}
        if as_json:
            click.echo(json.dumps(row, indent=2, ensure_ascii=False))
        else:
            _show_target(target, row)
        return
    rows = _rows()
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        _show_targets(rows)


def _rows() -> list[dict[str, Any]]:
    """Return a row for each device; one that has several names is there once."""
    rows: dict[str, dict[str, Any]] = {}
    others: dict[str, list[str]] = {}
    for entry in plugins.entries("pbc.targets").values():
        target = load_target(entry.name)
        others.setdefault(target.name, [])
        if entry.name == target.name:
            rows[target.name] = {**target.to_json(), **origin(entry)}
        else:
            others[target.name].append(entry.name)
    return [{**row, "aliases": others[name]} for name, row in rows.items()]


def _show_targets(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table with a heading for each family; boards of others go under their package."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(row["family"] or origin_text(row), []).append(row)
    names = [f"  {row['name']}" for row in rows]
    table = named_table("target", [*names, *families], "memory", "engine", "description")
    table.columns[1].justify = "right"
    installed = plugins.entries("pbc.lowerings")
    for family in sorted(families):
        table.add_row(Text(family, style="bold"))
        for row in families[family]:
            engine = row["engine"]
            table.add_row(
                Text(f"  {row['name']}"),
                Text(_gibibytes(row["memory_bytes"])),
                Text(engine if engine in installed else f"({engine})"),
                Text(row["description"] + "".join(f", also {name}" for name in row["aliases"])),
            )
    show(table)
    if any(row["engine"] not in installed for row in rows):
        paragraph("(engine): not installed here; the target's next one is taken")
    paragraph("pbc targets NAME shows all that is known of one, and which engines run there")


def _show_target(target: Target, row: dict[str, Any]) -> None:
    """Print a target's facts, what its engines need on the board, and why others do not run."""
    facts = {
        "target": f"{target.name}: {target.description}",
        "from": origin_text(row),
        "architecture": target.arch,
        "memory": _gibibytes(target.memory_bytes),
        **target.tags,
        "on the board": _listed(target.requires),
    }
    grid = Table.grid(padding=(0, 2))
    for fact, value in facts.items():
        if value:
            grid.add_row(Text(fact, style="bold"), Text(value))
    show(grid)
    engines = list(dict.fromkeys((target.engine, *target.engines)))
    table = named_table("engine", [*engines, *target.refused], "runs there", "needs there")
    installed = plugins.entries("pbc.lowerings")
    for engine in engines:
        words = "preferred" if engine == target.engine else "yes"
        if engine not in installed:
            words += ", but not installed here"
        table.add_row(engine, words, Text(_listed(target.needs.get(engine, {}))))
    for engine, reason in target.refused.items():
        table.add_row(engine, "no", Text(reason))
    click.echo()
    show(table)


def _listed(facts: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {value}" for name, value in facts.items())


def _gibibytes(memory_bytes: int | None) -> str:
    return "" if memory_bytes is None else f"{memory_bytes / 2**30:.1f} GiB"
