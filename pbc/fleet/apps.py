"""The two Flower apps of a fleet; one's own is `app = client_app()` or `app = server_app()`.

What a node is given: `bundle`, `photos` and `out` in its configuration; `floor`, `lr`, `batch`
and `threads` if they are not the usual ones, `secure` if it answers in masked sums alone. A
server, in the run's: `bundle`, `out`, `classes` where the bundle has none, and the names of
FleetOptions and Protection; "" and 0 leave out what a fleet goes without.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from pbc.errors import PbcError
from pbc.fleet.client import open_client
from pbc.fleet.messages import Reply, answering_as
from pbc.fleet.protection import Protection
from pbc.fleet.rounds import FleetOptions, run
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.folder import Output
from pbc.runtime.parameters import numbered_classes
from pbc.runtime.runtime import Runtime

FLEET = tuple(name for name in FleetOptions.__dataclass_fields__ if name != "protection")
PROTECTION = tuple(Protection.__dataclass_fields__)
"""What a run's configuration may say beside `bundle`, `out` and `classes`."""

_OUTLIVED_SECONDS = 60.0
"""In which a run that outlived its SuperLink finds out, and leaves the folder."""


def client_app() -> ClientApp:
    """Return the app of a node; where its process stays, so does its trainer."""
    app, replies = ClientApp(), dict[tuple[str, ...], Reply]()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        given = context.node_config
        bundle, photos, out = places = tuple(
            str(_required(given, name, "node")) for name in ("bundle", "photos", "out")
        )
        if places not in replies:
            options = TrainOptions(
                epochs=1,
                cache="disk",
                fidelity_floor=given.get("floor"),
                learning_rate=given.get("lr"),
                batch=given.get("batch"),
                threads=given.get("threads"),
            )
            replies[places] = answering_as(bool(given.get("secure")))(
                lambda terms: open_client(bundle, photos, out, terms, options)
            )
        return replies[places](message, context)

    return app


def server_app() -> ServerApp:
    """Return the app of a server, which goes on where its folder ends."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        given = {name: value for name, value in context.run_config.items() if value != ""}
        root = Path(str(_required(given, "out", "run")))
        bundle = Runtime.open(str(_required(given, "bundle", "run"))).bundle
        names = bundle.manifest.get("classes") or str(_required(given, "classes", "run")).split(",")
        options = FleetOptions(
            protection=Protection(**{n: given[n] for n in PROTECTION if given.get(n)}),
            **{n: given[n] for n in FLEET if n in given},
        )
        with Output(root).locked(wait_seconds=_OUTLIVED_SECONDS):
            run(grid, bundle, numbered_classes(bundle, names), options, root, tell=_say)

    return app


def _required(config: Mapping[str, Any], name: str, whose: str) -> Any:
    if name not in config:
        raise PbcError(f"the {whose}'s configuration has no {name!r}")
    return config[name]


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 (Flower's log of a run is what its app prints)
