"""What shared updates of a bundle give away on these photos, by attack and by defence.

Half of the photos are dealt to clients, the other half nobody trains on: they test the accuracy,
and an attacker must not take them for members. What is attacked is what leaves a client: the
gradient of one mini-batch, the update of local epochs, or the mean of all clients' updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pbc.audit import attack
from pbc.audit.network import Network
from pbc.audit.options import AuditOptions
from pbc.data import ImageFolder, Samples
from pbc.errors import PbcError
from pbc.fleet.protection import Protection
from pbc.fleet.vector import places
from pbc.runtime.engines import guarded
from pbc.runtime.features.table import features_of
from pbc.runtime.parameters import initial_parameters, labelled_for
from pbc.runtime.runtime import Runtime

# What an attacker looks at of a larger θ: its head, and the values that changed most.
_MOST_COLUMNS = 1 << 15
# Repetitions of a gradient of few photos, so that a row is a mean over about as many photos.
_DRAWS = {1: 16, 8: 4}
# Photos whose mean features tell what is usual.
_USUAL = 64
# Below this difference an AUC of some hundred photos is not another one.
_SAME = 0.03


@dataclass(frozen=True)
class Row:
    """What attacks on one thing that is shared find, under one defence.

    shared: what it is. photos: behind it. labels: the share of labels named without photos.
    features: cosine of the features read from the head's gradient, of its one photo. identified:
    the share of members among as many best candidates, where chance gives `chance`. auc,
    auc_within: membership over all candidates, and over those of one class. accuracy: after rounds
    of averaging under this defence; None where not averaged.
    """

    shared: str
    photos: int
    defence: str
    labels: float | None
    features: float | None
    identified: float
    chance: float
    auc: float
    auc_within: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Audit:
    """All rows, and what was audited."""

    about: dict[str, Any]
    rows: tuple[Row, ...]
    findings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "about": self.about,
            "rows": [asdict(row) for row in self.rows],
            "findings": list(self.findings),
        }


@dataclass(frozen=True)
class _Shared:
    """One thing that leaves a client, in the direction of gradients, and who is in it.

    scale: from `vector` to a mean gradient. candidates, members: int64 photos.
    """

    row: int
    vector: np.ndarray
    scale: float
    members: np.ndarray
    candidates: np.ndarray


def audit(
    bundle: Path | str,
    photos: Path | str,
    options: AuditOptions,
    tell: Callable[[str], None] = lambda line: None,
) -> Audit:
    """Attack what clients of a fleet would share of training `bundle` on `photos`."""
    runtime = Runtime.open(bundle)
    samples = labelled_for(runtime.bundle, ImageFolder.open(photos, runtime.spec))
    chosen = chosen_photos(samples, options)
    tell(f"computing the features of {len(chosen)} photos")
    executable = guarded.load(runtime.engine, runtime.bundle, threads=options.threads)
    part = samples.subset(chosen)
    manifest = runtime.bundle.manifest
    network = Network(
        executable,
        features_of(runtime.bundle, executable, part),
        part.labels,
        len(samples.classes),
        initial_parameters(runtime.bundle, len(samples.classes), options.seed),
        manifest["batch"],
        options,
    )
    return _Audit(network, head_names(manifest), options, tell).run(
        {
            "model": manifest["model"],
            "strategy": manifest["strategy"],
            "bundle": runtime.bundle.digest,
            "photos": len(chosen),
            "classes": len(samples.classes),
            "trained_values": sum(value.size for value in network.start.values()),
            "clients": options.clients,
            "epochs": options.epochs,
            "rounds": options.rounds,
            "batch": network.batch,
            "optimizer": options.objective.optimizer,
            "learning_rate": options.objective.learning_rate,
            "seed": options.seed,
            **({} if options.dp is None else {"epsilon": options.dp, "delta": 1 / len(chosen)}),
        }
    )


class _Audit:
    """The parts of one audit, in the order of `run`."""

    def __init__(
        self,
        network: Network,
        head: tuple[str, str | None],
        options: AuditOptions,
        tell: Callable[[str], None],
    ) -> None:
        self._network = network
        self._weight, self._bias = head
        self._options = options
        self._tell = tell
        self._random = np.random.default_rng(options.seed)
        self._inside, self._outside = self._halves()
        count = min(options.clients, len(self._inside))
        self._shards = [self._inside[client::count] for client in range(count)]

    def run(self, about: dict[str, Any]) -> Audit:
        """Share, attack, and measure what each defence costs."""
        defences = self._options.defences(about["photos"])
        shared, rows = self._shared(defences)
        columns = self._columns(shared)
        self._tell(f"computing gradients of {len(self._network.labels)} candidates")
        everybody = np.arange(len(self._network.labels))
        candidates = attack.Candidates(self._network.gradients(everybody, columns))
        accuracies = {}
        for defence in defences:
            self._tell(f"averaging {self._options.rounds} rounds, defence: {defence}")
            theta = self._network.averaged(self._shards, defence, self._random)
            accuracies[str(defence)] = self._network.accuracy(theta, self._outside)
        self._probabilities = self._network.probabilities(self._network.start, everybody).mean(0)
        found = [
            self._row(
                name,
                defence,
                [each for each in shared if each.row == number],
                candidates,
                columns,
                accuracies[str(defence)] if averaged else None,
            )
            for number, (name, defence, averaged) in enumerate(rows)
        ]
        return Audit(about, tuple(found), tuple(findings(found)))

    # ---- what is shared ------------------------------------------------------------------

    def _halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Return int64 photos: every second of each class trains."""
        inside, outside = [], []
        for label in range(self._network.classes):
            photos = self._random.permutation(np.flatnonzero(self._network.labels == label))
            inside.append(photos[: (len(photos) + 1) // 2])
            outside.append(photos[(len(photos) + 1) // 2 :])
        return self._random.permutation(np.concatenate(inside)), np.concatenate(outside)

    def _shared(
        self, defences: Sequence[Protection]
    ) -> tuple[list[_Shared], list[tuple[str, Protection, bool]]]:
        """Return all that is attacked, and the table's rows: name, defence, whether averaged."""
        shared: list[_Shared] = []
        rows: list[tuple[str, Protection, bool]] = []
        everybody = np.arange(len(self._network.labels))
        for size in dict.fromkeys(min(size, len(self._inside)) for size in self._options.batches):
            draws = [
                self._random.choice(self._inside, size, replace=False)
                for _ in range(_DRAWS.get(size, 1))
            ]
            for defence in defences:
                for members in draws:
                    self._network.begin()
                    vector = self._sent(-self._network.gradient(members), defence)
                    shared.append(_Shared(len(rows), -vector, 1.0, members, everybody))
                rows.append((f"a gradient of {_photos(size)}", defence, False))
        epochs = self._options.epochs
        self._tell(f"training {len(self._shards)} clients for {epochs} epoch{'s'[: epochs != 1]}")
        updates = [
            self._network.trained(self._network.start, shard, self._random)
            for shard in self._shards
        ]
        own, others = self._shards[0], self._like(self._shards[0])
        for defence in defences:
            vector = self._sent(updates[0], defence)
            candidates = np.concatenate([own, others])
            shared.append(
                _Shared(len(rows), -vector, self._per_gradient(len(own)), own, candidates)
            )
            rows.append((f"an update of {_photos(len(own))}", defence, True))
        if len(self._shards) > 1:
            for defence in defences:
                mean = np.mean([self._sent(update, defence) for update in updates], axis=0)
                scale = self._per_gradient(len(own))
                shared.append(_Shared(len(rows), -mean, scale, self._inside, everybody))
                rows.append((f"the mean of {len(self._shards)} clients", defence, True))
        return shared, rows

    def _sent(self, update: np.ndarray, defence: Protection) -> np.ndarray:
        return defence(update, np.zeros_like(update), self._random)[0]

    def _like(self, photos: np.ndarray) -> np.ndarray:
        """Return as many photos of each class that nobody trains on, where there are."""
        labels = self._network.labels
        counts = np.bincount(labels[photos], minlength=self._network.classes)
        return np.concatenate(
            [
                self._outside[labels[self._outside] == label][:count]
                for label, count in enumerate(counts.tolist())
            ]
        )

    def _per_gradient(self, photos: int) -> float:
        """Return what turns an update into a mean gradient: the attacker knows the options."""
        steps = -(-photos // self._network.batch) * self._options.epochs
        return 1 / (self._network.rate * steps)

    # ---- attacks -------------------------------------------------------------------------

    def _columns(self, shared: Sequence[_Shared]) -> np.ndarray:
        """Return which values of θ the attacker looks at, int64 in order."""
        size = len(shared[0].vector)
        if size <= _MOST_COLUMNS:
            return np.arange(size)
        each = max(_MOST_COLUMNS // len(shared), 1024)
        parts = [np.argpartition(-np.abs(one.vector), each)[:each] for one in shared]
        return np.unique(np.concatenate(parts))

    def _row(
        self,
        name: str,
        defence: Protection,
        shared: Sequence[_Shared],
        candidates: attack.Candidates,
        columns: np.ndarray,
        accuracy: float | None,
    ) -> Row:
        labels = self._network.labels
        found: dict[str, list[float | None]] = {
            key: [] for key in ("labels", "features", "identified", "auc", "auc_within")
        }
        for one in shared:
            vector = one.vector[columns]
            seen = None if defence.top_k is None else vector != 0
            scores = candidates.weights(one.candidates, vector, seen)
            member = np.isin(one.candidates, one.members)
            found["identified"].append(attack.identified(scores, member))
            found["auc"].append(attack.auc(scores, member))
            found["auc_within"].append(attack.auc_within(scores, member, labels[one.candidates]))
            found["labels"].append(self._labels(one))
            found["features"].append(self._features(one))
        means = {key: _mean(values) for key, values in found.items()}
        assert means["identified"] is not None
        assert means["auc"] is not None
        return Row(
            shared=name,
            photos=len(shared[0].members),
            defence=str(defence),
            labels=means["labels"],
            features=means["features"],
            identified=means["identified"],
            chance=len(shared[0].members) / len(shared[0].candidates),
            auc=means["auc"],
            auc_within=means["auc_within"],
            accuracy=accuracy,
        )

    def _labels(self, one: _Shared) -> float | None:
        """Return the share of labels that the head's bias gives away; None without a bias."""
        if self._bias is None:
            return None
        bias = -self._part(one.vector, self._bias).astype(np.float64) * one.scale
        return attack.labels_recovered(bias, self._probabilities, self._network.labels[one.members])

    def _features(self, one: _Shared) -> float | None:
        """Return how like a photo's features are what the head's gradient shows of them.

        A row of the weight's gradient by the bias's is the head's input, for one photo. The truth
        is read the same way from the photo's own gradient.
        """
        if self._bias is None or len(one.members) != 1:
            return None
        photos, inputs = self._inputs
        own, other = inputs[photos == one.members], inputs[photos != one.members]
        return attack.cosine(self._input(one.vector), own[0], other[:_USUAL].mean(0))

    @cached_property
    def _inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return int64[n], photos, and f64[n, d], what each one's own gradient shows."""
        self._network.begin()
        photos = np.sort(self._inside)
        gradients = (self._network.gradient(photos[i : i + 1]) for i in range(len(photos)))
        return photos, np.stack([self._input(gradient) for gradient in gradients])

    def _input(self, vector: np.ndarray) -> np.ndarray:
        """Return the head's input by the row whose bias has the largest gradient."""
        assert self._bias is not None
        bias = self._part(vector, self._bias).astype(np.float64)
        weight = self._part(vector, self._weight).reshape(len(bias), -1)
        row = int(np.abs(bias).argmax())
        if bias[row] == 0:  # not sent
            row = int(np.abs(weight).max(1).argmax())
            return np.asarray(weight[row], np.float64)
        return np.asarray(weight[row] / bias[row])

    def _part(self, vector: np.ndarray, name: str) -> np.ndarray:
        return np.asarray(vector[places(self._network.start)[name]])


def findings(rows: Sequence[Row]) -> list[str]:
    """Say of each defence where it lowers what membership shows, and where it does not."""
    plain = {row.shared: row for row in rows if row.defence == "none"}
    lines = []
    for defence in dict.fromkeys(row.defence for row in rows if row.defence != "none"):
        helps: list[str] = []
        fails: list[str] = []
        costs: list[float] = []
        for row in (row for row in rows if row.defence == defence):
            before = plain[row.shared]
            words = f"{row.shared} (AUC {before.auc:.2f} to {row.auc:.2f})"
            (helps if row.auc < before.auc - _SAME else fails).append(words)
            if row.accuracy is not None and before.accuracy is not None:
                costs.append(100 * (before.accuracy - row.accuracy))
        line = f"{defence} "
        line += f"lowers membership in {', '.join(helps)}" if helps else "lowers membership nowhere"
        if fails and helps:
            line += f"; not in {', '.join(fails)}"
        elif fails:
            line += f": {', '.join(fails)}"
        if costs:
            line += f"; accuracy changes by {-costs[0]:+.1f} points"
        lines.append(line)
    lines.append(
        "Attacks of this audit are lower bounds: who knows more, or sees more rounds, finds more."
    )
    return lines


def chosen_photos(samples: Samples, options: AuditOptions) -> np.ndarray:
    """Return int64 photos, evenly of all classes, two of each at least."""
    random = np.random.default_rng(options.seed)
    each = max(options.photos // len(samples.classes), 2)
    chosen = [
        random.permutation(np.flatnonzero(samples.labels == label))[:each]
        for label in range(len(samples.classes))
    ]
    found = np.sort(np.concatenate(chosen))
    if len(found) < 4:
        raise PbcError(
            f"an audit needs 4 photos, some of them not trained on; here are {len(found)}"
        )
    return found


def head_names(manifest: dict[str, Any]) -> tuple[str, str | None]:
    """Return the names of the head's weight and bias, which may have none."""
    names = sorted(manifest["head"], key=lambda name: -len(manifest["parameters"][name]))
    biases = [name for name in names if len(manifest["parameters"][name]) == 1]
    return names[0], biases[0] if biases else None


def _photos(count: int) -> str:
    return "1 photo" if count == 1 else f"{count} photos"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
