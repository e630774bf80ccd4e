"""`pbc pack`: parse, pack, print what the archive is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pbc.cli.options import PATH, written
from pbc.cli.unsigned import unsigned
from pbc.deploy.pack import ACTIVATE, PackOptions
from pbc.deploy.pack import pack as write
from pbc.util.sizes import size_text


@click.command()
@click.argument("bundle", type=PATH)
@written("-o", "--output", required=True, metavar="FILE.tar")
@click.option("--python-version", "python", metavar="3.N",
              help="The board's Python.  [default: the target's, else this one's]")  # fmt: skip
@click.option("--libc", metavar="2.N", help="The board's glibc.  [default: the target's]")
@click.option("--wheels", type=PATH, help="Take wheels from this folder, and from nowhere else.")
@click.option("--offline", is_flag=True, help="Take wheels that were collected before.")
@click.option("--trust", multiple=True, metavar="KEYS",
              help="A public key that must have signed it, or a folder of them.  "
              "[default: what PBC_KEYS names]")  # fmt: skip
@click.option("--allow-older", is_flag=True, help="Activate it though a newer one is active.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@unsigned
def pack(bundle: Path, output: Path, as_json: bool, **settings: Any) -> None:
    """Write BUNDLE, its runtime and an activation script into one archive.

    For boards that have an updater of their own: unpacked there, `sh activate.sh DIR` does what
    `pbc deploy` does once it has copied.
    """
    found = write(bundle, output, PackOptions(**settings))
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(
        f"wrote {output} ({size_text(found['bytes'])}) for Python {found['python']} on "
        f"{found['arch']} with {found['libc']} or newer; on the board: sh {ACTIVATE} DIR"
    )
