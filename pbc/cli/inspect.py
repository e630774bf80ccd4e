"""`pbc inspect`: show the contents of a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from pbc.bundle import Bundle, trust
from pbc.bundle.ladder import MACS
from pbc.cli.tables import show
from pbc.data import InputSpec
from pbc.errors import PbcError
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.folder import Output
from pbc.runtime.output.personal import stored
from pbc.runtime.routing.fidelity_floor import floor_for
from pbc.util.sizes import memory_text, size_text

DIMS = "dims.json"
SHOWN_LOSSES = (0.5, 1.0, 2.0, 5.0)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--dims", is_flag=True, help="Every dimension of the frozen part, and why it is fixed."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def inspect(bundle: Path, dims: bool, as_json: bool) -> None:
    """Show what BUNDLE holds, after verifying every file in it; or a personal model's folder."""
    trained = None
    if bundle.is_dir() and Output(bundle).is_run():
        opened, trained, _ = stored(bundle, used=False)
    else:
        opened = Bundle.open(bundle)
    opened.verify()
    if dims and DIMS not in opened.manifest["files"]:
        raise PbcError(f"{bundle} has no table of dimensions ({DIMS})")
    table = opened.json(DIMS) if dims else None
    if as_json:
        shown = trained or opened.manifest if table is None else table
        click.echo(json.dumps(shown, indent=2, ensure_ascii=False))
    elif table is not None:
        _show_dims(table)
    else:
        if trained is not None:
            _show_personal(bundle, trained)
        _show_manifest(opened.manifest, signers(opened))


def _show_personal(root: Path, model: dict[str, Any]) -> None:
    """Print what training added to the bundle, which is shown below it."""
    accuracy = model["metrics"].get("val_accuracy")
    epochs = model["metrics"].get("epochs", 0)
    usual = TrainOptions().to_json()
    chosen = [
        f"{name} {value}" for name, value in model["options"].items() if usual.get(name) != value
    ]
    rows = {
        "personal model": str(root),
        "trained on": f"{model['samples']} photos, {epochs} epoch{'s' if epochs != 1 else ''}",
        "classes": f"{len(model['classes'])}: {', '.join(model['classes'])}",
        "accuracy": "not measured" if accuracy is None else f"{accuracy:.2%} on held-out photos",
        "options": ", ".join(chosen) or "the defaults",
        "trained part": size_text(Output(root).trainable.stat().st_size),
    }
    _show_rows(rows)
    click.echo()


def _show_rows(rows: dict[str, str]) -> None:
    grid = Table.grid(padding=(0, 2))
    for key, value in rows.items():
        grid.add_row(Text(key, style="bold"), Text(value))
    show(grid)


def _show_manifest(manifest: dict[str, Any], signed_by: str) -> None:
    provenance = {"weights": "?", "pbc": "?", "torch": "?", "command": "?"}
    provenance |= manifest.get("provenance", {})
    shape = "x".join(str(size) for size in manifest["input"]["shape"])
    frozen = manifest["features"]
    sent = ", ".join(f"{name} {size}" for name, size in frozen.items())
    names = manifest.get("classes")
    count = manifest.get("class_count")
    likely = count or len(names or ()) or None
    trained = sum(_elements(size, likely) for size in manifest["parameters"].values())
    each = "" if likely else " for one class"
    command = f": {provenance['command']}" if provenance["command"] else ""
    rows = {
        "model": f"{manifest['model']} (weights: {provenance['weights']})",
        "input": f"{shape}: photos are {InputSpec.from_json(manifest['input']).words()}",
        "strategy": f"{manifest['strategy']}: {trained:,} trainable values{each} in "
        f"{len(manifest['parameters'])} tensors",
        "prefix sends": "the images themselves (no prefix)" if list(frozen) == ["x"] else sent,
        "classes": _classes(names, count),
        "target": f"{manifest['target']['name']} (engine {manifest['engine']})",
        "requires": requirements(manifest),
        "memory": memory_words(manifest.get("memory"), manifest["engine"]),
        "made by": f"pbc {provenance['pbc']}, torch {provenance['torch']}{command}",
        "digest": manifest["digest"],
        "signed by": signed_by,
    }
    _show_rows(rows)
    show_blocks(manifest.get("blocks", []))
    show_levels(manifest["levels"], manifest.get("cost_model", MACS))
    _show_policy(manifest.get("policy"))
    _show_accuracy_map(manifest.get("accuracy_map"))
    files = Table("file", "bytes", "sha256", box=None, pad_edge=False, header_style="bold")
    files.columns[1].justify = "right"
    for name, facts in manifest["files"].items():
        files.add_row(name, f"{facts['size_bytes']:,}", facts["sha256"][:16] + "…")
    show(files)
    for note in manifest.get("notes", []):
        click.echo(f"{click.style('note:', fg='yellow')} {note}")


def _show_policy(policy: dict[str, Any] | None) -> None:
    if policy is None:
        click.echo("policy: none (nothing is routed)")
        return
    report = policy["report"]
    _, height, width = policy["view"]
    if "shipped" not in report:
        click.echo(f"policy: predicts fidelity from {height}x{width} views")
        return
    text = f"policy: predicts fidelity from {height}x{width} views (ships the {report['shipped']})"
    network = report.get("network")
    if network is None:
        count = report.get("held_out_samples", 0)
        text += f"; {count} held-out images are too few to judge a network"
    else:
        best = max(network.get("explained_variance", [0]))
        text += (
            f"; its network explains {best:.0%} of the variance between images at best, "
            f"at {report.get('cost_share') or 0:.1%} of level 0's cost"
        )
    click.echo(text)
    for row in (report.get(report["shipped"]) or {}).get("floors", ()):
        click.echo(
            f"  at floor {row['floor']}: {row['right']:.0%} at the right level, "
            f"{row['off_by_one_at_most']:.0%} within one, {row['violations']:.0%} below the floor, "
            f"mean cost {row['mean_cost']:.2f}"
        )


