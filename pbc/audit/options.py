"""Options of an audit."""

from __future__ import annotations

from dataclasses import dataclass, field

from pbc.errors import UsageError
from pbc.fleet.protection import Protection, gaussian_noise
from pbc.runtime.objective import Objective

DEFENCES = (Protection(), Protection(top_k=0.01), Protection(clip=1.0, noise=0.1))
"""Compared where no other is asked for; the first is none."""


@dataclass(frozen=True)
class AuditOptions:
    """What is shared, and how it is protected.

    batches: photos behind one shared gradient. epochs: of local training behind one shared update.
    clients: devices that the photos are dealt to. rounds: of averaging, for the accuracy.
    top_k, clip, noise: of `Protection`; without any, the usual ones are compared. dp: ε of one
    release, with δ = 1 / photos; it needs a clip and sets the noise. photos: the most to use.
    """

    batches: tuple[int, ...] = (1, 8, 64)
    epochs: int = 1
    clients: int = 4
    rounds: int = 5
    top_k: float | None = None
    clip: float | None = None
    noise: float | None = None
    dp: float | None = None
    objective: Objective = field(default_factory=Objective)
    seed: int = 0
    photos: int = 800
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        for name in ("epochs", "clients", "rounds", "photos"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.batches or min(self.batches) < 1:
            raise UsageError(f"a gradient of {min(self.batches, default=0)} photos; 1 is the least")
        if self.seed < 0:
            raise UsageError(f"the seed is {self.seed}; it must be at least 0")
        if self.dp is not None:
            if self.noise is not None:
                raise UsageError("--dp sets the noise: leave out --noise")
            if self.top_k is not None:
                raise UsageError(
                    "--dp covers no --top-k: which values are sent tells of the photos too"
                )
            if self.clip is None:
                raise UsageError("--dp needs --clip, which bounds what the noise has to hide")
        self.defences(self.photos)  # which refuses what no protection can do

    def defences(self, photos: int) -> tuple[Protection, ...]:
        """Return what is compared: none, and what was asked for or the usual ones."""
        noise = self.noise
        if self.dp is not None:
            noise = gaussian_noise(self.dp, 1 / max(photos, 2))
        if self.top_k is None and self.clip is None and noise is None:
            return DEFENCES
        return (Protection(), Protection(top_k=self.top_k, clip=self.clip, noise=noise or 0.0))
