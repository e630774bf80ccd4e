"""`pbc passes`, `pbc strategies` and `pbc plugins`: list what is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import click
from rich.text import Text

from pbc import plugins
from pbc.cli.tables import as_json, named_table, origin, origin_text, paragraph, show
from pbc.ir.stages import order
from pbc.plugins import GROUPS, Plugin


@click.command()
@as_json
def passes(as_json: bool) -> None:
    """List the passes in the order in which a pipeline runs them, then the schedules of TVM."""
    installed = plugins.entries("pbc.passes")
    facts = {name: _order_facts(plugin) for name, plugin in installed.items()}
    rows = [{**_row(installed[name]), **vars(facts[name])} for name in order(facts)]
    tvm_rows = [_row(plugin) for plugin in plugins.entries("pbc.tvm_schedules").values()]
    if as_json:
        click.echo(json.dumps([*rows, *tvm_rows], indent=2, ensure_ascii=False))
        return
    table = named_table("pass", [row["name"] for row in rows], "stage", "description", "from")
    stage = ""
    for row in rows:
        shown = "" if row["stage"] == stage else row["stage"]
        stage = row["stage"]
        words = f"{row['description']}{_order_text(row)}"
        table.add_row(*map(Text, (row["name"], shown, words, origin_text(row))))
    show(table)
    click.echo()
    _show_rows("pbc.tvm_schedules", tvm_rows)


@click.command()
@as_json
def strategies(as_json: bool) -> None:
    """List the strategies: which part of the network trains."""
    rows = [_row(plugin) for plugin in plugins.entries("pbc.strategies").values()]
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        _show_rows("pbc.strategies", rows)


@click.command("plugins")
@as_json
def list_plugins(as_json: bool) -> None:
    """List all groups of plugins: what each has to be, and which are installed."""
    rows = [
        {
            "group": group.name,
            "word": group.word,
            "protocol": group.protocol,
            "description": group.sentence,
            "members": [
                {"name": plugin.name, **origin(plugin)}
                for plugin in plugins.entries(group.name).values()
            ],
        }
        for group in GROUPS.values()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for number, row in enumerate(rows):
        if number:
            click.echo()
        _show_group(row)


def _order_facts(plugin: Plugin) -> SimpleNamespace:
    """Return what orders a pass, from its source; where that does not spell it out, from itself."""
    declared = plugin.literals("stage", "after", "before", "default")
    kind: Any = plugin.load() if declared is None else SimpleNamespace(**declared)
    if not hasattr(kind, "stage"):
        kind = plugin.load()  # it says what is missing
    return SimpleNamespace(
        stage=kind.stage,
        after=tuple(getattr(kind, "after", ())),
        before=tuple(getattr(kind, "before", ())),
        default=bool(getattr(kind, "default", True)),
    )


def _order_text(row: Mapping[str, Any]) -> str:
    """Return what a row says about other passes, and whether it has to be asked for."""
    parts = [f"{word} {', '.join(row[word])}" for word in ("after", "before") if row[word]]
    if not row["default"]:
        parts.append(f"only --with {row['name']}")
    return f" ({'; '.join(parts)})" if parts else ""


def _row(plugin: Plugin) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "group": plugin.group,
        "description": plugin.summary(),
        **origin(plugin),
    }


def _show_rows(group: str, rows: Sequence[Mapping[str, Any]]) -> None:
    names = [row["name"] for row in rows]
    table = named_table(plugins.kind(group), names, "description", "from")
    for row in rows:
        table.add_row(*map(Text, (row["name"], row["description"], origin_text(row))))
    show(table)


def _show_group(row: Mapping[str, Any]) -> None:
    """Print what a member of a group has to be, then all of them, others' with their origin."""
    names = [
        member["name"]
        if member["distribution"] == "pbc"
        else f"{member['name']} ({origin_text(member)})"
        for member in row["members"]
    ]
    paragraph(f"{row['group']}: {row['description']} ({row['protocol']})", hanging="    ")
    paragraph(", ".join(names) or "none is installed", indent="  ")
