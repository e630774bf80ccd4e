"""Options of `pbc bench`, besides the bundle and the photos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pbc.errors import UsageError
from pbc.runtime.options import TrainOptions

RIVALS = (
    "full",
    "pet",
    "pet-bf16",
    "pet-cache",
    "pet-cache-closed",
    "piebridge",
    "pbc-nocache",
    "pbc",
)


@dataclass(frozen=True)
class BenchOptions:
    """Settings of a bench.

    train: what every rival trains with; None for batch is the bundle's, for the learning rate that
    it is tuned. tune_epochs: of each trial, where every rival gets a learning rate of its own.
    optional: a rival whose packages are not installed is left out with a note, not refused.
    memory: each rival's is measured, in a process of its own.
    quick: one seed, few epochs and photos, one epoch of full training.
    policy_bundles: bundles by name for the sweep over policies' data.
    """

    train: TrainOptions = field(default_factory=TrainOptions)
    test: Path | None = None
    rivals: tuple[str, ...] = RIVALS
    optional: bool = True
    seeds: int = 3
    epochs_of: Mapping[str, int] = field(default_factory=dict)
    rate_of: Mapping[str, float] = field(default_factory=dict)
    tune_epochs: int | None = None
    weights: Path | None = None
    torch_compile: bool = True
    memory: bool = False
    quick: bool = False
    sweeps: tuple[str, ...] = ()
    policy_bundles: Mapping[str, Path] = field(default_factory=dict)
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if self.seeds < 1:
            raise UsageError(f"--seeds is {self.seeds}; expected 1 or more")
        if self.tune_epochs is not None and self.tune_epochs < 1:
            raise UsageError(f"--tune-epochs is {self.tune_epochs}; expected 1 or more")
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite exclude each other")
        if not self.rivals:
            raise UsageError(f"--rivals is empty; expected some of {', '.join(RIVALS)}")
        for option, given in (("epochs", self.epochs_of), ("lr", self.rate_of)):
            for name, value in given.items():
                if name not in self.rivals:
                    raise UsageError(
                        f"--{option}-of names {name!r}, which does not run "
                        f"(rivals: {', '.join(self.rivals)})"
                    )
                if not value > 0:
                    raise UsageError(f"--{option}-of {name} is {value:g}; it must be above 0")
