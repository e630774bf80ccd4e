"""`pbc deploy`: parse, deploy, roll back or ask, print what came of it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from pbc.cli.unsigned import unsigned
from pbc.deploy import deployment
from pbc.deploy.board import CHECKS
from pbc.errors import UsageError

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("words", nargs=-1, metavar="[BUNDLE] USER@HOST[:DIR]")
@click.option("--status", "ask_status", is_flag=True, help="Say what is active there.")
@click.option("--rollback", is_flag=True, help="Go back to the version before.")
@click.option("--ssh-option", "ssh_options", multiple=True, metavar="WORDS",
              help="For ssh, like '-p 2222' or '-i key'.")  # fmt: skip
@click.option("--python", default="", help="The interpreter there.  [default: one that will do]")
@click.option("--wheels", type=_PATH, help="Take wheels from this folder, and from nowhere else.")
@click.option("--offline", is_flag=True, help="Take wheels that were collected before.")
@click.option("--ignore", multiple=True, metavar="CHECK",
              help=f"A check not to stop at: {', '.join(CHECKS)}.")  # fmt: skip
@click.option("--trust", multiple=True, metavar="KEYS",
              help="A public key that must have signed it, or a folder of them.  "
              "[default: what PBC_KEYS names]")  # fmt: skip
@click.option("--allow-older", is_flag=True, help="Activate it though a newer one is active.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@unsigned
def deploy(
    words: tuple[str, ...],
    ask_status: bool,
    rollback: bool,
    ssh_options: tuple[str, ...],
    as_json: bool,
    **settings: Any,
) -> None:
    """Bring BUNDLE and its runtime to a board over ssh, and make it the active one there.

    It becomes active once it has passed its self-test there; until then, and whatever happens, the
    version before stays. DIR is `pbc` in the home folder by default; DIR/bin/pbc runs what is
    active, DIR/bundle.pbc is its bundle.
    """
    options = deployment.DeployOptions(
        ssh_options=tuple(word for option in ssh_options for word in shlex.split(option)),
        **settings,
    )
    if ask_status and rollback:
        raise UsageError("--status and --rollback are two things; give one")
    if len(words) != (1 if ask_status or rollback else 2):
        form = "USER@HOST[:DIR]" if ask_status or rollback else "BUNDLE USER@HOST[:DIR]"
        raise UsageError(f"expected {form}, not {' '.join(words) or 'nothing'}")

    def report(line: str) -> None:
        click.echo(line, err=True)

    if ask_status:
        found = deployment.status(words[0], options)
        text = _status(found)
    elif rollback:
        found = deployment.rollback(words[0], options, report)
        text = f"active again: {found['slot']}; it was {found['previous']}"
    else:
        found = deployment.deploy(words[0], words[1], options, report)
        text = _deployed(found)
    click.echo(json.dumps(found, indent=1) if as_json else text)


def _deployed(found: dict[str, Any]) -> str:
    if not found["changed"]:
        return f"{found['slot']} is active already, and passes its self-test"
    before = f"; before it was {found['previous']}" if found["previous"] else ""
    return f"active: {found['slot']}{before}"


def _status(found: dict[str, Any]) -> str:
    lines = [found["folder"]]
    for title in ("current", "previous"):
        slot = found[title]
        words = "none" if slot is None else f"{slot['slot']}  {_about(slot)}"
        lines.append(f"{title + ':':<11}{words}")
    lines += [f"half made: {name}" for name in found["half_made"]]
    lines += [
        f"half copied: {part['file']} ({part['bytes']} bytes)" for part in found["half_copied"]
    ]
    if found["running"]:
        lines.append("another deploy is running there")
    return "\n".join(lines)


def _about(slot: dict[str, Any]) -> str:
    return (
        f"{slot['model']}, {slot['strategy']}, {slot['engine']}, "
        f"bundle {slot['bundle'][:12]}, pbc {slot['pbc']}"
    )
