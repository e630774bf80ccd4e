"""Learning rates, tuned on a part of the training photos: PET's for all rivals, or each one's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from pbc.bench.photos import split
from pbc.bench.rivals import order
from pbc.data import Samples
from pbc.errors import PbcError
from pbc.runtime.evaluation import log_softmax
from pbc.runtime.objective import default_rate
from pbc.runtime.options import TrainOptions
from pbc.runtime.parameters import initial_parameters
from pbc.runtime.runtime import Runtime

RATES = {
    "sgd": (0.003, 0.01, 0.03),
    "adam": (0.0003, 0.001, 0.003),
    "adamw": (0.0003, 0.001, 0.003),
}
# For rivals of any kind: full training wants a smaller one than a new head.
RATES_OF_EACH = {
    "sgd": (0.001, *RATES["sgd"]),
    "adam": (0.0001, *RATES["adam"]),
    "adamw": (0.0001, *RATES["adamw"]),
}
_VALIDATION_SHARE = 0.2
_SEED = 0
_MOST_BYTES = 2 << 30
_CHUNK = 64


@dataclass(frozen=True)
class Rate:
    """The learning rate, and how it was found."""

    value: float
    reason: str


def tune(
    runtime: Runtime,
    samples: Samples,
    options: TrainOptions,
    batch: int,
    tell: Callable[[str], None],
) -> Rate:
    """Train PET at every rate on cached level-0 features; the most accurate on held-out photos.

    Of equals the one of the lowest loss. Without a frozen prefix a trial would be as expensive
    as a run: the optimizer's default is taken then.
    """
    default = default_rate(options.optimizer)
    bundle = runtime.bundle
    if not bundle.has_prefix:
        return Rate(default, "the default: without a frozen prefix tuning would cost whole runs")
    values = sum(math.prod(shape) for shape in bundle.manifest["features"].values())
    if 4 * values * len(samples) > _MOST_BYTES:
        return Rate(default, "the default: the features for tuning need more than 2 GiB")
    if int(np.bincount(samples.labels).max()) < 2:
        return Rate(default, "the default: no class has a second photo to validate on")
    train, validation = split(samples, _VALIDATION_SHARE, _SEED)
    executable = runtime.engine.load(bundle, threads=options.threads)

    def features(part: Samples) -> dict[str, np.ndarray]:
        chunks = np.array_split(np.arange(len(part)), math.ceil(len(part) / _CHUNK))
        sent = [executable.prefix(0, part.images(chunk)) for chunk in chunks]
        return {name: np.concatenate([chunk[name] for chunk in sent]) for name in sent[0]}

    learnt, held_out = features(train), features(validation)
    found: dict[float, tuple[float, float]] = {}
    for rate in RATES[options.optimizer]:
        theta = initial_parameters(bundle, len(samples.classes), _SEED)
        executable.start(theta, replace(options.objective, learning_rate=rate))
        for epoch in range(options.epochs):
            for indices in order.batches(len(train), batch, _SEED, epoch):
                inputs = {name: value[indices] for name, value in learnt.items()}
                executable.forward(0, inputs, train.labels[indices])
                executable.update()
        shares = log_softmax(executable.logits(0, held_out))
        accuracy = float((shares.argmax(axis=1) == validation.labels).mean())
        gain = float(shares[np.arange(len(validation)), validation.labels].mean())
        found[rate] = (accuracy, gain)
        tell(f"learning rate {rate:g}: validation accuracy {accuracy:.2%}, loss {-gain:.4f}")
    best = max(found, key=lambda rate: found[rate])
    tried = ", ".join(f"{rate:g}: {accuracy:.1%}" for rate, (accuracy, _) in found.items())
    return Rate(best, f"tuned for PET on {len(validation)} of the training photos ({tried})")


def tune_each(
    rivals: Iterable[str],
    trial: Callable[[str, float, Samples, Samples], tuple[float, float]],
    samples: Samples,
    optimizer: str,
    tell: Callable[[str], None],
) -> dict[str, float]:
    """Return the rate by rival that is the most accurate on held-out photos, as many tries for all.

    trial: trains a rival at a rate on some photos; returns the share of others that it has right,
    and the loss that it ended with. Of equals the one of the lowest loss; a rival all of whose
    rates fail has none.
    """
    train, validation = split(samples, _VALIDATION_SHARE, _SEED)

    def outcome(name: str, rate: float) -> tuple[float, float] | None:
        try:
            return trial(name, rate, train, validation)
        except PbcError as error:
            tell(f"{name}: learning rate {rate:g}: {error}")
            return None

    best: dict[str, float] = {}
    for name in rivals:
        tries = {rate: outcome(name, rate) for rate in RATES_OF_EACH[optimizer]}
        found = {rate: (end[0], -end[1]) for rate, end in tries.items() if end is not None}
        if found:
            best[name] = max(found, key=lambda rate: found[rate])
            tried = ", ".join(f"{rate:g}: {right:.1%}" for rate, (right, _) in found.items())
            tell(f"{name}: learning rate {best[name]:g} ({tried})")
    return best
