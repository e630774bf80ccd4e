"""The commands of the device: train a bundle on photos, use and forget what came out."""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table
from rich.text import Text

from pbc.callbacks import together
from pbc.cli.completion import plugins_of
from pbc.cli.display import TrainDisplay, loss_text
from pbc.cli.number_or_auto import NumberOrAuto
from pbc.cli.objective import objective_options
from pbc.cli.options import batch_or_auto, learning_rate, threads
from pbc.cli.tables import show
from pbc.cli.unsigned import unsigned
from pbc.cli.verdict import accuracy_line, next_commands, verdict
from pbc.data import ImageFolder, Samples, read_image
from pbc.data import images as photos_below
from pbc.data.archive import is_zip
from pbc.data.held_out import default_validation, train_and_validation
from pbc.errors import PbcError
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.folder import Output
from pbc.runtime.output.personal import Personal
from pbc.runtime.runtime import Runtime
from pbc.util.interrupt import interrupted_by_sigterm
from pbc.util.terminal import one_line

_PATH = click.Path(path_type=Path)
_NONE = "none"
_DEFAULTS = TrainOptions()
# Of what is likelier than this a prediction tells, beside the likeliest: 0.0% says nothing.
_LEAST_TOLD = 0.0005


class _Val(click.ParamType[Any]):
    """A share to hold out (float), a place of photos (Path), or `none`."""

    name = "FOLDER|SHARE|none"

    def convert(self, value: Any, param: Any, context: Any) -> Path | float | str:
        if value == _NONE:
            return _NONE
        try:
            share = float(value)
        except ValueError:
            return Path(value)
        if not 0 < share < 1:
            self.fail(
                f"{value} is no share of the photos: expected more than 0 and less than 1, "
                f"{_NONE}, or a folder (./{value})"
            )
        return share