def _show_accuracy_map(points: list[list[float]] | None) -> None:
    if points is None:
        click.echo("accuracy: unknown what a fidelity costs (no map was fitted)")
        return
    needed = ", ".join(f"{lost:g}: {floor_for(points, lost):.3f}" for lost in SHOWN_LOSSES)
    click.echo(f"accuracy: fidelity that keeps the loss to N points: {needed}")


def _classes(names: list[str] | None, count: int | None) -> str:
    """Say which classes a bundle expects, and whether it takes others."""
    if names is None:
        return "open: training sizes the head" if count is None else f"{count}, and no other number"
    shown = f"{len(names)} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
    return f"{shown}; " + (
        "training takes others too" if count is None else "training takes as many others"
    )


def signers(bundle: Bundle) -> str:
    """Say who signed a bundle: by the names of configured keys where these are, else as it says."""
    try:
        found = trust.signatures_of(bundle)
    except PbcError as error:
        return str(error)
    if not found:
        return "nobody"
    told = "; ".join(f"key {s.key[:16]}, serial {s.serial}" for s in found)
    try:
        keys = trust.configured()
        if keys is None:
            return f"{told} (not verified: no keys)"
        signer = trust.verified(bundle, keys)
    except PbcError as error:
        return f"{told} ({error})"
    return f"{signer.key.name} (key {signer.key.identity}, serial {signer.serial})"


def requirements(manifest: dict[str, Any]) -> str:
    """Return what a device must have, in one line: versions, then what no wheel brings."""
    wanted = {**manifest["requires"], **manifest.get("by_hand", {})}
    return "; ".join(f"{name} {text}" for name, text in wanted.items())


def memory_words(memory: Mapping[str, Mapping[str, int]] | None, engine: str) -> str:
    """Say in a line what training holds beside the loaded network, with each optimizer."""
    if memory is None:
        return f"not counted for the engine {engine}"
    alike: dict[str, list[str]] = {}
    for optimizer, sizes in memory.items():
        parts = [
            f"{word} {memory_text(sizes[f'{word}_bytes'])}"
            for word in ("parameters", "features", "saved", "gradients", "state", "workspace")
        ]
        told = f"{memory_text(sizes['peak_bytes'])} at the peak ({', '.join(parts)})"
        alike.setdefault(told, []).append(optimizer)
    return "; ".join(f"{' and '.join(names)} {told}" for told, names in alike.items())


def _elements(shape: list[int | None], classes: int | None) -> int:
    product = 1
    for size in shape:
        product *= size if size is not None else (classes or 1)
    return product


def show_blocks(blocks: list[dict[str, Any]]) -> None:
    """Print the network's blocks in the order in which they run, and what of them trains."""
    if not blocks:
        return
    table = Table("block", "values", "train", box=None, pad_edge=False, header_style="bold")
    table.columns[1].justify = "right"
    for block in blocks:
        values, trained = block["values"], block["trained"]
        train = "all" if trained == values > 0 else f"{trained:,}" if trained else "-"
        table.add_row(block["name"], f"{values:,}", train)
    show(table)


def show_levels(levels: list[dict[str, Any]], cost_model: str) -> None:
    """Print the ladder as a table."""
    table = Table("level", f"cost ({cost_model})", "ms/batch", "MACs", "fidelity",
                  "points lost", "status", "computes in", "at",
                  box=None, pad_edge=False, header_style="bold")  # fmt: skip
    for column in table.columns[:6]:
        column.justify = "right"
    for row in levels:
        fidelity, lost = row["fidelity"], row["accuracy_loss"]
        table.add_row(
            str(row["level"]),
            f"{row['cost']:.3f}",
            "-" if row["latency_ms"] is None else f"{row['latency_ms']:.2f}",
            f"{row['macs'] / 1e6:.1f} M",
            "-" if fidelity is None else f"{fidelity:.3f}",
            "-" if lost is None else f"{lost:.1f}",
            row["status"],
            row["precision"],
            _gives_up(row),
        )
    show(table)


def _gives_up(row: dict[str, Any]) -> str:
    """Return the resolution of a level's images, and how many tokens are merged."""
    parts = [] if row["resolution"] is None else ["{}x{}".format(*row["resolution"])]
    if row.get("merged_tokens"):
        parts.append(f"{row['merged_tokens']} tokens merged")
    return ", ".join(parts)


def _show_dims(table: dict[str, Any]) -> None:
    rows = table["dimensions"]
    free = [row for row in rows if row["independent"]]
    shown = Table("dimension", "size", "kind", "independent", "tensors", "why not",
                  box=None, pad_edge=False, header_style="bold")  # fmt: skip
    for column in (shown.columns[1], shown.columns[4]):
        column.justify = "right"
    for row in rows:
        shown.add_row(
            row["name"], str(row["size"]), row["kind"], "yes" if row["independent"] else "no",
            str(row["tensors"]), row["reason"] or "",
        )  # fmt: skip
    show(shown)
    click.echo(
        f"{len(free)} of {len(rows)} dimensions are trainable-independent; they scale "
        f"{table['prunable_share']:.1%} of {table['macs'] / 1e6:.1f} M multiply-accumulates"
    )
    for operator, node in table["operators_without_rule"].items():
        click.echo(f"note: {operator} (at {node}) has no dimension rule; what it touches is fixed")
