"""Tables in the terminal's width; a pipe gets whole lines, no wider than what is in them."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from pbc.plugins import Plugin

_PIPE_WIDTH = 200

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def console() -> Console:
    """Return standard output; a reader of a pipe wants whole lines, unless $COLUMNS says less."""
    made = Console(highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _PIPE_WIDTH
    return made


def paragraph(text: str, indent: str = "", hanging: str | None = None) -> None:
    """Print text in lines that fit; `hanging` indents those after the first, if not like it."""
    later = indent if hanging is None else hanging
    click.echo(
        textwrap.fill(
            text,
            console().width,
            initial_indent=indent,
            subsequent_indent=later,
            break_on_hyphens=False,
        )
    )


def named_table(first: str, names: Sequence[str], *columns: str) -> Table:
    """Return a table whose first column holds these names and is never cut; others wrap."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True, min_width=max(map(len, names), default=0))
    for column in columns:
        table.add_column(column)
    return table


def show(table: Table) -> None:
    """Print a table, without the blanks that would fill its last column."""
    to = console()
    with to.capture() as printed:
        to.print(table)
    click.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))


def origin(plugin: Plugin) -> dict[str, str]:
    """Return the columns that say where a plugin comes from."""
    return {
        "entry_point": plugin.value,
        "distribution": plugin.distribution,
        "version": plugin.version,
    }


def origin_text(row: Mapping[str, Any]) -> str:
    """Return the distribution and version of a row that has what `origin` returns."""
    return f"{row['distribution']} {row['version']}"
