"""A fleet in one process: Flower's strategies, one executable, one table of features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pbc.data import ImageFolder
from pbc.data.held_out import DEFAULT_SHARE, hold_out
from pbc.errors import PbcError
from pbc.fleet.client import Client
from pbc.fleet.grid import LocalGrid
from pbc.fleet.learner import TableLearner, Theta
from pbc.fleet.partition import dirichlet
from pbc.fleet.rounds import FleetOptions, run
from pbc.fleet.state import FleetState
from pbc.runtime.engines import guarded
from pbc.runtime.features.table import features_of
from pbc.runtime.objective import Objective
from pbc.runtime.output.folder import Output
from pbc.runtime.parameters import initial_parameters, labelled_as, labelled_for
from pbc.runtime.runtime import Runtime

_CHUNK = 32


@dataclass(frozen=True)
class SimulationOptions:
    """A fleet's options, and who its clients are.

    alpha: of the Dirichlet distribution that deals each class to clients; a small one is uneven.
    compare: train centrally and locally too, for as many epochs.
    """

    fleet: FleetOptions
    clients: int = 4
    alpha: float = 0.3
    objective: Objective = Objective()  # noqa: RUF009 (it is frozen)
    batch: int | None = None
    threads: int | None = None
    compare: bool = False


@dataclass(frozen=True)
class _Table:
    """Level-0 features of photos, f32[n, …] each, and their labels."""

    features: Mapping[str, np.ndarray]
    labels: np.ndarray


class Simulation:
    """Features and clients, once made."""

    def __init__(
        self,
        bundle: Path | str,
        photos: Path | str,
        options: SimulationOptions,
        *,
        test: Path | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Read photos and compute their features; a fifth is held out if `test` names no others."""
        logging.getLogger("flwr").setLevel(logging.ERROR)
        self._runtime = Runtime.open(bundle)
        self._options, self._tell = options, tell
        samples = labelled_for(self._runtime.bundle, ImageFolder.open(photos, self._runtime.spec))
        if test is None:
            samples, held = hold_out(samples, DEFAULT_SHARE)
        else:
            opened = ImageFolder.open(test, self._runtime.spec, held_out=True)
            held = labelled_as(samples.classes, opened)
        if not len(held):
            raise PbcError("no class has enough photos to hold some out; name others with --test")
        self.classes = tuple(samples.classes)
        tell(f"computing the features of {len(samples)} photos, and of {len(held)} to test on")
        made, threads = self._runtime.bundle, options.threads
        self._executable = guarded.load(self._runtime.engine, made, threads=threads)
        self._train, self._test = (
            _Table(features_of(made, self._executable, part), part.labels)
            for part in (samples, held)
        )
        seed = options.fleet.seed
        self._dealt = dirichlet(self._train.labels, options.clients, options.alpha, seed)

    def run(self, root: Path) -> FleetState:
        """Run the rounds into the folder, beside which the bundle is kept for `pbc fleet adopt`."""
        bundle, options = self._runtime.bundle, self._options
        clients = {
            node: Client(
                bundle,
                self.classes,
                self._learner(rows, node),
                options.fleet.floor,
                np.random.default_rng((options.fleet.seed, node, 1)),
            )
            for node, rows in enumerate(self._dealt, 1)
        }
        output = Output(root)
        with output.locked():
            output.adopt(bundle)
            return run(
                LocalGrid(clients),
                bundle,
                self.classes,
                options.fleet,
                root,
                evaluate=self.evaluate,
                tell=self._tell,
            )

    def evaluate(self, theta: Theta) -> dict[str, Any]:
        """Return the accuracy on the test photos, and as each client's classes weigh them."""
        right = self._right(theta)
        labels = self._test.labels
        by_class = np.array(
            [
                right[labels == label].mean() if (labels == label).any() else np.nan
                for label in range(len(self.classes))
            ]
        )
        clients = [float(np.nanmean(by_class[self._train.labels[rows]])) for rows in self._dealt]
        return {"accuracy": float(right.mean()), "client_accuracy": clients}

    def compared(self) -> dict[str, float]:
        """Return test accuracies of as many epochs on all photos at once, and on each client's."""
        options = self._options
        epochs = options.fleet.rounds * options.fleet.epochs
        count, seed = len(self.classes), options.fleet.seed
        start = initial_parameters(self._runtime.bundle, count, seed)

        def accuracy(rows: np.ndarray, node: int) -> float:
            theta, _ = self._learner(rows, node).train(start, epochs)
            return float(self._right(theta).mean())

        central = accuracy(np.arange(len(self._train.labels)), 0)
        local = [accuracy(rows, node) for node, rows in enumerate(self._dealt, 1)]
        return {"central": central, "local": float(np.mean(local))}

    def _learner(self, rows: np.ndarray, node: int) -> TableLearner:
        options = self._options
        return TableLearner(
            self._executable,
            self._train.features,
            self._train.labels,
            rows,
            options.objective,
            options.batch or self._runtime.bundle.manifest["batch"],
            np.random.default_rng((options.fleet.seed, node)),
        )

    def _right(self, theta: Theta) -> np.ndarray:
        self._executable.start(theta, self._options.objective)
        starts: Sequence[int] = range(0, len(self._test.labels), _CHUNK)
        logits = [
            self._executable.logits(
                0,
                {name: value[i : i + _CHUNK] for name, value in self._test.features.items()},
            )
            for i in starts
        ]
        return np.asarray(np.concatenate(logits).argmax(axis=1) == self._test.labels)
