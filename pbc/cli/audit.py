"""`pbc audit`: parse, attack, print and write what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pbc.audit import tables
from pbc.audit.audit import audit as run
from pbc.audit.html import html
from pbc.audit.options import AuditOptions
from pbc.bench.report.tables import aligned
from pbc.cli.objective import objective_options
from pbc.cli.tables import console
from pbc.errors import UsageError
from pbc.runtime.objective import Objective, default_rate
from pbc.util.atomic import replace_bytes

_PATH = click.Path(path_type=Path)
_DEFAULTS = AuditOptions()
_MODE = 0o644  # a report is made to be shown; it holds no photo


@click.command()
@click.argument("bundle", type=_PATH)
@click.argument("photos", type=_PATH)
@click.option("--batch", "batches", metavar="N,N,…", help="Photos behind one shared gradient.  "
              f"[default: {','.join(map(str, _DEFAULTS.batches))}]")  # fmt: skip
@click.option("--epochs", type=int, default=_DEFAULTS.epochs, show_default=True,
              help="Of local training behind one shared update.")  # fmt: skip
@click.option("--clients", type=int, default=_DEFAULTS.clients, show_default=True)
@click.option("--rounds", type=int, default=_DEFAULTS.rounds, show_default=True,
              help="Of averaging, for the accuracy.")  # fmt: skip
@click.option("--top-k", "top_k_percent", type=float, metavar="PERCENT",
              help="Defence: send the largest values alone.")  # fmt: skip
@click.option("--clip", type=float, help="Defence: bound the norm of an update.")
@click.option("--noise", type=float, help="Defence: normal noise, by the clip.")
@click.option("--dp", type=float, metavar="EPSILON",
              help="Defence: the noise of an (ε, 1/photos)-private release.")  # fmt: skip
@click.option("--lr", type=float, help="Learning rate.  [default: sgd 0.01, adam and adamw 0.001]")
@objective_options
@click.option("--max-photos", type=int, default=_DEFAULTS.photos, show_default=True)
@click.option("--seed", type=int, default=_DEFAULTS.seed, show_default=True)
@click.option("--threads", type=int, help="Threads of the engine.  [default: the engine's choice]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--html", "html_out", type=_PATH, help="Write a report to open in a browser.")
def audit(
    bundle: Path,
    photos: Path,
    batches: str | None,
    top_k_percent: float | None,
    lr: float | None,
    optimizer: str,
    momentum: float,
    weight_decay: float,
    label_smoothing: float,
    max_photos: int,
    as_json: bool,
    html_out: Path | None,
    **settings: Any,
) -> None:
    """Attack what devices that train BUNDLE on PHOTOS would share, as someone who receives it.

    Half of PHOTOS are dealt to clients; the attacker has all of them, and θ before and after.
    """
    if html_out is not None and not html_out.resolve().parent.is_dir():
        raise UsageError(f"the folder of {html_out} does not exist")
    rate = default_rate(optimizer) if lr is None else lr
    options = AuditOptions(
        batches=_DEFAULTS.batches if batches is None else _numbers(batches),
        top_k=None if top_k_percent is None else top_k_percent / 100,
        objective=Objective(optimizer, rate, momentum, weight_decay, label_smoothing),
        photos=max_photos,
        **settings,
    )
    found = run(bundle, photos, options, lambda line: click.echo(line, err=True))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
    else:
        to = console()
        to.print(aligned(tables.rows(found)))
        to.print()
        to.print(tables.READING, soft_wrap=True)
        for line in found.findings:
            to.print(f"- {line}", soft_wrap=True)
    if html_out is not None:
        replace_bytes(html_out, html(found).encode(), mode=_MODE)
        click.echo(f"wrote {html_out}", err=as_json)


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not (parts and all(part.isdecimal() for part in parts)):
        raise UsageError(f"--batch is {text!r}; expected whole numbers, like 1,8")
    return tuple(dict.fromkeys(map(int, parts)))
