"""`pbc fleet`: simulate a fleet, join one, adopt what it learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pbc.cli.objective import objective_options, take_objective
from pbc.cli.options import (
    PATH,
    batch,
    html_report,
    learning_rate,
    protection_options,
    threads,
    write,
)
from pbc.cli.tables import as_json as json_option
from pbc.cli.unsigned import unsigned
from pbc.errors import UsageError
from pbc.fleet.adopt import adopt as write_adopted
from pbc.fleet.html import html
from pbc.fleet.protection import Protection
from pbc.fleet.state import FleetState, metrics
from pbc.runtime.options import TrainOptions
from pbc.util.interrupt import interrupted_by_sigterm

# Flower is imported by the commands that run it alone: adopting needs none.


@click.group()
def fleet() -> None:
    """Train one bundle on many devices with Flower, and average what they learnt."""


@fleet.command()
@click.argument("bundle", type=PATH)
@click.argument("photos", type=PATH)
@click.option("-o", "--output", "out", type=PATH, required=True, help="Folder of the fleet.")
@click.option("--test", type=PATH, help="Photos to test on.  [default: a fifth of PHOTOS]")
@click.option("--clients", type=int, default=4, show_default=True)
@click.option("--rounds", type=int, default=10, show_default=True)
@click.option("--epochs", type=int, default=1, show_default=True, help="Of a client a round.")
@click.option("--alpha", type=float, default=0.3, show_default=True,
              help="Of the Dirichlet distribution of classes; small is uneven.")  # fmt: skip
@click.option("--strategy", default="fedavgm", show_default=True,
              help="fedavgm, fedavg, fedprox or fedadam.")  # fmt: skip
@click.option("--fraction", type=float, default=1.0, show_default=True,
              help="Of the clients that train in a round.")  # fmt: skip
@click.option("--mu", type=float, default=0.01, show_default=True, help="Of fedprox.")
@click.option("--eta", type=float, default=0.01, show_default=True, help="Of fedadam.")
@click.option("--server-momentum", type=float, default=0.5, show_default=True, help="Of fedavgm.")
@protection_options
@click.option("--float16", is_flag=True, help="Send θ and updates in half precision.")
@learning_rate
@batch
@objective_options
@click.option("--compare", is_flag=True, help="Train on all photos at once too, and alone.")
@click.option("--seed", type=int, default=0, show_default=True)
@threads
@click.option("--resume", is_flag=True, help="Go on from the last round in the folder.")
@json_option
@html_report
@unsigned
def simulate(
    bundle: Path,
    photos: Path,
    out: Path,
    test: Path | None,
    clients: int,
    alpha: float,
    top_k: float | None,
    clip: float | None,
    noise: float | None,
    float16: bool,
    batch: int | None,
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
    from pbc.fleet.rounds import FleetOptions, pace
    from pbc.fleet.simulate import Simulation, SimulationOptions

    if FleetState.exists(out) and not resume:
        raise UsageError(f"{out} holds a fleet already: --resume goes on, -o names another folder")
    objective = take_objective(settings)
    options = SimulationOptions(
        FleetOptions(protection=Protection(top_k, clip, noise or 0.0, float16), **settings),
        clients=clients,
        alpha=alpha,
        objective=objective,
        batch=batch,
        threads=threads,
    )

    def tell(line: str) -> None:
        click.echo(line, err=as_json)

    simulation = Simulation(bundle, photos, options, test=test, tell=tell)
    simulation.run(out)
    lines = metrics(out)
    took = pace(lines)
    tell(
        f"a round takes {took['round_seconds']:.2f} s ({took['round_cpu_seconds']:.2f} CPU s): "
        f"{took['rounds_per_minute']:.0f} a minute"
    )
    compared = simulation.compared() if compare else {}
    for name, accuracy in compared.items():
        tell(f"{name} training for as many epochs: {100 * accuracy:.2f} %")
    if as_json:
        click.echo(json.dumps({"rounds": lines, "pace": took, "compared": compared}, indent=1))
    if html_out is not None:
        write(html_out, html(f"pbc fleet: {clients} clients", lines, compared), quiet=as_json)
    tell(f"next: pbc fleet adopt {out} -o mine")


@fleet.command()
@click.argument("bundle", type=PATH)
@click.argument("photos", type=PATH)
@click.option("-o", "--output", "out", type=PATH, required=True,
              help="Folder of this device: what it keeps between rounds.")  # fmt: skip
@click.option("--superlink", metavar="HOST:PORT", required=True, help="The fleet's server.")
@click.option("--root-certificates", type=PATH, metavar="FILE.pem",
              help="Of who vouches for the server.  [default: the system's]")  # fmt: skip
@click.option("--private-key", type=PATH, metavar="FILE.pem",
              help="By which the server knows this device.")  # fmt: skip
@click.option("--insecure", is_flag=True, help="Without TLS: anybody may be the server.")
@click.option("--secure", is_flag=True,
              help="Send what only the sum over devices can be read of (SecAgg+).")  # fmt: skip
@click.option("--fidelity-floor", type=float, help="The fleet's.  [default: the bundle's own]")
@learning_rate
@batch
@objective_options
@click.option("--cache-mb", type=int, default=TrainOptions.cache_mb, show_default=True)
@threads
@unsigned
def join(
    bundle: Path,
    photos: Path,
    out: Path,
    superlink: str,
    root_certificates: Path | None,
    private_key: Path | None,
    insecure: bool,
    secure: bool,
    **settings: Any,
) -> None:
    """Train BUNDLE on this device's PHOTOS whenever the fleet's server asks, until interrupted.

    Flower's SuperNode carries the messages. The code that a server sends is not run: this process
    answers, and keeps its trainer. What it keeps between rounds is in the folder.
    """
    from pbc.fleet.node import Link, resident

    link = Link(superlink, root_certificates, private_key, insecure)
    options = TrainOptions(epochs=1, cache="disk", **settings)
    with interrupted_by_sigterm():
        try:
            resident(link, bundle, photos, out, options, click.echo, secure=secure)
        except KeyboardInterrupt:
            click.echo("left the fleet; the same command joins it again", err=True)


@fleet.command()
@click.argument("root", metavar="FLEET", type=PATH)
@click.option("-o", "--output", "out", type=PATH, required=True, help="Folder of the result.")
@click.option("--bundle", type=PATH, help="The fleet's bundle, if FLEET has none.")
@click.option("--overwrite", is_flag=True, help="Replace what the folder holds.")
@unsigned
def adopt(root: Path, out: Path, bundle: Path | None, overwrite: bool) -> None:
    """Write what the fleet in FLEET learnt as a personal model."""
    rounds = write_adopted(root, out, bundle=bundle, overwrite=overwrite)
    click.echo(f"wrote {out}, of {rounds} rounds; next: pbc predict {out} PHOTO")
