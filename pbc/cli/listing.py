"""The commands that list what is installed: targets, passes, strategies."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from pbc import registry
from pbc.cli.tables import console
from pbc.registry import Entry
from pbc.target import load_target

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@click.command()
@as_json
def targets(as_json: bool) -> None:
    """List the devices that a bundle can be compiled for."""
    rows = [
        {**load_target(entry.name).to_json(), **_origin(entry)}
        for entry in registry.entries("pbc.targets").values()
    ]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "target": lambda row: row["name"],
        "arch": lambda row: row["arch"],
        "memory": lambda row: _gibibytes(row["memory_bytes"]),
        "engines (not installed here)": lambda row: _engines(row["engine"], row["engines"]),
        "description": lambda row: row["description"],
        "from": _from,
    }
    _show(rows, columns, as_json)


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
        for entry in registry.entries(group).values()
    ]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        registry.kind(group): lambda row: row["name"],
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


def _gibibytes(memory_bytes: int | None) -> str:
    return "?" if memory_bytes is None else f"{memory_bytes / 2**30:.1f} GiB"


def _engines(preferred: str, allowed: Sequence[str]) -> str:
    installed = registry.entries("pbc.engines")
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
