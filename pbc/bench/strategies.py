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
    """Return a runtime by strategy, and why some rivals have none.

    What no earlier call has left in the work folder is compiled from the bundle's provenance.
    """
    found: dict[str, Runtime] = {runtime.bundle.manifest["strategy"]: runtime}
    left_out: dict[str, str] = {}
    for name in rivals:
        strategy = strategy_of(name)
        if strategy is None or strategy in found:
            continue
        try:
            # The compiler: devices that train have none.
            compiled = importlib.import_module("pbc.bench.compiled")
            found[strategy] = compiled.runtime(runtime.bundle, strategy, weights, work, tell)
        except ModuleNotFoundError as error:
            if (needs := missing(error)) is None:
                raise
            left_out[name] = f"{strategy} is compiled for it, which needs {needs}"
        except PbcError as error:
            left_out[name] = str(error)
        if name in left_out:
            tell(f"{name} is left out: {left_out[name]}")
    return found, left_out