@click.command()
@click.argument("bundle", type=_PATH)
@click.argument("data", type=_PATH)
@click.option("-o", "--output", "out", type=_PATH, required=True, help="Folder of the result.")
@click.option(
    "--val",
    type=_Val(),
    metavar="FOLDER|SHARE|none",
    help="What to measure the result on: a folder of labelled photos, a share of DATA to hold out, "
    "or none (train on all).  [default: val/ beside train/ in DATA, else 0.2]",
)
@click.option("--epochs", type=int, default=_DEFAULTS.epochs, show_default=True)
@learning_rate
@batch_or_auto
@objective_options
@click.option(
    "--head",
    default="auto",
    show_default=True,
    help="closed: the head of all photos in one visit (elsewhere than with linear-probe its "
    "start); sgd: by epochs; auto: closed from about four photos a class on.",
)
@click.option(
    "--max-accuracy-loss",
    type=float,
    default=_DEFAULTS.max_accuracy_loss,
    show_default=True,
    help="Points of accuracy that cheap levels may cost.",
)
@click.option(
    "--time-budget", type=float, help="Seconds that the run may take.  [default: no limit]"
)
@click.option(
    "--stop",
    metavar="auto|TIME|ACCURACY",
    help="End early: auto, when what is left would bring less than --max-accuracy-loss; a time "
    "(90s, 5m); an accuracy on the held-out photos (95%).  [default: all epochs]",
)
@click.option(
    "--patience",
    type=int,
    help="End when so many epochs brought nothing better on the held-out photos; keep the best.",
)
@click.option(
    "--fidelity-floor",
    type=float,
    help="Never route a sample to a level that is less faithful.  "
    "[default: what --max-accuracy-loss implies]",
)
@click.option("--max-level", type=int, help="Route to no cheaper level.  [default: any]")
@click.option(
    "--deploy-level",
    type=NumberOrAuto("level"),
    default=_DEFAULTS.deploy_level,
    show_default=True,
    help="The level that the personal model runs at: one at which all photos are learnt from too, "
    "or auto, the cheapest within --max-accuracy-loss by the held-out photos.",
)
@click.option("--scheduler", default=_DEFAULTS.scheduler, show_default=True)
@click.option(
    "--alpha",
    type=float,
    default=_DEFAULTS.alpha,
    show_default=True,
    help="piebridge: skip the backward where the loss is below alpha times its running mean.",
)
@click.option(
    "--selector",
    help="Choose which tensors train, such as `elastic`.  [default: all of them, always]",
    shell_complete=plugins_of("pbc.selectors"),
)
@click.option(
    "--rho",
    type=float,
    default=_DEFAULTS.rho,
    show_default=True,
    help="What share of a full training iteration's time a selection may take.",
)
@click.option(
    "--select-every",
    type=int,
    default=_DEFAULTS.select_every,
    show_default=True,
    help="Epochs between selections.",
)
@click.option("--no-routing", is_flag=True, help="Run every sample at level 0.")
@click.option("--no-skip", is_flag=True, help="Learn from every sample in every epoch.")
@click.option(
    "--augment",
    type=int,
    default=_DEFAULTS.augment,
    show_default=True,
    help="Views per sample: the image and its crops; 0 and 1 are the image alone.",
)
@click.option(
    "--prefix-batch",
    type=int,
    help="Samples that the frozen prefix runs together.  [default: what measures fastest]",
)
@click.option("--costs", type=_PATH, help="Decide by the costs in this file, measure none.")
@click.option(
    "--cache", default=_DEFAULTS.cache, show_default=True, help="Keep features: off, ram or disk."
)
@click.option("--cache-mb", type=int, default=_DEFAULTS.cache_mb, show_default=True)
@click.option(
    "--cache-dtype", default=_DEFAULTS.cache_dtype, show_default=True, help="float32 or float16."
)
@click.option("--seed", type=int, default=_DEFAULTS.seed, show_default=True)
@threads
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in the output folder.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Start again in a folder that holds a run, which stays until there is something new.",
)
@click.option("--strict", is_flag=True, help="Stop at the first photo that cannot be read.")
@click.option(
    "--checkpoint-seconds", type=float, default=_DEFAULTS.checkpoint_seconds, show_default=True
)
@click.option(
    "--log",
    "logs",
    multiple=True,
    metavar="NAME",
    help="Bring the run to another tool too, by a callback of `pbc plugins`; repeatable.",
)
@unsigned
def train(
    bundle: Path,
    data: Path,
    out: Path,
    val: Path | float | str | None,
    no_routing: bool,
    no_skip: bool,
    resume: bool,
    overwrite: bool,
    strict: bool,
    logs: tuple[str, ...],
    **settings: Any,
) -> None:
    """Train a bundle on labelled photos: a folder of class folders, or a zip file of them.

    A fifth of the photos of each class is held out, and what the model makes of them told in the
    end. Of a data set with train/ and val/, train/ is trained on and val/ evaluated.

    Training can be killed at any moment; the same command with --resume goes on, to the same
    result. Photos, features and metrics stay on this machine; `pbc forget` removes them.
    """
    known = {field.name for field in dataclasses.fields(TrainOptions)}
    assert settings.keys() <= known
    options = TrainOptions(routing=not no_routing, skip=not no_skip, **settings)
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    runtime = Runtime.open(bundle)
    earlier = Output(out).written_at()
    try:
        display = TrainDisplay(options.epochs)
        with interrupted_by_sigterm(), display:
            report = together([display, *logs], out, options)
            val = default_validation(data) if val is None else val
            samples, validation = train_and_validation(
                data,
                runtime.spec,
                None if isinstance(val, str) else val,
                strict=strict,
                progress=display.reading,
            )
            _tell(samples, display.line)
            if isinstance(val, Path) and validation is not None:
                _tell(validation, display.line)
            result = runtime.fit(
                samples,
                options,
                out,
                val=validation,
                resume=resume,
                overwrite=overwrite,
                report=report,
            )
    except KeyboardInterrupt:
        if overwrite and earlier and Output(out).written_at() == earlier:
            click.echo(f"interrupted: {out} holds what it held before", err=True)
            sys.exit(130)
        again = "--resume instead of --overwrite" if overwrite else "--resume"
        click.echo(f"interrupted: the same command with {again} goes on from here", err=True)
        if Output(out).model.exists():
            click.echo(f"what was learnt so far is a model that works: {out}", err=True)
        sys.exit(130)
    if result is not None:
        click.echo("\n".join(verdict(result, Output(out))))
    elif isinstance(val, float):
        click.echo("accuracy not measured: no class has enough photos to hold some out")
    click.echo(f"wrote {out}")
    held_out = result is not None and isinstance(val, float)
    onnx = bool(runtime.bundle.manifest.get("export"))
    for line in next_commands(bundle, data, out, held_out=held_out, onnx=onnx):
        click.echo(line)


