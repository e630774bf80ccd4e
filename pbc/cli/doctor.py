"""`pbc doctor`: look at the installation, print what works and what to install."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click
from rich.table import Table
from rich.text import Text

from pbc import doctor as library
from pbc.cli.tables import as_json, named_table, show
from pbc.doctor import Check, Diagnosis


@click.command()
@as_json
def doctor(as_json: bool) -> None:
    """Say what is installed, which engines and targets work here, and what to install."""
    found = library.diagnose()
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    else:
        _show(found)


def _show(found: Diagnosis) -> None:
    about = Table.grid(padding=(0, 2))
    for fact, value in found.about.items():
        about.add_row(Text(fact, style="bold"), Text(value))
    show(about)
    for title, checks in (
        ("extra", found.extras),
        ("engine: trains here", found.engines),
        ("engine: can be compiled for", found.lowerings),
        ("tool", found.tools),
    ):
        click.echo()
        _show_checks(title, checks)
    working = [check for check in found.targets if check.works]
    click.echo(f"\n{len(working)} of {len(found.targets)} targets can be compiled for here")
    if working:  # where nothing is, the engines above say why
        for check in found.targets:
            if not check.works:
                click.echo(f"  not {check.name}: {check.detail}")
    remedies = dict.fromkeys(
        check.remedy
        for check in (*found.extras, *found.engines, *found.lowerings, *found.tools)
        if check.remedy is not None
    )
    if remedies:
        click.echo("\nto install what is missing, as far as you need it:")
    for remedy in remedies:
        click.echo(f"  {remedy}")


def _show_checks(title: str, checks: Sequence[Check]) -> None:
    table = named_table(title, [check.name for check in checks], "works", "with")
    for check in checks:
        works = Text("yes", style="green") if check.works else Text("no", style="red")
        table.add_row(Text(check.name), works, Text(check.detail))
    show(table)
