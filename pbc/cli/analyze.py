"""`pbc analyze`: parse, measure what layers are worth, print and plot it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from pbc.bench.report.tables import aligned
from pbc.cli import completion
from pbc.cli.compile import parse_shape, progress_bar
from pbc.cli.options import PATH, html_report, write, written
from pbc.cli.tables import as_json as json_option
from pbc.cli.tables import console
from pbc.scheme import page
from pbc.scheme.analysis import AnalysisOptions, analyse
from pbc.scheme.subject import Learning
from pbc.util.interrupt import interrupted_by_sigterm

_DEFAULTS = AnalysisOptions()


@click.command()
@click.argument("model", shell_complete=completion.models)
@click.argument("data", type=PATH)
@written("-o", "--output", default="contributions.json", show_default=True,
         help="What was measured, for `pbc compile --contributions`; goes on from it.")  # fmt: skip
@click.option("--weights", default=_DEFAULTS.weights, show_default=True,
              help="A .safetensors file, `default` or `random`.")  # fmt: skip
@click.option("--input", "shape", metavar="CxHxW", help="Input size; the model's own by default.")
@click.option("--resize", metavar="HOW", shell_complete=completion.resizes,
              help="Photos to that size: crop the centre, or squash.")  # fmt: skip
@click.option("--fast", is_flag=True, help="Rank by a Fisher score, and fine-tune nothing.")
@click.option("--last", type=int, metavar="K", help="The last K layers alone.")
@click.option("--photos", type=int, metavar="N", help="Train on N photos at most.")
@click.option("--epochs", type=int, default=_DEFAULTS.learning.epochs, show_default=True)
@click.option("--lr", "learning_rate", type=float, default=_DEFAULTS.learning.learning_rate,
              show_default=True)  # fmt: skip
@click.option("--batch", type=int, default=_DEFAULTS.learning.batch, show_default=True)
@click.option("--seed", type=int, default=_DEFAULTS.learning.seed, show_default=True)
@click.option("--jobs", type=int, default=_DEFAULTS.jobs, show_default=True,
              help="Processes that measure at once, of one thread each.")  # fmt: skip
@json_option
@html_report
def analyze(
    model: str,
    data: Path,
    output: Path,
    weights: str,
    shape: str | None,
    resize: str | None,
    fast: bool,
    last: int | None,
    photos: int | None,
    epochs: int,
    learning_rate: float,
    batch: int,
    seed: int,
    jobs: int,
    as_json: bool,
    html_out: Path | None,
) -> None:
    """Measure on photos what training each layer of MODEL would be worth.

    DATA has class folders. Of each layer a share of the weight learns beside the head, then the
    biases of the last layers; the gain on held-out photos is what `pbc compile` chooses by.
    """
    options = AnalysisOptions(
        weights=weights,
        shape=None if shape is None else parse_shape(shape),
        resize=resize,
        photos=photos,
        last=last,
        learning=Learning(epochs, learning_rate, batch, seed),
        jobs=jobs,
        fast=fast,
    )
    try:
        with interrupted_by_sigterm(), progress_bar(quiet=as_json):
            found = analyse(model, data, output, options)
    except KeyboardInterrupt:
        click.echo("interrupted: the same command goes on from here", err=True)
        sys.exit(130)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    else:
        to = console()
        to.print(aligned(page.rows(found)))
        to.print()
        to.print(aligned(page.bias_rows(found)))
        to.print()
        for line in page.summary(found):
            to.print(line, soft_wrap=True)
    if html_out is not None:
        write(html_out, page.html(found), quiet=as_json)
    use = f"pbc compile {model} --strategy sparse:8MiB --contributions {output}"
    click.echo(f"wrote {output}; next: {use}", err=as_json)
