"""A task for one measuring process of `pbc profile`.

The number of threads of an engine, and how long idle threads spin, are fixed when it is loaded; a
peak of memory belongs to a process. So everything is measured in fresh processes, which take a
`Task` as a line of JSON and answer with another.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pbc.runtime.objective import Objective

STAGES, LOADING, TRAINING = "stages", "loading", "training"
EAGER, COMPILED = "eager", "torch.compile"
PBC = "pbc"
# So small that parameters neither grow nor settle: gradients near zero are slow to compute with.
_LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Task:
    """Everything that one process is to measure.

    kind: STAGES, LOADING or TRAINING. who: PBC, or for TRAINING one of PyTorch's ways.
    digest: the bundle's, so that all processes of a profile measure the same. classes: of the
    head. photos: where images come from; noise without. torch: whether PyTorch is measured too,
    and compile whether with torch.compile. began: the clock when the process was started.
    """

    kind: str
    bundle: str
    digest: str
    levels: tuple[int, ...]
    batch: int
    classes: int
    threads: int
    rounds: int
    optimizer: str
    who: str = PBC
    photos: str | None = None
    weights: str | None = None
    torch: bool = False
    compile: bool = False
    began: float = 0.0

    @property
    def objective(self) -> Objective:
        """Return what every step minimises."""
        return Objective(self.optimizer, _LEARNING_RATE)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Task:
        return cls(**{**facts, "levels": tuple(facts["levels"])})


def level_name(level: int) -> str:
    """Return the name of a level among the sides."""
    return f"level {level}"
