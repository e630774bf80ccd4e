"""`pbc compile`: parse, call the compiler, print."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pbc import compiler
from pbc.bundle import Bundle
from pbc.cli import completion
from pbc.cli.inspect import memory_words, show_blocks, show_levels
from pbc.cli.recipe import recipe_options
from pbc.cli.recipe import save_recipe as write_recipe
from pbc.cli.stages import StageLines
from pbc.data import InputSpec
from pbc.errors import UsageError
from pbc.frontend.origin import nameless
from pbc.proxies.use import LADDERS
from pbc.runtime.routing.outlook import outlooks
from pbc.util.interrupt import interrupted_by_sigterm
from pbc.util.progress import reporting_to, telling
from pbc.util.sizes import size_text


def parse_shape(text: str) -> tuple[int, int, int]:
    """`3x128x128` as (channels, height, width); raises UsageError."""
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise UsageError(f"--input is {text!r}; expected CHANNELSxHEIGHTxWIDTH, such as 3x128x128")
    channels, height, width = (int(size) for size in sizes)
    return channels, height, width


@click.command()
@click.argument("model", shell_complete=completion.models)
@recipe_options
@click.option(
    "--target",
    default="host",
    show_default=True,
    help="The device; see `pbc targets`.",
    shell_complete=completion.plugins_of("pbc.targets"),
)
@click.option(
    "--weights",
    default="default",
    show_default=True,
    help="A .safetensors file, `default` (the zoo's pretrained weights) or `random`.",
)
@click.option(
    "--strategy",
    default="linear-probe",
    show_default=True,
    help="What trains; see `pbc strategies` (last-k:K, adapters:N, …).",
    shell_complete=completion.plugins_of("pbc.strategies"),
)
@click.option(
    "--blocks",
    metavar="PATTERN",
    help="The modules that the strategy counts, such as 'layers.*'; found by pbc by default.",
)
@click.option(
    "--contributions",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What `pbc analyze` measured, for a strategy of a budget such as sparse:8MiB.",
)
@click.option(
    "--classes", type=int, help="How many classes to expect; training takes those of its photos."
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Class folders, or a zip of them: the classes to expect, in this order.",
)
@click.option(
    "--levels",
    default=4,
    show_default=True,
    help="How many proxies, at most; level 0 is extra.",
)
@click.option(
    "--min-cost",
    default=0.3,
    show_default=True,
    help="The cheapest level's cost relative to the original.",
)
@click.option(
    "--axes",
    default=",".join(compiler.CompileOptions().axes),
    show_default=True,
    metavar="LIST",
    help="What a cheaper level may give up.",
)
@click.option(
    "--ladder",
    type=click.Choice(LADDERS),
    default=compiler.CompileOptions().ladder,
    show_default=True,
    help="Levels that a run would use, by calibration images, or even steps of cost.",
)
@click.option(
    "--importance",
    default="magnitude",
    show_default=True,
    metavar="NAME",
    help="Which channels stay: by magnitude, group-norm, taylor, hessian, bn-scale or fpgm.",
)
@click.option(
    "--cost",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What `pbc profile` measured on the device, to plan even steps by.",
)
@click.option(
    "--engine",
    help="What executes on the device; the target's own by default.",
    shell_complete=completion.plugins_of("pbc.lowerings"),
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Unlabelled images (folder or zip) to align the proxies on.",
)
@click.option("--align-steps", type=click.IntRange(min=1), help="Alignment steps per level.")
@click.option(
    "--align-time",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MINUTES",
    help="Minutes of alignment for all levels together.  [default: 10]",
)
@click.option(
    "--align-loss",
    default="features",
    show_default=True,
    metavar="TERMS",
    help="What proxies are distilled by: features, logits, map, nst or a sum: features+map.",
)
@click.option(
    "--tune",
    type=click.FloatRange(min=0),
    metavar="MINUTES",
    help="Measure here which code is fastest, for so long; goes on at the next call. "
    "0: take what was measured.",
)
@click.option("--input", "shape", metavar="CxHxW", help="Input size; the model's own by default.")
@click.option(
    "--resize",
    metavar="HOW",
    shell_complete=completion.resizes,
    help="Photos to that size: crop the centre, or squash.  [default: as the model's zoo does]",
)
@click.option("--batch", default=8, show_default=True, help="Samples per mini-batch on the device.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--with",
    "passes",
    multiple=True,
    metavar="PASS",
    help="Add a pass, such as cluster-weights:4; repeatable.",
)
@click.option("--without", multiple=True, metavar="PASS", help="Leave a pass out; repeatable.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The bundle.  [default: MODEL.pbc]"
)
@click.option("--folder", is_flag=True, help="Write the bundle as a folder, not as one file.")
@click.option(
    "--dump-ir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the program as text after each pass.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def compile(
    model: str,
    output: Path | None,
    shape: str | None,
    axes: str,
    dry_run: bool,
    as_json: bool,
    save_recipe: Path | None,
    **options: Any,
) -> None:
    """Compile MODEL into a bundle.

    MODEL is resnet50, torchvision:NAME, timm:NAME, hf-hub:OWNER/NAME or file.py:factory.
    """
    chosen = compiler.CompileOptions(
        shape=None if shape is None else parse_shape(shape),
        axes=tuple(filter(None, axes.split(","))),
        command=shlex.join(["pbc", *nameless(sys.argv[1:])]),
        **options,
    )
    if save_recipe is not None:
        write_recipe(save_recipe, click.get_current_context())
    if output is None:
        output = Path(f"{model.rpartition(':')[2].rpartition('/')[2]}.pbc")
    try:
        with interrupted_by_sigterm(), progress_bar(quiet=as_json):
            result = (
                compiler.forecast(model, chosen)
                if dry_run
                else compiler.compile(model, output, chosen)
            )
    except KeyboardInterrupt:
        click.echo("interrupted: the same command goes on from here", err=True)
        sys.exit(130)
    if isinstance(result, compiler.Forecast):
        _show_plan(result, as_json)
    elif as_json:
        click.echo(json.dumps(result.manifest, indent=2, ensure_ascii=False))
    else:
        _show_result(result)


def _show_plan(plan: compiler.Forecast, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(plan.to_json(), indent=2))
        return
    click.echo(f"passes: {', '.join(plan.passes)}")
    click.echo(f"engine: {plan.engine}")
    _show_requires(plan.requires)
    show_blocks([vars(block) for block in plan.blocks])
    show_levels(plan.ladder.to_json(), plan.ladder.cost_model)
    for name, size in plan.file_bytes.items():
        click.echo(f"{name}: {size_text(size)} expected")
    click.echo(f"training takes: {memory_words(plan.memory, plan.engine)}")
    _show_notes(plan.notes)
    click.echo("dry run: nothing was tried or written")


def _show_result(bundle: Bundle) -> None:
    manifest = bundle.manifest
    show_levels(manifest["levels"], manifest["cost_model"])
    click.echo(f"photos: {InputSpec.from_json(manifest['input']).words()}")
    _show_requires({**manifest["requires"], **manifest["by_hand"]})
    _show_notes(manifest["notes"])
    if len(bundle.ladder) > 1:
        for outlook in outlooks(manifest, bundle.ladder):
            click.echo(outlook.told())
    size = sum(facts["size_bytes"] for facts in manifest["files"].values())
    click.echo(
        f"wrote {bundle.path} ({size_text(size)}); next: pbc train {bundle.path} PHOTOS -o OUT"
    )


def _show_requires(requires: Mapping[str, str]) -> None:
    listed = "; ".join(f"{name} {wanted}" for name, wanted in requires.items())
    click.echo(f"requires on the device: {listed}")


def _show_notes(notes: tuple[str, ...] | list[str]) -> None:
    for note in notes:
        click.echo(f"{click.style('note:', fg='yellow')} {note}")


@contextmanager
def progress_bar(quiet: bool) -> Iterator[None]:
    """Show what the compiler reports: each stage's seconds, and a bar on a terminal.

    In a pipe there is a line for each tenth of a long stage instead of the bar.
    """
    console = Console(stderr=True)

    def print_line(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with telling(print_line), _bar(console, quiet):
        yield


@contextmanager
def _bar(console: Console, quiet: bool) -> Iterator[None]:
    if quiet:
        yield
    elif not console.is_terminal:
        lines = StageLines(lambda line: click.echo(line, err=True), tenths=True)
        with reporting_to(lines):
            yield
    else:
        columns = (
            TextColumn("{task.description:>18}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=1.0, text="")
            lines = StageLines(bar.console.print, tenths=False)

            def show(stage: str, fraction: float, text: str) -> None:
                if bar.tasks[0].description != stage:
                    bar.reset(task, description=stage, total=1.0)
                bar.update(task, completed=fraction, text=text)
                lines(stage, fraction, text)

            with reporting_to(show):
                yield
