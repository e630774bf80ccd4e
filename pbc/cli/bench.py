"""`pbc bench`: parse, run the match, print and write the results."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pbc.bench.compare import compare
from pbc.bench.options import RIVALS, BenchOptions
from pbc.bench.report import html as report
from pbc.bench.report import tables, verdict
from pbc.bench.standings import FULL
from pbc.cli.objective import objective_options
from pbc.cli.options import PATH, batch_or_auto, html_report, write, written
from pbc.cli.tables import as_json as json_option
from pbc.cli.tables import console
from pbc.cli.unsigned import unsigned
from pbc.errors import UsageError
from pbc.plugins import entries
from pbc.runtime.options import TrainOptions

_DEFAULTS = TrainOptions()


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("data", type=PATH)
@click.option("--test", type=PATH, help="Photos to test on.  [default: a third of DATA]")
@click.option(
    "--rivals",
    help="Which rivals run; `all` means every installed one.  "
    f"[default: those of {','.join(RIVALS)} whose packages are installed]",
)
@click.option("--seeds", type=int, default=3, show_default=True)
@click.option("--epochs", type=int, default=_DEFAULTS.epochs, show_default=True)
@batch_or_auto
@click.option("--lr", type=float, help="Learning rate of all rivals.  [default: tuned for PET]")
@objective_options
@click.option("--head", default="auto", show_default=True,
              help="Of pbc and pbc-nocache: auto, closed or sgd; see pbc train.")  # fmt: skip
@click.option("--threads", type=int, help="Threads of every rival.  [default: the engine's choice]")
@click.option("--epochs-of", multiple=True, metavar="RIVAL=N", help="Run only N epochs of a rival.")
@click.option("--lr-of", multiple=True, metavar="RIVAL=X", help="A rival's own learning rate.")
@click.option("--tune-epochs", type=int, metavar="N",
              help="Tune every rival's own learning rate: N epochs at each of four.")  # fmt: skip
@click.option("--weights", type=PATH, help="What the bundle was compiled from, if it moved.")
@click.option("--no-torch-compile", is_flag=True, help="PyTorch rivals run eagerly only.")
@click.option("--max-accuracy-loss", type=float, default=_DEFAULTS.max_accuracy_loss,
              show_default=True, help="Points that pbc's cheap levels may cost.")  # fmt: skip
@click.option("--rho", type=float, default=_DEFAULTS.rho, show_default=True,
              help="For elastic: its share of a full training iteration's time.")  # fmt: skip
@click.option("--select-every", type=int, default=_DEFAULTS.select_every, show_default=True,
              help="For elastic: epochs from one selection to the next.")  # fmt: skip
@click.option("--fidelity-floor", type=float, help="For pbc: never route below this fidelity.")
@click.option("--cache-mb", type=int, default=_DEFAULTS.cache_mb, show_default=True)
@click.option("--work", type=PATH, help="Where cells are kept.  [default: BUNDLE with .bench]")
@click.option("--resume", is_flag=True, help="Go on from the cells in the work folder.")
@click.option("--overwrite", is_flag=True, help="Start again in a folder that holds a bench.")
@click.option("--quick", is_flag=True, help="A few minutes: one seed, few epochs and photos.")
@click.option("--memory", is_flag=True,
              help="Measure what training takes, each rival in its own process.")  # fmt: skip
@click.option("--accuracy-budgets", is_flag=True,
              help="Add the time to 85/90/95/99 % of full training's accuracy.")  # fmt: skip
@click.option("--sweep", help="Studies to add: levels, policy-data, shots.")
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    metavar="NAME=PATH",
    help="For --sweep policy-data: the same model compiled with other images.",
)
@json_option
@written("-o", "--output", help="Write everything as JSON.")
@html_report
@written("--csv", "csv_out", help="Write the paper artifact's table.")
@unsigned
def bench(
    bundle: Path,
    data: Path,
    test: Path | None,
    rivals: str | None,
    seeds: int,
    epochs_of: Sequence[str],
    lr_of: Sequence[str],
    lr: float | None,
    tune_epochs: int | None,
    weights: Path | None,
    no_torch_compile: bool,
    work: Path | None,
    resume: bool,
    overwrite: bool,
    memory: bool,
    quick: bool,
    accuracy_budgets: bool,
    sweep: str | None,
    bundles: Sequence[str],
    as_json: bool,
    output: Path | None,
    html_out: Path | None,
    csv_out: Path | None,
    **settings: Any,
) -> None:
    """Compare ways to train BUNDLE on DATA, in turn, under one fair protocol.

    DATA is a folder of class folders, a zip of them, or a folder with train/ and test/ inside.
    Killed at any moment, the same command with --resume goes on with the epoch that was lost.
    """
    names: tuple[str, ...] = RIVALS
    if rivals is not None:
        names = tuple(entries("pbc.rivals")) if rivals == "all" else _list(rivals)
    if accuracy_budgets and FULL not in names:
        raise UsageError(f"--accuracy-budgets needs {FULL!r} among --rivals ({', '.join(names)})")
    options = BenchOptions(
        train=TrainOptions(learning_rate=lr, **settings),
        test=test,
        rivals=names,
        optional=rivals in (None, "all"),
        seeds=seeds,
        epochs_of={name: _whole(name, text) for name, text in _pairs("--epochs-of", epochs_of)},
        rate_of={name: _number(name, text) for name, text in _pairs("--lr-of", lr_of)},
        tune_epochs=tune_epochs,
        weights=weights,
        torch_compile=not no_torch_compile,
        memory=memory,
        quick=quick,
        sweeps=_list(sweep or ""),
        policy_bundles={name: Path(path) for name, path in _pairs("--bundle", bundles)},
        resume=resume,
        overwrite=overwrite,
    )
    try:
        results = compare(bundle, data, options, work or bundle.with_suffix(".bench"), _tell)
    except KeyboardInterrupt:
        click.echo("interrupted: the same command with --resume goes on from here", err=True)
        sys.exit(130)
    text = json.dumps(results.to_json(), indent=1) + "\n"
    if as_json:
        click.echo(text, nl=False)
    else:
        tables.show(console(), results, accuracy_budgets)
    if output is not None:
        write(output, text, quiet=as_json)
    if html_out is not None:
        write(html_out, report.html(results, accuracy_budgets), quiet=as_json)
    if csv_out is not None:
        write(csv_out, tables.artifact_csv(results), quiet=as_json)
    if not as_json:
        told = verdict.lines(results)
        where = [f"report: {html_out}"] if told and html_out is not None else []
        click.echo("\n".join([*told, *where]))


def _tell(line: str) -> None:
    click.echo(line, err=True)


def _list(text: str) -> tuple[str, ...]:
    """Split names at commas; each counts once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _pairs(option: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} is {text!r}; expected NAME=VALUE")
        pairs.append((name, value))
    return pairs


def _whole(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--epochs-of {name} is {text!r}; expected a whole number, 1 or more")
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"--lr-of {name} is {text!r}; expected a number") from error
