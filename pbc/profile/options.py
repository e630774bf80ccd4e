"""Options of `pbc profile`, besides the bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pbc.errors import UsageError, suggest
from pbc.runtime.objective import default_rate

AGAINST = ("torch", "none")


@dataclass(frozen=True)
class ProfileOptions:
    """Settings of a profile.

    data: photos to measure on; None for noise. batch: None for the bundle's. threads: none for
    one for each CPU that this process may use. levels: none for all. against: None for "torch"
    where that is possible, else a word of AGAINST. weights: see pbc.bench.rival.RivalSetting.
    """

    data: Path | None = None
    batch: int | None = None
    threads: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    optimizer: str = "sgd"
    rounds: int = 10
    against: str | None = None
    torch_compile: bool = True
    weights: Path | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        default_rate(self.optimizer)
        for name in ("batch", "rounds"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise UsageError(f"--{name} is {number}; it must be at least 1")
        for count in self.threads:
            if count < 1:
                raise UsageError(f"--threads has {count}; each must be at least 1")
        if self.against is not None and self.against not in AGAINST:
            raise UsageError(suggest("rival", self.against, AGAINST))
