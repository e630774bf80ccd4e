"""Options of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pbc.bundle import Bundle
from pbc.bundle.optimizers import optimizer_facts
from pbc.errors import UsageError, suggest
from pbc.runtime.objective import Objective, default_rate
from pbc.runtime.stopping import Stop
from pbc.util.processor import check_threads

CACHES = ("off", "ram", "disk")
CACHE_DTYPES = ("float32", "float16")
AUTO = "auto"
HEADS = (AUTO, "closed", "sgd")
_MOMENTUM = Objective().momentum
# Where features are kept, measured with SGD on those of MobileNetV3: the accuracy of mini-batches
# of 8 at a third of the time, at so many times their rate.
_LARGE_BATCH = 64
_RATE_OF_LARGE = 8.0
# More would be a cache of mostly the same image.
_MOST_VIEWS = 64
# These may differ when a run is resumed: they decide when it ends and what is written beside it.
# (Costs are read once, at the start; from then on those of the checkpoint count.)
_FREE_ON_RESUME = ("epochs", "checkpoint_seconds", "costs")


@dataclass(frozen=True)
class TrainOptions:
    """Options of one run; None means the default that the bundle or the optimizer implies.

    momentum, weight_decay, label_smoothing: see Objective; momentum is for sgd alone.
    batch: samples per mini-batch; `auto` is 64, at a higher learning rate, where features are kept.
    head: `closed` makes the head of all samples in one visit where nothing else trains, and starts
        it elsewhere (pbc.runtime.closed_head); `sgd` learns it in the epochs alone, as rounds need;
        `auto` is closed where there is a closed form and at least four samples per class.
    alpha: a mini-batch whose loss is at most alpha times the running mean is not learnt from
        (for schedulers that judge whole mini-batches).
    max_accuracy_loss: how many points of accuracy cheap levels may cost; the bundle's map turns
        it into a fidelity floor.
    fidelity_floor: no sample runs at a level whose fidelity, predicted for the sample or measured
        on held-out images, is below; None: what max_accuracy_loss implies.
    max_level: no sample runs at a cheaper level than this; None: any.
    deploy_level: the level that the personal model is to run at; at another than 0 every sample is
        learnt from there too. `auto`: level 0 until the run ends, then the cheapest level that
        loses at most max_accuracy_loss on the held-out samples (pbc.runtime.level_trial).
    selector: chooses which tensors train, every so many epochs, such that a training iteration
        takes `rho` of the time of a full one; None: all of them, always.
    routing, skip: False sends every sample to level 0; visits every sample in every epoch, and
        learns from it.
    patience: the run ends when so many epochs brought nothing better on the held-out samples, with
        what was best. stop: `auto`, a time or an accuracy (pbc.runtime.stopping), at which it ends.
    time_budget: seconds that the whole run may take; None: as long as it needs.
    prefix_batch: samples per call of a prefix that looks ahead; None: what measured fastest.
    augment: views per sample, the whole image and crops; 0 and 1: the image alone.
    costs: a file of measured costs to decide by, instead of measuring.
    cache_mb: upper bound of the feature cache, in MiB.
    threads: of the engine; the last bits of a result depend on it.
    """

    epochs: int = 12
    learning_rate: float | None = None
    batch: int | str | None = None
    optimizer: str = "sgd"
    momentum: float = _MOMENTUM
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    head: str = "sgd"
    alpha: float = 0.8
    max_accuracy_loss: float = 0.5
    fidelity_floor: float | None = None
    max_level: int | None = None
    deploy_level: int | str = 0
    scheduler: str = "cost-model"
    selector: str | None = None
    rho: float = 0.5
    select_every: int = 4
    routing: bool = True
    skip: bool = True
    time_budget: float | None = None
    patience: int | None = None
    stop: str | None = None
    prefix_batch: int | None = None
    augment: int = 0
    costs: Path | None = None
    cache: str = "ram"
    cache_mb: int = 512
    cache_dtype: str = "float32"
    seed: int = 0
    threads: int | None = None
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        for kind, value, known in (
            ("cache", self.cache, CACHES),
            ("cache dtype", self.cache_dtype, CACHE_DTYPES),
            ("head", self.head, HEADS),
        ):
            if value not in known:
                raise UsageError(suggest(kind, value, known))
        names = (
            "epochs",
            "batch",
            "cache_mb",
            "threads",
            "prefix_batch",
            "select_every",
            "patience",
        )
        for name in names:
            number = getattr(self, name)
            if name == "batch" and number == AUTO:
                continue
            if number is not None and (not isinstance(number, int) or number < 1):
                raise UsageError(f"{name} is {number}; it must be at least 1")
        check_threads(self.threads)
        optimizer = optimizer_facts(self.objective.optimizer)  # which refuses what none can do
        if self.momentum != _MOMENTUM and not optimizer.takes_momentum:
            raise UsageError(
                f"the momentum is {self.momentum}, but {self.optimizer} takes none; "
                "only sgd does (--optimizer sgd)"
            )
        if not self.alpha >= 0:
            raise UsageError(f"alpha is {self.alpha}; it must be at least 0")
        if self.fidelity_floor is not None and not 0 <= self.fidelity_floor <= 1:
            raise UsageError(f"the fidelity floor is {self.fidelity_floor}; it must be in 0…1")
        if not self.max_accuracy_loss >= 0:
            raise UsageError(
                f"the most accuracy to lose is {self.max_accuracy_loss} points; "
                "it must be at least 0"
            )
        if not 0 < self.rho <= 1:
            raise UsageError(f"rho is {self.rho}; it must be in 0…1, and above 0")
        if not self.checkpoint_seconds >= 0:
            raise UsageError(
                f"the seconds between checkpoints are {self.checkpoint_seconds}; "
                "they must be at least 0"
            )
        if self.time_budget is not None and not self.time_budget > 0:
            raise UsageError(f"the time budget is {self.time_budget} s; it must be above 0")
        if self.max_level is not None and self.max_level < 0:
            raise UsageError(f"the cheapest level is {self.max_level}; it must be at least 0")
        if self.deploy_level != AUTO and (
            not isinstance(self.deploy_level, int) or self.deploy_level < 0
        ):
            raise UsageError(
                f"the level to deploy is {self.deploy_level!r}; it must be a number from 0 on, "
                f"or {AUTO}"
            )
        most = self.max_level if self.routing else 0
        if self.fixed_level is not None and most is not None and most < self.fixed_level:
            why = f"the cheapest level is {most}" if self.routing else "there is no routing"
            raise UsageError(
                f"the level to deploy is {self.fixed_level}, where all photos are learnt from too, "
                f"but {why}: give one of the two"
            )
        if self.stop is not None:
            Stop.parse(self.stop)  # which refuses what cannot be meant
        if not 0 <= self.augment <= _MOST_VIEWS:
            raise UsageError(f"augment is {self.augment}; it must be in 0…{_MOST_VIEWS}")
        if self.seed < 0:
            raise UsageError(f"the seed is {self.seed}; it must be at least 0")

    def for_bundle(self, bundle: Bundle) -> TrainOptions:
        """Return the options of a run of this bundle, with its mini-batches as a number."""
        if self.batch != AUTO:
            return replace(self, batch=self.batch or bundle.manifest["batch"])
        if not bundle.has_prefix or self.cache == "off":
            return replace(self, batch=bundle.manifest["batch"])
        return replace(self, batch=_LARGE_BATCH, learning_rate=self._rate_of_large())

    def _rate_of_large(self) -> float:
        """Return the rate of large mini-batches: optimizers that scale gradients take the root."""
        factor = _RATE_OF_LARGE if self.optimizer == "sgd" else _RATE_OF_LARGE**0.5
        rate = self.learning_rate
        return factor * default_rate(self.optimizer) if rate is None else rate

    @property
    def samples_per_batch(self) -> int:
        """Return the samples per mini-batch, of options that are for a bundle."""
        assert isinstance(self.batch, int), "for_bundle says how many"
        return self.batch

    @property
    def objective(self) -> Objective:
        """Return the loss and the optimizer, at the optimizer's own rate if none is given."""
        rate = self.learning_rate
        return Objective(
            self.optimizer,
            default_rate(self.optimizer) if rate is None else rate,
            self.momentum,
            self.weight_decay,
            self.label_smoothing,
        )

    @property
    def fixed_level(self) -> int | None:
        """Return the level that everything runs at; None where photos may run at several."""
        level = self.deploy_level
        return level if isinstance(level, int) and level > 0 else None

    @property
    def views(self) -> int:
        """Return the number of views per sample."""
        return max(self.augment, 1)

    def resolved(self, batch: int) -> dict[str, Any]:
        """Return what is used where None was given, with mini-batches of `batch`."""
        return {"batch": batch, "learning_rate": self.objective.learning_rate}

    def to_json(self) -> dict[str, Any]:
        """Return all options but the place of a file, which says nothing elsewhere."""
        return {name: value for name, value in asdict(self).items() if name != "costs"}

    def deciding(self) -> dict[str, Any]:
        """Return those options that change the result."""
        return {k: v for k, v in self.to_json().items() if k not in _FREE_ON_RESUME}
