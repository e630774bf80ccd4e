"""What a level is for: which ones runs would use, by what each costs and loses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pbc.runtime.routing.mixes import largest_share
from pbc.runtime.routing.outlook import BOUNDS
from pbc.runtime.routing.routes import LEAST_SHARE

USED, EVEN = LADDERS = ("used", "even")
"""How a ladder is chosen: by what runs would use, or in even steps of cost."""

Losses = Sequence[tuple[float, float]]
"""(share of the samples at a level, points of accuracy lost), by ascending share."""

# A run that is shorter by less is not worth a level.
LEAST_SAVED = 0.03


def used(costs: Sequence[float], losses: Iterable[Sequence[Losses]]) -> set[int]:
    """Return the proxies, by position, that make a run shortest within one of BOUNDS.

    costs: relative to level 0, of each proxy. losses: for each kind of head, of each proxy. A run
    mixes one proxy with level 0, as the device's scheduler does: as many samples at the proxy as
    the bound allows.
    """
    found = set()
    for of_head in losses:
        for bound in BOUNDS:
            shares = [largest_share(lost, bound)[0] for lost in of_head]
            saved = [
                share * (1 - cost) if share >= LEAST_SHARE else 0.0
                for share, cost in zip(shares, costs, strict=True)
            ]
            best = max(range(len(saved)), key=saved.__getitem__, default=None)
            if best is not None and saved[best] >= LEAST_SAVED:
                found.add(best)
    return found
