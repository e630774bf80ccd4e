"""Photos dealt to clients as unevenly as one likes."""

from __future__ import annotations

import numpy as np

from pbc.errors import UsageError


def dirichlet(labels: np.ndarray, clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Deal int64[n] labelled photos to clients, each class by Dirichlet(α) (Hsu et al., 2019).

    Return int64 photos by client, in order, one at least: who got none is given one of whoever has
    most. A small α gives a client few classes.
    """
    if not 1 <= clients <= len(labels):
        raise UsageError(f"{clients} clients for {len(labels)} photos; each needs one")
    if not alpha > 0:
        raise UsageError(f"alpha is {alpha}; it must be above 0")
    random = np.random.default_rng(seed)
    dealt: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels).tolist():
        members = random.permutation(np.flatnonzero(labels == label))
        shares = random.dirichlet(np.full(clients, alpha))
        ends = np.floor(np.cumsum(shares)[:-1] * len(members) + random.uniform()).astype(int)
        for client, part in enumerate(np.split(members, np.clip(ends, 0, len(members)))):
            dealt[client].extend(part.tolist())
    for photos in dealt:
        if not photos:
            photos.append(max(dealt, key=len).pop())
    return [np.sort(np.array(photos, dtype=np.int64)) for photos in dealt]
