"""Notes on a bench: whatever the figures alone would hide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pbc.bench import sweep
from pbc.bench.options import BenchOptions
from pbc.bench.standings import REFERENCE, Standing
from pbc.bundle.ladder import BFLOAT16, Ladder
from pbc.runtime.runtime import Runtime


def bench_notes(runtime: Runtime, ranked: Sequence[Standing], options: BenchOptions) -> list[str]:
    """Return a line for whatever a reader must know to read the figures right."""
    notes = []
    manifest = runtime.bundle.manifest
    if options.quick:
        notes.append(
            "--quick: one seed, few epochs and photos; it shows that everything runs, "
            "not what is worth what"
        )
    notes += [
        f"{standing.rival} ran {standing.epochs} of {standing.planned} epochs: its time is "
        "extrapolated from them, its accuracy is that after them"
        for standing in ranked
        if standing.extrapolated
    ]
    if all(standing.to_reference is None for standing in ranked) and any(
        standing.rival == REFERENCE for standing in ranked
    ):
        notes.append(
            f"{REFERENCE} did not run all epochs, nor did pet-cache: no time to its final accuracy"
        )
    if sweep.ships_means(runtime.bundle):
        notes.append(
            "the bundle's policy does not beat each level's mean fidelity on held-out images: "
            "the means are shipped, and every photo gets the same level"
        )
    by_name = {standing.rival: standing for standing in ranked}
    routed = by_name.get("pbc-nocache")
    if routed is not None and len(manifest["levels"]) > 1:
        visits = np.sum(np.array(routed.levels), axis=0)
        if visits[1:].sum() == 0:
            notes.append(
                "nothing was routed to a proxy: no level is faithful enough for the bound, "
                "so that pbc without a cache runs level 0"
            )
        if REFERENCE in routed.faster and routed.faster[REFERENCE].mean <= 1:
            notes.append(
                "the ladder does not pay here: routed training without a cache is "
                f"{routed.faster[REFERENCE].mean:.2f}x as fast as PET at level 0"
            )
    ladder = Ladder.from_json(manifest["levels"], manifest.get("cost_model", "macs"))
    notes += precision_notes(ladder, ranked)
    told: dict[str, list[str]] = {}
    for standing in ranked:
        for text in standing.facts.get("notes", []):
            told.setdefault(text, []).append(standing.rival)
    return notes + [f"{', '.join(names)}: {text}" for text, names in told.items()]


def precision_notes(ladder: Ladder, ranked: Sequence[Standing]) -> list[str]:
    """Return a line for rivals that computed in bfloat16: part of that gain is precision's."""
    used: dict[tuple[int, ...], list[str]] = {}
    for standing in ranked:
        visits = np.sum(np.array(standing.levels), axis=0)
        levels = tuple(
            level
            for level in np.flatnonzero(visits).tolist()
            if len(visits) > 1 and ladder.precision(level) == BFLOAT16
        )
        if levels:
            used.setdefault(levels, []).append(standing.rival)
    return [
        f"{', '.join(names)}: level{'s' if len(levels) > 1 else ''} "
        f"{', '.join(map(str, levels))} computed in bfloat16; "
        "pet-bf16 is what that precision alone gives"
        for levels, names in used.items()
    ]


def left_out(reasons: Mapping[str, str]) -> list[str]:
    """Return a line for each rival that could not run, with the reason."""
    return [f"{name} is left out: {reason}" for name, reason in reasons.items()]
