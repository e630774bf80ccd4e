"""`pbc report`: a personal model as one page."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pbc.data import ImageFolder
from pbc.report.personal import Report
from pbc.runtime.output.personal import Personal
from pbc.runtime.output.validation import Validation
from pbc.util.atomic import replace_bytes
from pbc.util.sizes import size_text

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("out", type=_PATH)
@click.argument("data", type=_PATH, required=False)
@click.option("-o", "--output", type=_PATH, help="File to write.  [default: OUT's name + .html]")
@click.option("--json", "as_json", is_flag=True, help="Print what it found as JSON, write no page.")
def report(out: Path, data: Path | None, output: Path | None, as_json: bool) -> None:
    """Write a page about a personal model: what it confuses, wrong photos, how it was trained.

    It is about the photos that training held out, or about DATA: labelled photos that it was not
    trained on. The file holds small copies of photos; nothing leaves this machine.
    """
    if data is None:
        found = Report.of(out)
    else:
        personal = Personal.open(out)
        samples = ImageFolder.open(data, personal.spec, held_out=True)
        for line in samples.inventory.lines():
            click.echo(line, err=True)
        labelled = samples.with_classes(personal.classes)
        results = [
            personal.evaluate(samples, level=at) for at in range(len(personal.bundle.ladder))
        ]
        validation = Validation.of(results[personal.level], labelled)
        levels = [
            {"level": at, "accuracy": result.accuracy, "sample_ms": result.sample_ms}
            for at, result in enumerate(results)
        ]
        found = Report.of(out, validation, f"of {data}", levels)
    if as_json:
        shown = None if found.validation is None else found.validation.to_json()
        known = {"model": found.model, "validation": shown, "levels": list(found.levels)}
        click.echo(json.dumps(known, ensure_ascii=False))
        return
    target = output or Path(f"{out.resolve().name}.html")
    replace_bytes(target, found.html().encode())
    click.echo(f"wrote {target} ({size_text(target.stat().st_size)})")
