"""`pbc fleet`: simulate a fleet, adopt what it learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pbc.cli.objective import objective_options
from pbc.errors import UsageError
from pbc.fleet.adopt import adopt as write_adopted
from pbc.fleet.html import html
from pbc.fleet.protection import Protection
from pbc.fleet.state import FleetState, metrics
from pbc.runtime.objective import Objective, default_rate
from pbc.util.atomic import replace_bytes

_PATH = click.Path(path_type=Path)
_MODE = 0o644  # a report is made to be shown; it holds no photo


@click.group()
def fleet() -> None:
    """Train one bundle on many devices with Flower, and average what they learnt."""


@fleet.command()
@click.argument("bundle", type=_PATH)
@click.argument("photos", type=_PATH)
@click.option("-o", "--output", "out", type=_PATH, required=True, help="Folder of the fleet.")
@click.option("--test", type=_PATH, help="Photos to test on.  [default: a fifth of PHOTOS]")
@click.option("--clients", type=int, default=4, show_default=True)
@click.option("--rounds", type=int, default=10, show_default=True)
@click.option("--epochs", type=int, default=1, show_default=True, help="Of a client a round.")
@click.option("--alpha", type=float, default=0.3, show_default=True,
              help="Of the Dirichlet distribution of classes; small is uneven.")  # fmt: skip
@click.option("--strategy", default="fedavg", show_default=True, help="fedavg, fedprox or fedadam.")
@click.option("--fraction", type=float, default=1.0, show_default=True,
              help="Of the clients that train in a round.")  # fmt: skip
@click.option("--mu", type=float, default=0.01, show_default=True, help="Of fedprox.")
@click.option("--eta", type=float, default=0.01, show_default=True, help="Of fedadam.")
@click.option("--top-k", "top_k_percent", type=float, metavar="PERCENT",
              help="Send the largest values alone, keep the others.")  # fmt: skip
@click.option("--clip", type=float, help="Bound the norm of an update.")
@click.option("--noise", type=float, default=0.0, help="Normal noise, by the clip.")
@click.option("--float16", is_flag=True, help="Send θ and updates in half precision.")
@click.option("--lr", type=float, help="Learning rate.  [default: sgd 0.01, adam and adamw 0.001]")
@click.option("--batch", type=int, help="Samples per mini-batch.  [default: the bundle's]")
@objective_options
@click.option("--compare", is_flag=True, help="Train on all photos at once too, and alone.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=int, help="Threads of the engine.  [default: the engine's choice]")
@click.option("--resume", is_flag=True, help="Go on from the last round in the folder.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
@click.option("--html", "html_out", type=_PATH, help="Write a report to open in a browser.")
def simulate(
    bundle: Path,
    photos: Path,
    out: Path,
    test: Path | None,
    clients: int,
    alpha: float,
    top_k_percent: float | None,
    clip: float | None,
    noise: float,
    float16: bool,
    lr: float | None,
    batch: int | None,
    optimizer: str,
    momentum: float,
    weight_decay: float,
    label_smoothing: float,
    compare: bool,
    threads: int | None,
    resume: bool,
    as_json: bool,
    html_out: Path | None,
    **settings: Any,
) -> None:
    """Simulate clients that train BUNDLE on parts of PHOTOS, in this process.

    Killed at any moment, the same command with --resume goes on from the last round.
    """
    # Only this command runs Flower: adopting needs none.
    from pbc.fleet.rounds import FleetOptions
    from pbc.fleet.simulate import Simulation, SimulationOptions

    if html_out is not None and not html_out.resolve().parent.is_dir():
        raise UsageError(f"the folder of {html_out} does not exist")
    if FleetState.exists(out) and not resume:
        raise UsageError(f"{out} holds a fleet already: --resume goes on, -o names another folder")
    share = None if top_k_percent is None else top_k_percent / 100
    rate = default_rate(optimizer) if lr is None else lr
    options = SimulationOptions(
        FleetOptions(protection=Protection(share, clip, noise, float16), **settings),
        clients=clients,
        alpha=alpha,
        objective=Objective(optimizer, rate, momentum, weight_decay, label_smoothing),
        batch=batch,
        threads=threads,
    )

    def tell(line: str) -> None:
        click.echo(line, err=as_json)

    simulation = Simulation(bundle, photos, options, test=test, tell=tell)
    simulation.run(out)
    compared = simulation.compared() if compare else {}
    for name, accuracy in compared.items():
        tell(f"{name} training for as many epochs: {100 * accuracy:.2f} %")
    lines = metrics(out)
    if as_json:
        click.echo(json.dumps({"rounds": lines, "compared": compared}, indent=1))
    if html_out is not None:
        page = html(f"pbc fleet: {clients} clients", lines, compared)
        replace_bytes(html_out, page.encode(), mode=_MODE)
        tell(f"wrote {html_out}")
    tell(f"next: pbc fleet adopt {out} -o mine")


@fleet.command()
@click.argument("root", metavar="FLEET", type=_PATH)
@click.option("-o", "--output", "out", type=_PATH, required=True, help="Folder of the result.")
@click.option("--bundle", type=_PATH, help="The fleet's bundle, if FLEET has none.")
@click.option("--overwrite", is_flag=True, help="Replace what the folder holds.")
def adopt(root: Path, out: Path, bundle: Path | None, overwrite: bool) -> None:
    """Write what the fleet in FLEET learnt as a personal model."""
    rounds = write_adopted(root, out, bundle=bundle, overwrite=overwrite)
    click.echo(f"wrote {out}, of {rounds} rounds; next: pbc predict {out} PHOTO")
