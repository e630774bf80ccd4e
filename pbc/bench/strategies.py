"""Runtimes of the strategies by which rivals train, where these are not the bundle's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path

from pbc.bench.cells import Work
from pbc.bench.rival import strategy_of
from pbc.errors import PbcError
from pbc.runtime.runtime import Runtime
from pbc.util.extras import missing

Tell = Callable[[str], None]


def runtimes(
    rivals: Iterable[str], runtime: Runtime, work: Work, weights: Path | None, tell: Tell
) -> tuple[dict[str, Runtime], dict[str, str]]:
    """Return the runtime of each rival that has its own, and why some have none.

    What no earlier call has left in the work folder is compiled from the bundle's provenance.
    """
    known: dict[str, Runtime] = {runtime.bundle.manifest["strategy"]: runtime}
    found: dict[str, Runtime] = {}
    left_out: dict[str, str] = {}
    for name in rivals:
        strategy = strategy_of(name)
        if strategy is None:
            continue
        try:
            if strategy not in known:
                # The compiler: devices that train have none.
                compiled = importlib.import_module("pbc.bench.compiled")
                known[strategy] = compiled.runtime(runtime.bundle, strategy, weights, work, tell)
            found[name] = known[strategy]
        except ModuleNotFoundError as error:
            if (needs := missing(error)) is None:
                raise
            left_out[name] = f"{strategy} is compiled for it, which needs {needs}"
        except PbcError as error:
            left_out[name] = str(error)
        if name in left_out:
            tell(f"{name} is left out: {left_out[name]}")
    return found, left_out