@click.command("eval")
@click.argument("out", type=_PATH)
@click.argument("data", type=_PATH)
@click.option("--level", type=int, help="0 is the original network.  [default: the model's own]")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engine.")
@click.option("--strict", is_flag=True, help="Stop at the first photo that cannot be read.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@unsigned
def evaluate(
    out: Path, data: Path, level: int | None, threads: int | None, strict: bool, as_json: bool
) -> None:
    """Measure the accuracy of a personal model on labelled photos."""
    personal = Personal.open(out, threads=threads)
    samples = ImageFolder.open(data, personal.spec, held_out=True, strict=strict)
    _tell(samples, functools.partial(click.echo, err=True))
    level = personal.level if level is None else level
    result = personal.evaluate(samples, level=level)
    if as_json:
        facts = {
            **result.to_json(),
            "level": level,
            "skipped": len(samples.skipped),
            "inventory": samples.inventory.to_json(),
        }
        click.echo(json.dumps(facts))
        return
    at = f" at level {level}" if level else ""
    click.echo(f"{accuracy_line(result)}, loss {loss_text(result.loss)}{at}")


@click.command()
@click.argument("out", type=_PATH)
@click.argument("images", type=_PATH, nargs=-1, required=True)
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--level", type=int, help="0 is the original network.  [default: the model's own]")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engine.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@unsigned
def predict(
    out: Path,
    images: tuple[Path, ...],
    top: int,
    level: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Name what a personal model sees in photos, the likeliest class first.

    Photos are files, folders and zips with all photos below, and patterns such as 'photos/*.jpg'.
    A photo that cannot be read is named, and the others are answered for; the exit code is then 1.
    """
    personal = Personal.open(out, threads=threads)
    found: dict[str, list[tuple[str, float]]] = {}
    unread = 0
    for photo, pixels in _photos(images, personal):
        if pixels is None:
            unread += 1
        else:
            found[photo] = personal.predict(pixels, top=top, level=level)
    _show_predictions(found, as_json)
    if unread:
        sys.exit(1)


def _photos(given: Iterable[Path], personal: Personal) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yield the name of every photo, and uint8[H, W, 3]; None for one that cannot be read."""
    for path in given:
        if path.is_dir() or is_zip(path):
            samples = photos_below(path, personal.spec)
            _tell(samples, functools.partial(click.echo, err=True))
            yield from ((samples.path(at), samples.decode(at)) for at in range(len(samples)))
            yield from ((name, None) for name, _ in samples.skipped)
        elif glob.has_magic(str(path)) and not path.exists():
            matching = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207  (absolute ones too)
            if not matching:
                raise PbcError(f"no photo matches {str(path)!r}")
            yield from _photos(map(Path, matching), personal)
        else:
            yield str(path), _read_or_tell(path, personal)


def _read_or_tell(path: Path, personal: Personal) -> np.ndarray | None:
    """Return uint8[H, W, channels] of a photo; None for one that cannot be read, and name it."""
    try:
        return read_image(path, personal.spec)
    except PbcError as error:
        click.echo(one_line(f"error: {error}"), err=True)
        return None


def _show_predictions(found: dict[str, list[tuple[str, float]]], as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "image": image,
                "classes": [{"class": name, "probability": share} for name, share in best],
            }
            for image, best in found.items()
        ]
        click.echo(json.dumps(rows))
        return
    table = Table("image", "class", "probability", box=None, pad_edge=False, header_style="bold")
    for image, best in found.items():
        told = [one for rank, one in enumerate(best) if rank == 0 or one[1] >= _LEAST_TOLD]
        for rank, (name, share) in enumerate(told):
            table.add_row(Text("" if rank else image), Text(name), f"{share:.1%}")
    if found:
        show(table)


@click.command()
@click.argument("out", type=_PATH)
@click.option("--all", "everything", is_flag=True, help="Remove the personal model too.")
def forget(out: Path, everything: bool) -> None:
    """Remove what a run keeps of the user's photos: cached features, checkpoint, metrics."""
    if not out.is_dir():
        raise PbcError(f"no folder {out}; give the output folder of pbc train")
    output = Output(out)
    if not output.is_run():
        raise PbcError(f"{out} is not the output folder of pbc train; nothing was removed")
    with output.locked():
        gone = output.forget(model=everything)
    for path in gone:
        click.echo(f"removed {path}")
    if not gone:
        click.echo(f"nothing to forget in {out}")


def _tell(samples: Samples, tell: Callable[[str], None]) -> None:
    """Say what of the data was left out or changed, and why."""
    for line in samples.inventory.lines():
        tell(line)
