"""`pbc audit`: parse, attack, print and write what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pbc.audit import pixel_tables, tables
from pbc.audit.audit import audit as run
from pbc.audit.html import html
from pbc.audit.options import AuditOptions
from pbc.audit.pixel_tables import Reconstruction
from pbc.bench.report.tables import aligned
from pbc.cli.objective import objective_options, take_objective
from pbc.cli.options import (
    PATH,
    html_report,
    learning_rate,
    protection_options,
    threads,
    write,
    write_private,
)
from pbc.cli.tables import as_json as json_option
from pbc.cli.tables import console
from pbc.cli.unsigned import unsigned
from pbc.errors import UsageError

_DEFAULTS = AuditOptions()


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("photos", type=PATH)
@click.option("--batch", "batches", metavar="N,N,…", help="Photos behind one shared gradient.  "
              f"[default: {','.join(map(str, _DEFAULTS.batches))}]")  # fmt: skip
@click.option("--epochs", type=int, default=_DEFAULTS.epochs, show_default=True,
              help="Of local training behind one shared update.")  # fmt: skip
@click.option("--clients", type=int, default=_DEFAULTS.clients, show_default=True)
@click.option("--rounds", type=int, default=_DEFAULTS.rounds, show_default=True,
              help="Of averaging, for the accuracy.")  # fmt: skip
@protection_options
@click.option("--dp", type=float, metavar="EPSILON",
              help="The noise of an (ε, 1/photos)-private release.")  # fmt: skip
@learning_rate
@objective_options
@click.option("--pixels", is_flag=True,
              help="Rebuild photos from gradients too, with torch: minutes a photo.")  # fmt: skip
@click.option("--pixel-steps", type=click.IntRange(min=1), default=1000, show_default=True,
              help="Iterations of a reconstruction.")  # fmt: skip
@click.option("--weights", type=PATH,
              help="For --pixels: what the bundle was compiled from, if it moved.")  # fmt: skip
@click.option("--max-photos", type=int, default=_DEFAULTS.photos, show_default=True)
@click.option("--seed", type=int, default=_DEFAULTS.seed, show_default=True)
@threads
@json_option
@html_report
@unsigned
def audit(
    bundle: Path,
    photos: Path,
    batches: str | None,
    pixels: bool,
    pixel_steps: int,
    weights: Path | None,
    max_photos: int,
    as_json: bool,
    html_out: Path | None,
    **settings: Any,
) -> None:
    """Attack what devices that train BUNDLE on PHOTOS would share, as someone who receives it.

    Half of PHOTOS are dealt to clients; the attacker has all of them, and θ before and after.
    """
    options = AuditOptions(
        batches=_DEFAULTS.batches if batches is None else _numbers(batches),
        objective=take_objective(settings),
        photos=max_photos,
        **settings,
    )
    found = run(bundle, photos, options, _tell)
    pictures: tuple[Reconstruction, ...] = ()
    if pixels:
        # Only this needs torch, and the network that the bundle was compiled from.
        from pbc.audit.pixels.reconstruct import PixelOptions, rebuilt

        sizes = (1,) if batches is None else options.batches
        pictures = rebuilt(
            bundle, photos, options, PixelOptions(sizes, pixel_steps, weights, options.seed), _tell
        )
    if as_json:
        content = {**found.to_json(), "pixels": [each.to_json() for each in pictures]}
        click.echo(json.dumps(content, indent=1, ensure_ascii=False))
    else:
        to = console()
        to.print(aligned(tables.rows(found)))
        to.print()
        to.print(tables.READING, soft_wrap=True)
        for line in found.findings:
            to.print(f"- {line}", soft_wrap=True)
        if pictures:
            to.print()
            to.print(aligned(pixel_tables.rows(pictures)))
            to.print()
            to.print(pixel_tables.READING, soft_wrap=True)
            for line in pixel_tables.findings(pictures):
                to.print(f"- {line}", soft_wrap=True)
    if html_out is not None:
        text = html(found, pictures)
        if pictures:  # it shows photos, which are the user's own to show
            write_private(html_out, text, quiet=as_json)
        else:
            write(html_out, text, quiet=as_json)


def _tell(line: str) -> None:
    click.echo(line, err=True)


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not (parts and all(part.isdecimal() for part in parts)):
        raise UsageError(f"--batch is {text!r}; expected whole numbers, like 1,8")
    return tuple(dict.fromkeys(map(int, parts)))
