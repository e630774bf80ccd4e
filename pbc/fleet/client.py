"""A device's side of a round, whatever carries its messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np

from pbc.bundle import Bundle
from pbc.data import ImageFolder
from pbc.errors import PbcError
from pbc.fleet.learner import Learner, TrainerLearner
from pbc.fleet.proximal import Proximal
from pbc.fleet.terms import Terms
from pbc.fleet.vector import flatten
from pbc.fleet.wire import encode
from pbc.runtime.engines import guarded
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.folder import Output
from pbc.runtime.parameters import checked_theta, numbered_classes
from pbc.runtime.runtime import Runtime
from pbc.util.atomic import replace_bytes


@dataclass
class Client:
    """One device of a fleet; what its updates keep back stays here, or in the file `kept`.

    classes: names by label. floor: the fidelity floor that its levels were chosen by.
    """

    bundle: Bundle
    classes: Sequence[str]
    learner: Learner
    floor: float | None = None
    random: np.random.Generator = field(default_factory=np.random.default_rng)
    kept: Path | None = None
    _residual: np.ndarray | None = None

    def answer(
        self, theta: Mapping[str, np.ndarray], terms: Terms
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Train a round; return the arrays to send, and figures.

        Raises PbcError for terms or parameters that are not this device's.
        """
        begun = perf_counter()
        terms.check(self.bundle, self.classes, self.floor)
        given = checked_theta(self.bundle, theta, len(self.classes))
        trained, loss = self.learner.train(given, terms.epochs, mu=terms.mu, fresh=terms.fresh)
        update = flatten(trained, given) - flatten(given, given)
        sent, left = terms.protection(update, self._left(update), self.random)
        self._keep(left)
        figures = {
            "num-examples": self.learner.examples,
            "loss": loss,
            "seconds": perf_counter() - begun,
        }
        return encode(sent, terms.protection), figures

    def _left(self, update: np.ndarray) -> np.ndarray:
        if self._residual is None and self.kept is not None and self.kept.exists():
            self._residual = np.frombuffer(self.kept.read_bytes(), np.float32)
        if self._residual is None or self._residual.shape != update.shape:
            return np.zeros_like(update)
        return self._residual

    def _keep(self, left: np.ndarray) -> None:
        self._residual = left
        if self.kept is not None:
            replace_bytes(self.kept, left.tobytes())


def open_client(
    bundle: Path | str, photos: Path | str, out: Path | str, terms: Terms, options: TrainOptions
) -> Client:
    """Open a device's bundle and photos, in a folder that may hold an earlier round's state.

    Features are kept on disk there, momentum in the checkpoint. Raises PbcError before anything is
    prepared where the terms are not this device's.
    """
    runtime = Runtime.open(bundle)
    classes = numbered_classes(runtime.bundle, terms.classes)
    terms.check(runtime.bundle, classes, options.fidelity_floor)
    output = Output(Path(out))
    output.fleet.mkdir(parents=True, exist_ok=True, mode=0o700)
    known = _Known(output.fleet / "photos.sha256", runtime.spec.hash())
    samples = ImageFolder.open(photos, runtime.spec, known=known.read())
    executable = Proximal(guarded.load(runtime.engine, runtime.bundle, threads=options.threads))
    trainer = runtime.trainer(samples, options, output.root, classes=classes, executable=executable)
    try:
        trainer.prepare(resume=output.checkpoint.exists())
    except PbcError as error:
        raise PbcError(f"{error} (this device's state is in {output.root})") from error
    if not output.bundle.exists():  # comparing it would read all of it each time
        output.adopt(runtime.bundle)
    known.write(samples.hashes if trainer.all_cached else ())
    kept = output.fleet / "unsent.f32"
    learner = TrainerLearner(trainer, executable, len(samples))
    return Client(runtime.bundle, classes, learner, options.fidelity_floor, kept=kept)


@dataclass(frozen=True)
class _Known:
    """Photos whose features are all cached, by content: none has to be decoded at the next start.

    spec: the hash of what they were decoded to.
    """

    path: Path
    spec: str

    def read(self) -> frozenset[bytes]:
        if not self.path.exists():
            return frozenset()
        spec, _, hashes = self.path.read_bytes().partition(b"\n")
        if spec != self.spec.encode():
            return frozenset()
        return frozenset(hashes[i : i + 32] for i in range(0, len(hashes), 32))

    def write(self, hashes: Sequence[bytes]) -> None:
        replace_bytes(self.path, self.spec.encode() + b"\n" + b"".join(hashes))
