"""Two rounds of a device of a fleet, without Flower: the same script on the board and here.

    python rounds.py BUNDLE PHOTOS FOLDER OUT.npz

The second round goes on with what the first left in the folder, as after a restart.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from pbc.fleet.client import open_client
from pbc.fleet.protection import Protection
from pbc.fleet.terms import Terms
from pbc.runtime.options import TrainOptions
from pbc.runtime.parameters import initial_parameters
from pbc.runtime.runtime import Runtime

ROUNDS = 2


def results(bundle: Path, photos: Path, folder: Path) -> dict[str, np.ndarray]:
    """Return what the device sends, by round; level 0 alone runs, so that nothing is measured."""
    found = Runtime.open(bundle).bundle
    classes = tuple(found.manifest["classes"])
    terms = Terms(found.digest, classes, mu=0.1, protection=Protection(clip=1.0))
    options = TrainOptions(
        epochs=1, learning_rate=0.05, cache="disk", routing=False, skip=False, threads=1
    )
    theta = initial_parameters(found, len(classes), 0)
    sent: dict[str, np.ndarray] = {}
    for number in range(ROUNDS):
        arrays, figures = open_client(bundle, photos, folder, terms, options).answer(theta, terms)
        sent[f"update {number}"] = arrays["update"]
        sent[f"loss {number}"] = np.array(figures["loss"])
    return sent


def main() -> None:
    """Write the results."""
    bundle, photos, folder, out = map(Path, sys.argv[1:])
    np.savez(out, **results(bundle, photos, folder))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
