"""`pbc profile`: parse, measure in fresh processes, print and write what was found."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pbc.bench.report.tables import aligned
from pbc.cli.options import PATH, batch, written
from pbc.cli.tables import console
from pbc.cli.unsigned import unsigned
from pbc.errors import UsageError
from pbc.profile.measure import Profile, measure
from pbc.profile.options import ProfileOptions
from pbc.profile.ratios import best_prefix, image_ms
from pbc.profile.remote import profile_on
from pbc.profile.task import COMPILED, EAGER, level_name
from pbc.util.atomic import replace_bytes
from pbc.util.sizes import memory_text

_DEFAULTS = ProfileOptions()
_MODE = 0o644  # it is made to be shown, and to be read by the compiler; it holds no photo


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--data", type=PATH, help="Photos to measure on.  [default: noise]")
@batch
@click.option(
    "--threads", metavar="N,N,…", help="Numbers of threads to measure with.  [default: one per CPU]"
)
@click.option("--levels", metavar="N,N,…", help="Levels to measure.  [default: all]")
@click.option("--optimizer", default=_DEFAULTS.optimizer, show_default=True)
@click.option("--rounds", type=int, default=_DEFAULTS.rounds, show_default=True,
              help="How often everything is timed, in turn.")  # fmt: skip
@click.option("--against", metavar="torch|none",
              help="What to compare with.  [default: torch, where it is installed]")  # fmt: skip
@click.option("--no-compile", is_flag=True, help="PyTorch runs eagerly only.")
@click.option("--weights", type=PATH, help="What the bundle was compiled from, if it moved.")
@click.option("--on", metavar="USER@HOST[:DIR]",
              help="Measure there, where `pbc deploy` brought BUNDLE.")  # fmt: skip
@click.option("--ssh-option", "ssh_options", multiple=True, metavar="WORDS",
              help="For ssh, like '-p 2222' or '-i key'.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@written("-o", "--output", help="Write everything as JSON.")
@unsigned
def profile(
    bundle: Path,
    threads: str | None,
    levels: str | None,
    no_compile: bool,
    on: str | None,
    ssh_options: tuple[str, ...],
    as_json: bool,
    output: Path | None,
    **settings: Any,
) -> None:
    """Measure what each stage of each level of BUNDLE costs here, and what PyTorch needs.

    Training with BUNDLE decides by measurements of its own; this one is for people, and for
    `pbc compile --cost`, which plans the next ladder by it.
    """
    if ssh_options and on is None:
        raise UsageError("--ssh-option is for --on")

    def tell(line: str) -> None:
        click.echo(line, err=True)

    options = ProfileOptions(
        threads=_numbers("--threads", threads),
        levels=_numbers("--levels", levels),
        torch_compile=not no_compile,
        **settings,
    )
    try:
        if on is None:
            found = measure(bundle, options, tell)
        else:
            words = [word for option in ssh_options for word in shlex.split(option)]
            found = profile_on(on, bundle, options, words, tell)
    except KeyboardInterrupt:
        click.echo("interrupted: nothing was kept", err=True)
        sys.exit(130)
    text = json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n"
    if output is not None:
        replace_bytes(output, text.encode(), mode=_MODE)
    if as_json:
        click.echo(text, nl=False)
        return
    show(console(), found)
    if output is not None:
        click.echo(f"wrote {output}")


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Split whole numbers at commas; each counts once."""
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if text is not None and not (parts and all(part.isdecimal() for part in parts)):
        raise UsageError(f"{option} is {text!r}; expected whole numbers, like 0,1")
    return tuple(dict.fromkeys(int(part) for part in parts))


def show(to: Console, found: Profile) -> None:
    """Print a table for each number of threads, then loading, memory and notes."""
    content = found.to_json()
    protocol, bundle = content["protocol"], content["bundle"]
    to.print(
        f"{bundle['model']}, {bundle['strategy']}, {bundle['engine_version']}; "
        f"batch {protocol['batch']}, {protocol['optimizer']}, {protocol['classes']} classes, "
        f"{protocol['rounds']} rounds in turn; least time (median)",
        soft_wrap=True,
    )
    for run in content["runs"]:
        to.print()
        to.print(_stages(run, content))
    to.print()
    to.print(_loading(content["process"]))
    to.print()
    to.print(_training(content["process"]["training"]))
    to.print()
    for note in content["notes"]:
        to.print(Text.assemble(("note: ", "yellow"), note), soft_wrap=True)


def _stages(run: dict[str, Any], content: dict[str, Any]) -> Table:
    batch = content["protocol"]["batch"]
    loads = content["process"]["later_load"]["level_ms"]
    by_name = {level_name(level): loads[str(level)] for level in content["protocol"]["levels"]}
    rows = [
        [
            f"{run['threads']} thread(s), ms",
            f"prefix/image by {batch}",
            "at its best",
            "by",
            f"step of {batch}",
            "skipped",
            "logits",
            "load",
            "total/image",
            "prefix",
            "step",
            "total",
        ]
    ]
    for name, side in run["sides"].items():
        compared = run["ratios"].get(name, {})
        best, size = best_prefix(side)
        against = "" if name == level_name(0) else " of L0"
        rows.append(
            [
                name if name in by_name else f"PyTorch {_way(name)}",
                _times(side["prefix"].get(str(batch))),
                _times(side["prefix"].get(str(size))),
                str(size) if best else "-",
                _times(side["step"]),
                _times(side["forward"]),
                _times(side.get("logits")),
                f"{by_name[name]:.0f}" if name in by_name else "-",
                f"{image_ms(side, batch):.3g}",
                *(
                    f"{compared[stage]:.2f}x{against}" if stage in compared else "-"
                    for stage in ("prefix", "step", "total")
                ),
            ]
        )
    return aligned(rows)


def _loading(process: dict[str, Any]) -> Table:
    rows = [["loading, s", "total", "start and open", "engine", "levels", "peak memory", "PSS"]]
    rows += [
        [
            title,
            f"{load['total_seconds']:.2f}",
            f"{load['open_seconds']:.2f}",
            f"{load['engine_seconds']:.2f}",
            f"{load['load_seconds']:.2f}",
            _memory(load["peak_rss_bytes"]),
            _memory(load["pss_bytes"]),
        ]
        for title, load in (
            ("the first time", process["first_load"]),
            ("later", process["later_load"]),
        )
    ]
    return aligned(rows)


def _training(trained: dict[str, Any]) -> Table:
    rows = [["training at level 0", "steps", "peak memory", "PSS"]]
    rows += [
        [
            f"PyTorch {_way(who)}" if who in (EAGER, COMPILED) else who,
            str(found["steps"]),
            _memory(found["peak_rss_bytes"]),
            _memory(found["pss_bytes"]),
        ]
        for who, found in trained.items()
    ]
    return aligned(rows)


def _way(name: str) -> str:
    return "compiled" if name == COMPILED else name


def _times(times: dict[str, float] | None) -> str:
    return "-" if times is None else f"{times['min']:.3g} ({times['median']:.3g})"


def _memory(count: int | None) -> str:
    return "-" if count is None else memory_text(count)
