"""What a training run can be told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pbc.errors import UsageError, suggest
from pbc.runtime.cache import DTYPES

CACHES = ("off", "ram", "disk")
LEARNING_RATES = {"sgd": 0.01, "adam": 0.001}
# Far beyond use; what an optimizer makes of a larger one is no float32.
_LARGEST_RATE = 1e30
# These may differ when a run is resumed: they decide when it ends and what is written beside it.
_FREE_ON_RESUME = ("epochs", "checkpoint_seconds", "tensorboard")


@dataclass(frozen=True)
class TrainOptions:
    """Options of one run; None means the default that the bundle or the optimizer implies.

    alpha: a mini-batch whose loss is at most alpha times the running mean is not learnt from.
    fidelity_floor: no sample runs at a level whose fidelity, predicted for the sample or measured
        on held-out images, is below.
    routing, skip: False sends every sample to level 0, learns from every mini-batch.
    cache_mb: upper bound of the feature cache, in MiB.
    threads: of the engine; the last bits of a result depend on it.
    """

    epochs: int = 12
    learning_rate: float | None = None
    batch: int | None = None
    optimizer: str = "sgd"
    alpha: float = 0.8
    fidelity_floor: float = 0.9
    scheduler: str = "piebridge"
    routing: bool = True
    skip: bool = True
    cache: str = "ram"
    cache_mb: int = 512
    cache_dtype: str = "float32"
    seed: int = 0
    threads: int | None = None
    checkpoint_seconds: float = 30.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        for kind, value, known in (
            ("optimizer", self.optimizer, tuple(LEARNING_RATES)),
            ("cache", self.cache, CACHES),
            ("cache dtype", self.cache_dtype, DTYPES),
        ):
            if value not in known:
                raise UsageError(suggest(kind, value, known))
        for name in ("epochs", "batch", "cache_mb", "threads"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise UsageError(f"{name} is {number}; it must be at least 1")
        if self.learning_rate is not None and not 0 < self.learning_rate <= _LARGEST_RATE:
            raise UsageError(
                f"the learning rate is {self.learning_rate}; "
                f"it must be above 0 and at most {_LARGEST_RATE:g}"
            )
        if not self.alpha >= 0:
            raise UsageError(f"alpha is {self.alpha}; it must be at least 0")
        if not 0 <= self.fidelity_floor <= 1:
            raise UsageError(f"the fidelity floor is {self.fidelity_floor}; it must be in 0…1")
        if self.seed < 0:
            raise UsageError(f"the seed is {self.seed}; it must be at least 0")

    def deciding(self) -> dict[str, Any]:
        """Return those options that change the result."""
        return {k: v for k, v in asdict(self).items() if k not in _FREE_ON_RESUME}
