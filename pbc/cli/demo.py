"""`pbc demo`: run the demo, print what came of it."""

from __future__ import annotations

from pathlib import Path

import click

from pbc.demo import teach


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("pbc-demo"),
    show_default=True,
    help="A folder that is not there yet.",
)
def demo(output: Path) -> None:
    """Teach a small network four handwritten digits, with nothing but what is installed.

    It was trained on the digits 0 to 5, and learns 6 to 9 from 100 scans of each. Nothing is
    downloaded; photos, model and report are left in a folder.
    """
    found = teach(output)
    low, high = found.evaluation.interval
    engine = found.model.bundle.manifest["engine"]
    click.echo(f"{found.photo}: {found.prediction!r}")
    click.echo(
        f"accuracy: {found.evaluation.accuracy:.1%} of {found.evaluation.count} scans that it has "
        f"not seen ({low:.1%} to {high:.1%} at 95 % confidence)"
    )
    click.echo(f"time: {found.seconds:.1f} s to learn from {found.samples} scans, with {engine}")
    click.echo(f"report: {found.report}")
