"""Options that several commands have, and the reports that they write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pbc.cli.number_or_auto import NumberOrAuto
from pbc.errors import UsageError
from pbc.util.atomic import replace_bytes

PATH = click.Path(path_type=Path)
_MODE = 0o644  # a report is made to be shown; it holds no photo


def _in_a_folder(
    context: click.Context, parameter: click.Parameter, path: Path | None
) -> Path | None:
    """Refuse, before anything runs, a file that could not be written."""
    if path is not None and not path.resolve().parent.is_dir():
        raise UsageError(f"the folder of {path} does not exist")
    return path


def written(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """Return an option that names a file to write; settings are click's."""
    return click.option(*names, type=PATH, callback=_in_a_folder, **settings)


def write(path: Path, text: str, *, quiet: bool) -> None:
    """Write what is made to be shown, and say so; to stderr where stdout is for a program."""
    replace_bytes(path, text.encode(), mode=_MODE)
    click.echo(f"wrote {path}", err=quiet)


def write_private(path: Path, text: str, *, quiet: bool) -> None:
    """Write what shows the user's photos, for the user alone."""
    replace_bytes(path, text.encode())
    click.echo(f"wrote {path}, which shows photos: only you can read it", err=quiet)


html_report = written("--html", "html_out", help="Write a report to open in a browser.")
batch = click.option("--batch", type=int, help="Samples per mini-batch.  [default: the bundle's]")
batch_or_auto = click.option(
    "--batch",
    type=NumberOrAuto("samples"),
    help="Samples per mini-batch; auto: 64 at a higher rate where features are kept.  "
    "[default: the bundle's]",
)
threads = click.option(
    "--threads", type=int, help="Threads of the engine.  [default: the engine's choice]"
)
learning_rate = click.option(
    "--lr",
    "learning_rate",
    type=float,
    help="Learning rate.  [default: sgd 0.01, adam and adamw 0.001]",
)

_PROTECTION = (
    click.option(
        "--top-k",
        type=float,
        metavar="PERCENT",
        callback=lambda context, parameter, percent: percent if percent is None else percent / 100,
        help="Send the largest values alone, keep the others for the next update.",
    ),
    click.option("--clip", type=float, help="Bound the norm of an update."),
    click.option("--noise", type=float, help="Normal noise, its deviation by the clip."),
)


def protection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how updates are protected, under the names of Protection."""
    for option in reversed(_PROTECTION):
        command = option(command)
    return command
