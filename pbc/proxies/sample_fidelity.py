"""How faithful levels are to single samples, as the engine computes both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from pbc.bundle.ladder import ALIGNED
from pbc.ir.calibration import Calibration, batches
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.proxies.as_run import up_to_interface
from pbc.proxies.fidelity import cosine, standards

# What measuring single samples may cost: a minute or two on two cores.
MEASURED_MACS = 4e12


def sample_fidelity(
    program: Program,
    levels: Sequence[LevelGraphs],
    calibration: Calibration,
    indices: np.ndarray,
) -> np.ndarray:
    """float32 [samples, levels]: the fidelity of single samples.

    Each is the cosine at the interface tensor where the level is weakest on average, so that the
    mean over held-out samples is the level's fidelity.
    """
    original = up_to_interface(program, program.levels[0], calibration)
    proxies = [up_to_interface(program, level, calibration) for level in levels]
    standard = standards(program, map(original, batches(calibration.held_out)))
    rows = []
    with torch.no_grad():
        for part in batches(indices):
            target = original(part)
            per_level = []
            for proxy in proxies:
                triples = zip(proxy(part), target, standard, strict=True)
                per_level.append(torch.stack([cosine(p, t, s) for p, t, s in triples], dim=-1))
            rows.append(torch.stack(per_level, dim=1))
    values = torch.cat(rows)
    weakest = values.mean(0).argmin(-1)
    return values[:, torch.arange(len(levels)), weakest].numpy()


def measured(program: Program, proxies: Sequence[LevelGraphs], data: Calibration) -> Program:
    """Return the program with these levels aligned, as far as held-out images say."""
    if not proxies:
        return program
    values = sample_fidelity(program, proxies, data, data.held_out).mean(0)
    found = {id(proxy): float(value) for proxy, value in zip(proxies, values, strict=True)}
    levels = tuple(
        replace(level, fidelity=found[id(level)], status=ALIGNED) if id(level) in found else level
        for level in program.levels
    )
    return replace(program, levels=levels)


def affordable(macs: float, indices: np.ndarray, most: int, least: int = 500) -> np.ndarray:
    """Return at most `most` of the indices, evenly spread, as measuring allows; `least` always.

    macs: multiply-accumulates that measuring one of them takes, at all levels.
    """
    most = min(most, max(least, int(MEASURED_MACS / macs)))
    if len(indices) <= most:
        return indices
    spread: np.ndarray = indices[np.linspace(0, len(indices) - 1, most).astype(int)]
    return spread
