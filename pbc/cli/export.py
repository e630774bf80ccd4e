"""`pbc export`: hand a personal model to other programs."""

from __future__ import annotations

from pathlib import Path

import click

from pbc.cli.unsigned import unsigned
from pbc.runtime.output.export import export as write
from pbc.util.sizes import size_text

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("out", type=_PATH)
@click.option(
    "-o", "--output", "target", type=_PATH, help="File to write.  [default: OUT's name + .onnx]"
)
@click.option("--level", type=int, help="Level of an .onnx file.  [default: the model's own]")
@unsigned
def export(out: Path, target: Path | None, level: int | None) -> None:
    """Write a personal model as one file: FILE.onnx to run anywhere, or FILE.safetensors.

    The .onnx file takes preprocessed images and returns logits and probabilities; class names and
    the preprocessing are in its metadata. The .safetensors file holds the trained parameters only.
    """
    if target is None:
        target = Path(f"{out.resolve().name}.onnx")
    write(out, target, level=level)
    click.echo(f"wrote {target} ({size_text(target.stat().st_size)})")
