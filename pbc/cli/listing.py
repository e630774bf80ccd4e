"""The commands that list what is installed: targets, passes, strategies."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from pbc import plugins
from pbc.cli.tables import console
from pbc.plugins import Entry
from pbc.target import Target, load_target

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@click.command()
@click.argument("name", required=False)
@as_json
def targets(name: str | None, as_json: bool) -> None:
    """List the devices that a bundle can be compiled for, or all that is known of one."""
    if name is not None:
        target = load_target(name)
        row = {**target.to_json(), **_origin(plugins.entries("pbc.targets")[name])}
        if as_json:
            click.echo(json.dumps(row, indent=2, ensure_ascii=False))
        else:
            _show_target(target, row)
        return
    rows = [
        {**load_target(entry.name).to_json(), **_origin(entry)}
        for entry in plugins.entries("pbc.targets").values()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        _show_targets(rows)


@click.command()
@as_json
def passes(as_json: bool) -> None:
    """List the passes that a pipeline can be built of."""
    _show_entries("pbc.passes", as_json)


@click.command()
@as_json
def strategies(as_json: bool) -> None:
    """List the strategies: which part of the network trains."""
    _show_entries("pbc.strategies", as_json)


def _show_entries(group: str, as_json: bool) -> None:
    rows = [
        {"name": entry.name, "description": entry.summary(), **_origin(entry)}
        for entry in plugins.entries(group).values()
    ]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        plugins.kind(group): lambda row: row["name"],
        "description": lambda row: row["description"],
        "from": _from,
    }
    _show(rows, columns, as_json)


def _origin(entry: Entry) -> dict[str, str]:
    return {
        "entry_point": entry.value,
        "distribution": entry.distribution,
        "version": entry.version,
    }


def _from(row: dict[str, Any]) -> str:
    return f"{row['distribution']} {row['version']}"


def _show_targets(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table with a heading for each family; boards of others go under their package."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "target": lambda row: f"  {row['name']}",
        "processor": _processor,
        "memory": lambda row: _gibibytes(row["memory_bytes"]),
        "GPU": lambda row: f"sm_{row['tags']['sm']}" if "sm" in row["tags"] else "",
        "system": _system,
        "engines (not installed here)": lambda row: _engines(row["engine"], row["engines"]),
        "description": lambda row: row["description"],
    }
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(row["family"] or _from(row), []).append(row)
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for family in sorted(families):
        table.add_row(Text(family, style="bold"))
        for row in families[family]:
            table.add_row(*(Text(cell(row)) for cell in columns.values()))
    console().print(table)
    click.echo("pbc targets NAME shows all that is known of one, and which engines it refuses")


def _show_target(target: Target, row: dict[str, Any]) -> None:
    """Print a target's facts, what its engines need on the board, and why others do not run."""
    facts = {
        "target": f"{target.name}: {target.description}",
        "from": _from(row),
        "architecture": target.arch,
        "memory": _gibibytes(target.memory_bytes),
        **target.tags,
        "on the board": _listed(target.requires),
    }
    grid = Table.grid(padding=(0, 2))
    for fact, value in facts.items():
        if value:
            grid.add_row(Text(fact, style="bold"), Text(value))
    to = console()
    to.print(grid)
    table = Table("engine", "runs there", "needs there", box=None, pad_edge=False,
                  header_style="bold")  # fmt: skip
    installed = plugins.entries("pbc.lowerings")
    for engine in dict.fromkeys((target.engine, *target.engines)):
        words = "preferred" if engine == target.engine else "yes"
        if engine not in installed:
            words += ", but not installed here"
        table.add_row(engine, words, Text(_listed(target.needs.get(engine, {}))))
    for engine, reason in target.refused.items():
        table.add_row(engine, "no", Text(reason))
    to.print()
    to.print(table)


def _listed(facts: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {value}" for name, value in facts.items())


def _processor(row: dict[str, Any]) -> str:
    tags = row["tags"]
    parts = [f"{tags['cores']} ×" if "cores" in tags else "", tags.get("cpu", row["arch"])]
    return " ".join(filter(None, parts))


def _system(row: dict[str, Any]) -> str:
    tags = row["tags"]
    jetpack = f"JetPack {tags['jetpack']}, CUDA {tags['cuda']}" if "jetpack" in tags else ""
    return ", ".join(filter(None, [jetpack, tags.get("libc", "")]))


def _gibibytes(memory_bytes: int | None) -> str:
    return "" if memory_bytes is None else f"{memory_bytes / 2**30:.1f} GiB"


def _engines(preferred: str, allowed: Sequence[str]) -> str:
    installed = plugins.entries("pbc.lowerings")
    first = [preferred, *(name for name in allowed if name != preferred)]
    return ", ".join(name if name in installed else f"({name})" for name in first)


def _show(
    rows: list[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]], as_json: bool
) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(cell(row)) for cell in columns.values()))
    console().print(table)
