"""Compile the network of a bundle for another strategy, on the same engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pbc import compiler
from pbc.bench.cells import Work
from pbc.bundle import Bundle
from pbc.frontend import original
from pbc.frontend.strategy import parse
from pbc.runtime.runtime import Runtime


def runtime(
    bundle: Bundle, strategy: str, weights: Path | None, work: Work, tell: Callable[[str], None]
) -> Runtime:
    """Return a runtime of the same network, trained by another strategy, without proxies.

    weights: those of the bundle, where its provenance alone does not find them. Raises PbcError
    where the network cannot be rebuilt, or not be trained that way.
    """
    parse(strategy)  # refused before it names a file
    path = work.bundle(strategy)
    if path.exists():
        return Runtime.of(Bundle.open(path))
    manifest = bundle.manifest
    model, named = original.found(bundle, weights)
    spec = manifest["input"]
    options = compiler.CompileOptions(
        weights=named,
        strategy=strategy,
        blocks=manifest.get("blocks_pattern"),
        classes=manifest["class_count"],
        levels=0,
        engine=manifest["engine"],
        shape=tuple(spec["shape"]),
        resize=spec["resize"],
        batch=manifest["batch"],
        seed=manifest["provenance"]["seed"],
    )
    tell(f"compiling {manifest['model']} for {strategy}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return Runtime.of(compiler.compile(model, path, options))
